"""Guidance in one batch: the conditional half alone after T-GATE's gate."""

import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

import diffopt
from diffopt.caching.apply_plan import find_loop
from diffopt.caching.policies import t_gate
from diffopt.core import Pipeline, Record
from diffopt.core.equivalence import difference
from diffopt.engine.engine import build, load
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
from diffopt.ir.program import Program
from diffopt.transforms import batch_slice, drop_guidance
from tests.passes.build import Builder, aten, body, randn
from tests.zoo import CASES, call, traced

STEPS = 6


def inputs(name: str) -> dict[str, Any]:
    return {**CASES[name].inputs(0), "num_inference_steps": STEPS}


@cache
def unrolled(name: str, text: str = "unroll,hoist") -> Program:
    return Pipeline.parse(text).run(traced(name, num_inference_steps=STEPS))


def cached(name: str, options: str) -> tuple[Program, Record]:
    program = Pipeline.parse(f"cache(t-gate,{options})").run(unrolled(name))
    return program, Record.from_json(program.history[-1])


def eager(name: str, gate: int, fresh: tuple[int, ...] = (), half: bool = True) -> list[Tensor]:
    """Run the pipeline with a denoiser that does what T-GATE says.

    From the gate on it computes the second half of its batch alone, with the cross-attentions'
    outputs of the step before, and gives that half for both. In the steps after the first that
    `fresh` leaves out, if it names any, self-attentions give what they gave last.
    """
    pipe = CASES[name].build()
    net = getattr(pipe, "unet", None) or pipe.transformer
    run, step = net.forward, -1

    def cut(value: Any) -> Any:
        return value[1:] if isinstance(value, Tensor) and value.shape[:1] == (2,) else value

    def forward(*args: Any, **more: Any) -> Any:
        nonlocal step
        step += 1
        if step < gate or not half:
            return run(*args, **more)
        result = run(*tree_map(cut, args), **tree_map(cut, more))
        return tree_map(lambda tensor: torch.cat([tensor, tensor]), result)

    net.forward = forward
    for path, module in net.named_modules():
        if not path.endswith((".attn1", ".attn2")) or (path.endswith(".attn1") and not fresh):
            continue
        computed = fresh if path.endswith(".attn1") else range(gate)
        kept: list[Any] = [None]

        def hook(
            module: Any, args: Any, output: Any, kept: Any = kept, computed: Any = computed
        ) -> Any:
            if step in computed:
                kept[0] = output
            return kept[0][-output.shape[0] :]

        module.register_forward_hook(hook)
    return call(pipe, inputs(name))


def flops(record: Record) -> dict[str, int]:
    (note,) = (value for value in record.notes.values() if isinstance(value, dict))
    return dict(note["flops"])


