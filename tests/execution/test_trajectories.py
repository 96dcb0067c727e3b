"""What passes measure: requests, values inside a loop, and results kept on disk."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import diffopt
from diffopt.capture.trace import trace_function
from diffopt.cli import main
from diffopt.core import Context, Pass, Pipeline
from diffopt.core.instruments import bisect
from diffopt.errors import DiffoptError
from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import read_prompts
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.program import Program
from diffopt.storage import disk_cache
from tests import loops
from tests.passes.build import Builder, randn
from tests.passes.build import body as part
from tests.passes.build import program as written
from tests.zoo import CASES, traced

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(name: str) -> Program:
    return Pipeline.parse("unroll,hoist").run(traced(name))


@pytest.fixture(scope="module")
def sd() -> Program:
    return prepared("sd")


@pytest.fixture(scope="module")
def dit() -> Program:
    return prepared("dit")


@pytest.fixture(scope="module", params=["sd", "dit"])
def program(request: pytest.FixtureRequest) -> Program:
    traced: Program = request.getfixturevalue(request.param)
    return traced


def loop(program: Program, component: str = "") -> dict[tuple[int, int], fx.Node]:
    """Return the calls of a component: by default of the one that is called most often."""
    tags = {node: call_tags.tag(node) for node in program.calls()}
    calls = {(t.component, t.step, t.branch): node for node, t in tags.items() if t is not None}
    component = component or max(calls, key=lambda key: key[1])[0]
    return {key[1:]: node for key, node in calls.items() if key[0] == component}


def body(program: Program) -> fx.GraphModule:
    return program.components[str(loop(program)[0, 0].target)]


def inner(gm: fx.GraphModule) -> list[fx.Node]:
    """Return what enters a linear or convolution, from the middle of a body."""
    layers = [n for n in gm.graph.nodes if n.target in (aten.linear.default, aten.conv2d.default)]
    inputs = dict.fromkeys(n.all_input_nodes[0] for n in layers[len(layers) // 2 :])
    return [n for n in inputs if n.op == "call_function"][:3]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Requests


def test_prompts_take_turns_and_seeds_count_up(sd: Program) -> None:
    inputs = trajectories.requests(sd, ["a red cat", "the old green house"], 3, seed=5)
    for index, text in enumerate(["a red cat", "the old green house", "a red cat"]):
        assert equal(inputs[index], sd.prepare(prompt=text, seed=5 + index))
    assert equal(trajectories.requests(sd, None, 1, seed=7)[0], sd.prepare(seed=7))


def test_class_labels(dit: Program) -> None:
    noise, labels = dit.sample
    rows = trajectories.requests(dit, ["3", "1000", "5"], 3, seed=7)
    assert [row[1].tolist() for row in rows] == [[3, 1000], [5, 3], [1000, 5]]
    for index, row in enumerate(rows):
        assert equal(row, dit.prepare(class_labels=row[1].tolist(), seed=7 + index))
        assert row[1].dtype == labels.dtype
    (row,) = trajectories.requests(dit, None, 1, seed=1)
    assert torch.equal(row[1], labels)
    assert not torch.equal(row[0], noise)


@pytest.mark.parametrize("text", ["a dress", "1001", "-1", "2.0"])
def test_what_is_no_class_label(dit: Program, text: str) -> None:
    with pytest.raises(DiffoptError) as error:
        trajectories.requests(dit, ["3", text], 1)
    assert str(error.value) == (
        f"'{text}' is no class label, and the program takes no prompt: calibrate with whole numbers"
        " from 0 to 1000"
    )


def test_numbers_that_are_more_than_labels() -> None:
    table = torch.nn.Embedding(9, 4)

    def rows(label: Tensor) -> Tensor:
        return table(torch.cat([label, label])[1:])

    def compared(label: Tensor) -> Tensor:
        return table(label) * (label > 3)[:, None]

    rows.components = compared.components = {"table": table}  # type: ignore[attr-defined]
    program = trace_function(rows, torch.tensor([2]))
    assert [int(row[0]) for row in trajectories.requests(program, ["8", "0"], 2)] == [8, 0]
    with pytest.raises(DiffoptError) as error:
        trajectories.requests(trace_function(compared, torch.tensor([2])), ["8"], 1)
    assert str(error.value) == (
        "the program takes neither a prompt nor class labels to calibrate with (its inputs are:"
        " x0); leave the prompts out"
    )


def test_embeddings_and_labels_of_a_loop_of_ones_own() -> None:
    traced = Pipeline.parse("unroll,hoist").run(loops.program())
    rows = trajectories.requests(traced, ["4", "1"], 2, seed=3)
    for index, (text, label, noise) in enumerate(rows):
        random = torch.Generator().manual_seed(3 + index)
        assert torch.equal(text, traced.sample[0])
        assert label.tolist() == [[4, 1][index]]
        assert torch.equal(noise, torch.randn(1, 3, 8, generator=random))


def test_a_list_of_prompts() -> None:
    case = CASES["sd"]
    arguments = {**case.inputs(0), "prompt": ["a red cat", "a dog"], "num_inference_steps": 1}
    arguments["generator"] = [torch.Generator().manual_seed(k) for k in range(2)]
    traced = diffopt.trace(case.build(), **arguments)
    inputs = trajectories.requests(traced, ["one", "two", "three"], 2)
    assert equal(inputs[0], traced.prepare(prompt=["one", "two"], seed=0))
    assert equal(inputs[1], traced.prepare(prompt=["three", "one"], seed=2))


def test_a_prompt_of_another_length() -> None:
    case = CASES["sd"]
    traced = diffopt.trace(case.build(), **case.inputs(0) | {"num_inference_steps": 1})
    traced.sample[0] = traced.sample[0][:, :7]
    with pytest.raises(DiffoptError) as error:
        trajectories.requests(traced, ["two dogs"], 1)
    assert str(error.value) == (
        "the prompt 'two dogs' gives tokenizer_input_ids the shape [1, 16]; the program was traced"
        " with one of [1, 7]: calibrate with prompts of as many tokens"
    )


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b" \n\n", "has no prompts; write one a line"),
        (b"\xff\xfe\x00", "is no text file; write one prompt a line"),
    ],
)
def test_a_file_without_prompts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DiffoptError) as error:
        read_prompts(path)
    assert str(error.value) == f"{path}: {message}"


# Values


def test_steps_give_the_arguments_of_every_call(program: Program) -> None:
    seen: list[tuple[Tensor, ...]] = []
    gm = body(program)

    class Watch(fx.Interpreter):
        def call_module(self, target: object, args: tuple[Tensor, ...], kwargs: object) -> object:
            if target == loop(program)[0, 0].target:
                seen.append(args)
            return super().call_module(target, args, kwargs)  # type: ignore[arg-type]

    (inputs,) = trajectories.requests(program, None, 1, seed=4)
    Watch(program.root).run(*inputs)
    visits = list(trajectories.steps(program, loop(program), inputs))
    assert [(visit.step, visit.branch) for visit in visits] == [(0, 0), (1, 0), (2, 0)]
    for visit, expected in zip(visits, seen, strict=True):
        assert equal(visit.arguments, list(expected))
        assert len(visit.arguments) == len(g.placeholders(gm))
        assert visit.values == {}


def test_values_are_those_that_the_body_computes(program: Program) -> None:
    gm, (inputs,) = body(program), trajectories.requests(program, None, 1)
    nodes = inner(gm)
    assert nodes
    whole = g.extract_subgraph(gm, g.placeholders(gm), nodes, "whole")
    for visit in trajectories.steps(program, loop(program), inputs, nodes):
        expected = list(whole(*visit.arguments))
        assert equal([visit.values[n] for n in nodes], expected)
        alone = trajectories.values(gm, visit.arguments, nodes)
        assert alone.keys() == set(nodes)
        assert equal([alone[n] for n in nodes], expected)


def test_what_is_not_asked_for_is_neither_run_nor_kept(
    dit: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    held: list[int] = []

    def count(self: fx.Interpreter, target: object, args: object, kwargs: object) -> object:
        ran.append(target)
        held.append(sum(value is not None for value in self.env.values()))
        return function(self, target, args, kwargs)  # type: ignore[arg-type]

    function = fx.Interpreter.call_function
    gm, (inputs,) = body(dit), trajectories.requests(dit, None, 1)
    visit = next(trajectories.steps(dit, loop(dit), inputs))
    monkeypatch.setattr(fx.Interpreter, "call_function", count)
    node = inner(gm)[0]
    trajectories.values(gm, visit.arguments, [node])
    needed = [n for n in g.ancestors([node]) if n.op == "call_function"]
    assert len(ran) == len(needed) < sum(n.op == "call_function" for n in gm.graph.nodes)
    assert max(held) < len(needed) / 2


def test_a_loop_ends_a_run(sd: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []

    def call_module(self: Interpreter, target: object, args: Any, kwargs: Any) -> Any:
        called.append(target)
        return function(self, target, args, kwargs)

    function = Interpreter.call_module
    monkeypatch.setattr(Interpreter, "call_module", call_module)
    (inputs,) = trajectories.requests(sd, None, 1)
    assert len(list(trajectories.steps(sd, loop(sd), inputs))) == 3
    assert called
    assert "vae_decode" in sd.components
    assert "vae_decode" not in called


# Results on disk


def test_results_are_made_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluations = []

    def make() -> dict[str, Tensor]:
        evaluations.append(1)
        return {"a": torch.arange(4.0)[::2], "b": torch.tensor([1, 2])}

    for _ in range(2):
        results = trajectories.cached({"x": 1}, make)
        assert results["a"].tolist() == [0.0, 2.0]
        assert results["b"].tolist() == [1, 2]
    assert len(evaluations) == 1
    trajectories.cached({"x": 2}, make)
    assert len(evaluations) == 2
    assert disk_cache.get(disk_cache.key({"x": 1})) is None, "kernels are kept elsewhere"
    (path,) = cache.rglob(f"{disk_cache.key({'x': 1})}.zip")
    content = path.read_bytes()
    path.write_bytes(content.replace(bytes([2, 0, 0, 0, 0, 0, 0, 0]), bytes([3] + [0] * 7)))
    with caplog.at_level(logging.WARNING, "diffopt"):
        assert trajectories.cached({"x": 1}, make)["a"].tolist() == [0.0, 2.0]
    assert len(evaluations) == 3
    assert "damaged" in caplog.text
    assert "making it again" in caplog.text
    trajectories.cached({"x": 1}, make)
    assert len(evaluations) == 3


def test_identity_is_by_value(tmp_path: Path) -> None:
    traced = loops.program()
    inputs = trajectories.requests(traced, None, 2)
    identity = trajectories.identity(traced, inputs)
    traced.save(tmp_path / "a.program")
    again = Program.load(tmp_path / "a.program")
    assert again.fingerprint() != traced.fingerprint()
    assert trajectories.identity(again, trajectories.requests(again, None, 2)) == identity
    assert trajectories.identity(traced, trajectories.requests(traced, None, 2, seed=1)) != identity
    other = loops.program(steps=3)
    assert trajectories.identity(other, inputs) != identity
    weight = next(iter(again.weights().values()))
    weight.data.view(-1)[0] += 1
    assert trajectories.identity(again, inputs) != identity


def test_words_that_change_places_are_others() -> None:
    words = torch.arange(1000)
    swapped = words.clone()
    swapped[[3, 5]] = words[[5, 3]]
    traced = loops.program()
    assert trajectories.identity(traced, [[words]]) != trajectories.identity(traced, [[swapped]])
    built = [
        written(lambda b, x, table=table: b(aten.add.Tensor, x, table), randn(1000))
        for table in (words, swapped, words.clone())
    ]
    one, other, same = (trajectories.identity(program, []) for program in built)
    assert one == same != other


# Errors between steps


def test_errors_of_values_that_are_known() -> None:
    """One branch doubles its value in each step, the other one makes it four times as large."""

    def make(b: Builder, x: fx.Node) -> list[fx.Node]:
        low = high = x
        for _ in range(5):
            (low,), (high,) = b.call("net", low, torch.tensor(2.0)), b.call("net", high, factor)
        return [low, high]

    factor = torch.tensor(4.0)
    net = part(lambda b, x, factor: b(aten.mul.Tensor, x, factor), randn(3), factor)
    built = written(make, randn(3), net=net)
    call_tags.assign(built.root)
    calls = loop(built, "body")
    assert {branch for _, branch in calls} == {0, 1}
    node = g.outputs(net)[0]
    step_errors = trajectories.step_errors(
        built, calls, {"all": [node], "none": []}, [[randn(3)]], max_gap=3
    )
    for step in range(5):
        for back in range(4):
            expected = (1 - 2.0**-back + 1 - 4.0**-back) / 2 if back <= step else torch.inf
            assert float(step_errors["all"][step, back]) == pytest.approx(expected)
    assert step_errors["none"].isinf().all()
    assert step_errors["none"].shape == (5, 4)


def test_errors_are_means_over_requests_and_nodes(program: Program) -> None:
    gm, inputs = body(program), trajectories.requests(program, None, 2, seed=1)
    nodes = inner(gm)
    groups = {"one": nodes[:1], "all": nodes}
    told: list[tuple[str, float | None]] = []
    step_errors = trajectories.step_errors(
        program, loop(program), groups, inputs, max_gap=2, progress=lambda *row: told.append(row)
    )
    runs = [list(trajectories.steps(program, loop(program), row, nodes)) for row in inputs]
    for name, group in groups.items():
        pairs = [(run[2].values[n], run[0].values[n]) for run in runs for n in group]
        errors = [float((new - old).abs().sum() / new.abs().sum()) for new, old in pairs]
        assert float(step_errors[name][2, 2]) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        assert step_errors[name][1, 1] > 0
        assert step_errors[name][:, 0].tolist() == [0, 0, 0]
        assert step_errors[name][0, 1:].tolist() == [torch.inf, torch.inf]
    assert told[0] == ("calibrating: request 1 of 2, step 1", 0.0)
    assert told[-1] == ("calibrating: request 2 of 2, step 3", pytest.approx(5 / 6))


def test_errors_are_measured_once(dit: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, inputs = inner(body(dit)), trajectories.requests(dit, None, 1)
    runs = []
    measure = trajectories._step_errors
    monkeypatch.setattr(trajectories, "_step_errors", lambda *a: (runs.append(1), measure(*a))[1])
    first = trajectories.step_errors(dit, loop(dit), {"a": nodes}, inputs)
    copy = dit.clone()  # other nodes and graphs of the same program
    again = trajectories.step_errors(copy, loop(copy), {"a": inner(body(copy))}, inputs)
    assert torch.equal(first["a"], again["a"])
    assert len(runs) == 1
    trajectories.step_errors(dit, loop(dit), {"b": nodes}, inputs)
    trajectories.step_errors(dit, loop(dit), {"a": nodes[:1]}, inputs)
    trajectories.step_errors(dit, loop(dit), {"a": nodes}, inputs, max_gap=1)
    trajectories.step_errors(
        dit, loop(dit), {"a": nodes}, trajectories.requests(dit, None, 1, seed=1)
    )
    assert len(runs) == 5


def test_values_that_are_all_zero_do_not_differ() -> None:
    assert trajectories._relative(torch.zeros(3), torch.zeros(3)) == 0.0
    assert trajectories._relative(torch.zeros(3), torch.ones(3)) == torch.inf


# Prompts for passes


@dataclass(frozen=True)
class Ask(Pass):
    """Keep what there is to calibrate with, and crash if there is nothing."""

    name = "ask"
    exact = False

    def run(self, program: Program, ctx: Context) -> None:
        ctx.note("asked", [list(ctx.prompts), ctx.seed])
        if "crash" in ctx.prompts:
            raise ZeroDivisionError


def test_passes_get_the_prompts(tmp_path: Path) -> None:
    program = trace_function(lambda x: x * 2, randn(3))
    pipeline = Pipeline((Ask(),))
    assert pipeline.run(program).history[0]["notes"] == {"asked": [[], 0]}
    result = pipeline.run(program, prompts=["a", "b"], seed=3)
    assert result.history[0]["notes"] == {"asked": [["a", "b"], 3]}
    _, result = bisect(pipeline, program, 0.1, prompts=["c"])
    assert result.history[0]["notes"] == {"asked": [["c"], 0]}
    with pytest.raises(ZeroDivisionError):
        pipeline.run(program, prompts=["a", "crash"], seed=4, reproducer=tmp_path)
    stem = tmp_path / "reproduce-ask"
    assert stem.with_suffix(".sh").read_text() == (
        f"diffopt optimize {stem}.program --passes 'ask' --seed 4 --calibrate {stem}.txt"
        f" -o {stem}-out.program\n"
    )
    assert read_prompts(stem.with_suffix(".txt")) == ["a", "crash"]


@pytest.mark.parametrize("more", [[], ["--bisect", "0.1"]])
def test_the_command_line_reads_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trace_function(lambda x: x * 2, randn(3)).save("a.program")
    Path("prompts.txt").write_text("a cat\na dog\n")
    results = []
    run = Pipeline.run
    monkeypatch.setattr(
        Pipeline, "run", lambda *args, **options: results.append(options) or run(*args, **options)
    )
    words = ["optimize", "a.program", "-p", "", "--seed", "2", "--calibrate", "prompts.txt"]
    monkeypatch.setattr(sys, "argv", ["diffopt", *words, *more, "-o", "b.program"])
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert not exit.value.code
    assert [(o["prompts"], o["seed"]) for o in results] == [(["a cat", "a dog"], 2)]


def test_prompts_are_read_before_anything_is_traced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["optimize", "none.program", "--calibrate", "none.txt", "-o", "b.program"]
    monkeypatch.setattr(sys, "argv", ["diffopt", *words])
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert exit.value.code == 2
    wanted = "none.txt: cannot be read: No such file or directory"
    assert capsys.readouterr().err == f"diffopt: error: {wanted}\n"
