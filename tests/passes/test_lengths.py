"""One program serves texts of any number of tokens, and gives what the pipeline gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffopt
from diffopt.core import Pipeline
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError, ToleranceError, VerifyError
from diffopt.ir.program import Program
from diffopt.transforms import token_dimension
from tests.capture.test_trace import TextDiffusion, Words
from tests.zoo import CASES, call, generator

EXACT = "unroll,hoist,simplify,fuse"


class Attention(nn.Module):
    """Attend from latents to words, which see what is before them, at learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(32, 8))
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, words: Tensor, t: Tensor) -> Tensor:
        count = words.shape[1]
        words = (words + self.positions[:count]) * t
        seen = torch.ones(count, count).tril() / torch.arange(1, count + 1)[:, None]
        words = seen @ words
        heads = [
            part.view(1, part.shape[1], 2, 4).transpose(1, 2)
            for part in (self.query(x), self.key(words), self.value(words))
        ]
        y = nn.functional.scaled_dot_product_attention(*heads)
        return x + y.transpose(1, 2).reshape(1, x.shape[1], 8)


class Guided:
    """Sample with two texts of separate lengths, apart and joined."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda words: words) -> None:
        torch.manual_seed(0)
        self.between = between
        self.components = {
            "embed": nn.Embedding(50, 8).eval().requires_grad_(False),
            "net": Attention().eval().requires_grad_(False),
            "words": Words(),
        }

    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        steps: int = 2,
    ) -> Tensor:
        embed, net = self.components["embed"], self.components["net"]
        x = torch.randn(1, 3, 8, generator=generator)
        texts = [text for text in (prompt, negative_prompt) if text is not None]
        ids = [self.components["words"]([text])["input_ids"] for text in texts]
        states = [self.between(embed(row)) for row in ids]
        for t in torch.linspace(1, 0.5, steps):
            for words in [*states, torch.cat(states, 1)][: 2 * len(states) - 1]:
                x = x - 0.1 * net(x, words, t)
        return x


def trace(pipe: Any = None, prompt: str = "one two three", **more: Any) -> Program:
    return diffopt.trace(pipe or Guided(), prompt=prompt, generator=generator(0), **more)


def words(count: int) -> str:
    return " ".join(f"w{index}" for index in range(count))


@pytest.mark.parametrize("passes", ["", EXACT + ","])
def test_a_loop_serves_every_length(passes: str) -> None:
    pipe = TextDiffusion()
    program = Pipeline.parse(f"{passes}lengths(max=12)").run(trace(pipe))
    for count in (1, 2, 5, 6, 12):
        expected = pipe(prompt=words(count), generator=generator(3))
        assert torch.equal(program(prompt=words(count), seed=3), expected)
    with pytest.raises(DiffoptError) as caught:
        program(prompt=words(13), seed=3)
    assert str(caught.value) == "'prompt' gives 13 tokens; the program was built for 1 to 12"


@pytest.mark.parametrize("passes", ["", EXACT + ","])
def test_texts_of_two_lengths_and_their_sum(passes: str) -> None:
    pipe = Guided()
    captured = trace(pipe, negative_prompt="four five six seven")
    program = Pipeline.parse(f"{passes}lengths(max=10)").run(captured)
    program.verify()
    assert [(n.text, n.low, n.high) for n in program.lengths] == [
        ("prompt", 1, 10),
        ("negative_prompt", 1, 10),
    ]
    for one, other in ((1, 1), (1, 10), (10, 1), (4, 4), (10, 10), (3, 7)):
        texts = {"prompt": words(one), "negative_prompt": words(other)}
        expected = pipe(**texts, generator=generator(1))
        got = program(**texts, seed=1)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_count_that_is_another_size_too() -> None:
    # The captures of 6 tokens would share the component that embeds the 6 tokens sampled.
    pipe = TextDiffusion()
    program = Pipeline.parse("lengths(max=6)").run(trace(pipe))
    expected = pipe(prompt=words(6), generator=generator(3))
    assert torch.equal(program(prompt=words(6), seed=3), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_after_the_other_passes() -> None:
    case = CASES["qwen-image"]
    pipe, arguments = case.build(), case.inputs(0)
    program = diffopt.trace(pipe, **arguments)
    program = Pipeline.parse(f"{EXACT},lengths(max=256)").run(program)
    for prompt, negative in (
        ("a", ""),
        ("a red cat", "old"),
        ("the house", "an old tree of blue dogs in the green house"),
    ):
        changed = arguments | {"prompt": prompt, "negative_prompt": negative}
        (expected,) = call(pipe, changed | {"generator": generator(3)})
        (got,) = call(program, changed | {"generator": generator(3)})
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_one_engine_serves_every_length(tmp_path: Path) -> None:
    pipe = Guided()
    program = Pipeline.parse(f"{EXACT},lengths(max=10)").run(trace(pipe, steps=1))
    engine = build(program, "cpu", tmp_path / "a.engine")  # of one step, as it compiles for long
    engine.verify()
    assert engine.manifest["lengths"] == {"prompt": [1, 10]}
    for count in (1, 4, 10):
        (got,) = engine.run(program.prepare(prompt=words(count), seed=2))
        expected = pipe(prompt=words(count), generator=generator(2), steps=1)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_such_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    program = Pipeline.parse("lengths(max=10)").run(trace())
    program.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    loaded.verify()
    assert loaded.lengths == program.lengths
    for count in (1, 9):
        tensors = program.prepare(prompt=words(count), seed=1)
        assert torch.equal(loaded.run(tensors)[0], program.run(tensors)[0])
    loaded.host.components = program.host.components  # this tokenizer has no files
    with pytest.raises(DiffoptError, match=r"^'prompt' gives 11 tokens; .* for 1 to 10$"):
        loaded(prompt=words(11), seed=3)


class Padded(Words):
    """A tokenizer of always eight tokens."""

    def __call__(self, texts: list[str], return_tensors: str = "pt") -> dict[str, Tensor]:
        ids = super().__call__(texts)["input_ids"][:, :8]
        return {"input_ids": nn.functional.pad(ids, (0, 8 - ids.shape[1]))}


class Cut(Words):
    """A tokenizer of at most eight tokens."""

    def __call__(self, texts: list[str], return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"input_ids": super().__call__(texts)["input_ids"][:, :8]}


def test_a_tokenizer_that_cuts_texts() -> None:
    pipe = Guided()
    pipe.components["words"] = Cut()
    program = Pipeline.parse("lengths(max=20)").run(trace(pipe))
    assert [(n.low, n.high) for n in program.lengths] == [(1, 8)]
    for count in (1, 8, 30):
        expected = pipe(prompt=words(count), generator=generator(1))
        torch.testing.assert_close(
            program(prompt=words(count), seed=1), expected, atol=1e-6, rtol=1e-5
        )


def test_a_fixed_number_of_tokens_is_left_alone() -> None:
    pipe = Guided()
    pipe.components["words"] = Padded()
    program = Pipeline.parse("lengths").run(trace(pipe))
    (record,) = program.history
    assert record["skipped"] == ["the program: every text has a fixed number of tokens"]
    assert not record["changed"]
    assert program.lengths == []


def refused(between: Callable[[Tensor], Tensor], message: str) -> None:
    """Check the message, which begins with the line of this file where the lengths differ."""
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse("lengths(max=10)").run(trace(Guided(between)))
    where, _, rest = str(caught.value).partition(": texts")
    assert where.partition(":")[0].endswith("test_lengths.py")
    assert f"texts{rest}" == message


def test_a_number_that_depends_on_the_length_is_refused() -> None:
    refused(
        lambda words: words * words.shape[1] ** -0.5,
        "texts of other lengths are computed in another way here: aten.mul.Tensor with "
        "0.4472135954999579 and with 0.31622776601683794",
    )


def test_a_constant_that_depends_on_the_length_is_refused() -> None:
    refused(
        lambda words: words * torch.linspace(0, 1, words.shape[1])[:, None],
        "texts of other lengths are computed in another way here: aten.mul.Tensor with "
        "a constant float32[5,1] and with another float32[10,1]",
    )


def test_operators_that_depend_on_the_length_are_refused() -> None:
    refused(
        lambda words: torch.stack([words[:, k:].mean(1) for k in range(words.shape[1])], 1),
        "texts of other lengths are computed in another way here: aten.stack and aten.slice.Tensor",
    )


def test_a_size_that_does_not_grow_evenly_is_refused() -> None:
    refused(
        lambda words: words.repeat(1, words.shape[1], 1)[:, : words.shape[1] ** 2 // 4 + 1],
        "texts of other lengths are computed in another way here: no argument has a size from "
        "which 7 or 26 follows",
    )


def test_texts_that_do_not_fit_are_refused() -> None:
    for count, message in (
        (1, "'prompt' has one token at capture: trace with a longer one"),
        (
            11,
            "lengths(max=10): 'prompt' gives 11 tokens at capture; give a larger max, or trace "
            "with a shorter text",
        ),
    ):
        with pytest.raises(DiffoptError) as caught:
            Pipeline.parse("lengths(max=10)").run(trace(prompt=words(count)))
        assert str(caught.value) == message
    with pytest.raises(DiffoptError, match=r"^max=1: wants at least 2 tokens"):
        Pipeline.parse("lengths(max=1)")


def test_a_saved_program_is_refused(tmp_path: Path) -> None:
    captured = trace()
    captured.retrace = None
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse("lengths").run(captured)
    assert str(caught.value) == (
        "lengths captures the pipeline again with longer texts, and a saved program has no "
        "pipeline: give the model itself"
    )


def test_the_result_is_compared_with_the_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_dimension, "_begins", lambda longest, tensor: True)
    pipe = Guided(lambda words: words * torch.linspace(0, 1, words.shape[1])[:, None])
    with pytest.raises(ToleranceError, match=r"^lengths\(max=10\) changed the output by .*\[1,5\]"):
        Pipeline.parse("lengths(max=10)").run(trace(pipe))


def test_the_verifier_refuses_a_graph_that_fixes_a_size() -> None:
    program = Pipeline.parse("lengths(max=10)").run(trace())
    body = program.components["net"]
    views = body.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    view = next(n for n in views if n.args[1][1] == -1)
    view.args = (view.args[0], list(view.meta["val"].shape))
    with pytest.raises(VerifyError, match=r"^the graph does not serve texts of 1 tokens: "):
        program.verify()


@pytest.mark.parametrize("after", ["simplify", "batch"])
def test_no_pass_can_follow(after: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse(f"lengths(max=10),{after}").run(trace())
    assert str(caught.value) == (f"{after} cannot follow lengths, which has to be the last pass")