# A UNet (DDIM), one whose inputs a scheduler scales, a transformer with learned variances


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_after_the_gate_the_conditional_half_is_computed_alone(name: str) -> None:
    program, record = cached(name, "gate=2")
    expected = eager(name, 2)
    assert difference(call(program, inputs(name)), expected)[1] < 1e-5
    assert difference(eager(name, 2, half=False), expected)[1] > 1e-5, "guidance does nothing"
    assert record.skipped == []
    cost = flops(record)
    full = cost["before"] // STEPS
    both = (cost["predicted"] - 2 * full) // 4  # of a step without cross-attention
    assert cost["measured"] == 2 * full + 4 * (both // 2)
    late = [n for n in program.calls() if (tag := call_tags.tag(n)) and tag.step >= 2]
    late = [n for n in late if graph_flops(program.components[str(n.target)]) == both // 2]
    assert len(late) == 4
    assert len({n.target for n in late}) == 1
    # Not a batch of two equal latents, of which one half is taken: these are never put together.
    sources = [a for n in late for a in n.args if isinstance(a, fx.Node)]
    assert not any(aten.cat.default in (n.target for n in a.all_input_nodes) for a in sources)


def test_values_that_halves_hand_to_one_another_are_halves() -> None:
    options = "gate=3,warm-up=1,sp-interval=2,fi-interval=2"
    program, record = cached("pixart", options)
    fresh = tuple(t_gate.self_attention(STEPS, 3, 1, 2, 2))
    assert fresh == (0, 1, 2, 4)
    assert difference(call(program, inputs("pixart")), eager("pixart", 3, fresh))[1] < 1e-5
    assert record.skipped == []
    for node in program.calls():
        tag = call_tags.tag(node)
        if tag is None or tag.step < 3:
            continue
        reused = call_tags.reused(program.root, node)
        assert all(formal.meta["val"].shape[0] == 1 for formal in reused)
        # Self-attention from a half, as it is; cross-attention from a whole batch, cut.
        assert any(n.target is operator.getitem for n in reused.values()) == (tag.step == 5)


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_it_survives_lowering(name: str, tmp_path: Path) -> None:
    program, _ = cached(name, "gate=2")
    program = Pipeline.parse("simplify,fuse").run(program)
    build(program, "eager", tmp_path / "x.engine")
    engine = load(tmp_path / "x.engine")
    assert difference(call(engine, inputs(name)), eager(name, 2))[1] < 1e-5


def test_before_hoisting_too() -> None:
    program = Pipeline.parse("cache(t-gate,gate=2)").run(unrolled("pixart", "unroll"))
    assert difference(call(program, inputs("pixart")), eager("pixart", 2))[1] < 1e-5


@pytest.mark.parametrize("name", ["sd-pag", "lcm"])
def test_without_two_halves_to_tell_apart_all_is_computed(name: str) -> None:
    program, record = cached(name, "gate=2")
    assert record.skipped == [
        "unet: steps 2, 3, 4, 5: the whole batch is computed: no guidance joins two halves of its "
        "result"
    ]
    assert flops(record)["measured"] == flops(record)["predicted"]
    assert difference(call(program, inputs(name)), eager(name, 2, half=False))[1] < 1e-5


# Pipelines written for it


class Block(nn.Module):
    """A block with cross-attention; what `mix` adds needs the whole batch."""

    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.mix = mix
        self.query, self.key, self.value, self.out, self.mlp = (nn.Linear(8, 8) for _ in range(5))
        self.last = nn.Linear(8, 16)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = x + t
        q, k, v = self.query(x), self.key(text), self.value(text)
        heads = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.mlp(x).relu()
        y = self.last(x)
        return y + y.flip(0) if self.mix else y


Guide = Callable[[Tensor, Tensor], Tensor]


class Sampler:
    """Guide half of the channels; the latents are twice the same, the conditional half first."""

    def __init__(self, guide: Guide, mix: bool = False) -> None:
        torch.manual_seed(0)
        self.guide = guide
        self.components = {"block": Block(mix).eval().requires_grad_(False)}
        self.gate: int | None = None

    def __call__(self, text: Tensor, generator: torch.Generator) -> Tensor:
        x = torch.randn(1, 3, 8, generator=generator).repeat(2, 1, 1)
        both = torch.cat([text, torch.zeros_like(text)])
        block = self.components["block"]
        for i, t in enumerate(torch.linspace(1.0, 0.1, 5)):
            half, _ = x.chunk(2)
            predicted = block(torch.cat([half, half]), t, both)
            if self.gate is not None and i >= self.gate:
                predicted = torch.cat([predicted[:1], predicted[:1]])
            noise, variance = predicted.chunk(2, dim=-1)
            noise = self.guide(*noise.chunk(2))
            noise, _ = torch.cat([torch.cat([noise, noise]), variance], -1).split(8, -1)
            x = x * 0.9 - 0.2 * noise + 0.1 * variance.tanh()
        return x[:1]


def arguments() -> dict[str, Any]:
    return {"text": randn(1, 2, 8), "generator": torch.Generator().manual_seed(1)}


def plain(c: Tensor, u: Tensor) -> Tensor:
    return u + 3.0 * (c - u)


def rescaled(c: Tensor, u: Tensor) -> Tensor:
    guided = u + 3.0 * (c - u)
    dims = list(range(1, c.ndim))
    scale = c.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return 0.7 * guided * scale + 0.3 * guided


def from_above(c: Tensor, u: Tensor) -> Tensor:
    return c.double().float() + (c.double().float() - u.double().float()) * 2.0


def weighted(c: Tensor, u: Tensor) -> Tensor:
    return 3.0 * c - 2.5 * u


def turned(c: Tensor, u: Tensor) -> Tensor:
    return ((u + 3.0 * (c - u)) + (c + 2.0 * (u - c))) / 2


def squared(c: Tensor, u: Tensor) -> Tensor:
    return u + (c - u).square()


def both_ways(guide: Guide, mix: bool = False) -> tuple[float, list[str]]:
    """Return how far a sampler's program with T-GATE is from the sampler that does the same."""
    sampler = Sampler(guide, mix)
    program = diffopt.trace(sampler, **arguments())
    # Nothing is cached: what is tested is what follows.
    done = Pipeline.parse("unroll,hoist").run(program)
    loop = find_loop(done)
    ctx = diffopt.core.Context()
    before = done.flops()
    t_gate.TGate(gate=2).finish(loop, ctx)
    done.refresh()
    done.verify()
    assert (done.flops() < before) == (not ctx.skipped)
    sampler.gate = None if ctx.skipped else 2
    expected = sampler(**arguments())
    return difference([done(**arguments())], [expected])[1], ctx.skipped


@pytest.mark.parametrize("guide", [plain, rescaled, from_above])
def test_guided_channels(guide: Guide) -> None:
    error, skipped = both_ways(guide)
    assert skipped == []
    assert error < 1e-6


ODD = "joins the halves of its result in another way than u + s (c - u)"


@pytest.mark.parametrize(
    ("guide", "mix", "reason"),
    [
        (weighted, False, f"aten.sub.Tensor {ODD}"),
        (turned, False, "its halves take turns in being the conditional one"),
        (squared, False, f"aten.pow.Tensor_Scalar {ODD}"),
        (plain, True, "aten.flip needs both halves of it"),
    ],
)
def test_left_alone(guide: Guide, mix: bool, reason: str) -> None:
    error, skipped = both_ways(guide, mix)
    assert error < 1e-6
    assert skipped == [f"block: steps 2, 3, 4: the whole batch is computed: {reason}"]


def test_a_half_that_gives_other_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_slice, "error", lambda *_: 1.1)
    error, skipped = both_ways(plain)
    assert skipped == [
        "block: steps 2, 3, 4: the whole batch is computed: its half of the batch gives other "
        "results alone"
    ]
    assert error < 1e-6


def guidance_of(make: Callable[..., Any]) -> drop_guidance.Guidance:
    graph = body(make, randn(4, 6))
    return drop_guidance.find(g.placeholders(graph)[0])


def test_which_half_is_the_conditional_one() -> None:
    def second(b: Builder, x: fx.Node) -> Any:
        u, c = (b(aten.slice.Tensor, x, 0, i, i + 2) for i in (0, 2))
        return b(aten.add.Tensor, u, b(aten.mul.Tensor, b(aten.sub.Tensor, c, u), 2.0))

    def first(b: Builder, x: fx.Node) -> Any:
        parts = b(aten.split.Tensor, x, 2)
        c, u = (b(operator.getitem, parts, i) for i in (0, 1))
        return b(aten.add.Tensor, u, b(aten.mul.Tensor, b(aten.sub.Tensor, c, u), 2.0))

    assert guidance_of(second).conditional == drop_guidance.HALVES[1]
    assert guidance_of(first).conditional == drop_guidance.HALVES[0]


def test_parts_that_are_no_halves_are_none() -> None:
    def make(b: Builder, x: fx.Node) -> Any:
        u, c = (b(aten.slice.Tensor, x, 0, i, i + 2) for i in (0, 1))
        return b(aten.add.Tensor, u, b(aten.mul.Tensor, b(aten.sub.Tensor, c, u), 2.0))

    with pytest.raises(drop_guidance.Unguided) as caught:
        guidance_of(make)
    assert str(caught.value) == "no guidance joins two halves of its result"
