"""Passes and pipelines of them: what is checked, recorded and refused."""

import json
import math
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from diffopt import plugins
from diffopt.capture.trace import trace_function
from diffopt.cli import output as show
from diffopt.core import Context, Pass, Pipeline, Record, option, pass_manager
from diffopt.core.equivalence import difference
from diffopt.core.instruments import Dump, PrintAfter, PrintChanged, bisect
from diffopt.errors import DiffoptError, ToleranceError, VerifyError
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.testing import check_pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Nothing(Pass):
    """Look at every node and change none."""

    name = "nothing"

    def run(self, program: Program, ctx: Context) -> None:
        for node in program.root.graph.find_nodes(op="call_function", target=aten.relu.default):
            ctx.skip(node, "is needed")
        ctx.note("seen", len(program.root.graph.nodes))


@dataclass(frozen=True)
class Undouble(Pass):
    """Drop the second of two relus."""

    name = "undouble"

    def run(self, program: Program, ctx: Context) -> None:
        for node in program.root.graph.find_nodes(op="call_function", target=aten.relu.default):
            if node.args[0].target is aten.relu.default:
                node.replace_all_uses_with(node.args[0])


@dataclass(frozen=True)
class Unrelu(Undouble):
    """Drop every relu, though that changes the result."""

    name = "unrelu"

    def run(self, program: Program, ctx: Context) -> None:
        for node in program.root.graph.find_nodes(op="call_function", target=aten.relu.default):
            node.replace_all_uses_with(node.args[0])


@dataclass(frozen=True)
class Round(Unrelu):
    """Drop every relu and say that the result is only near."""

    name = "round"
    exact = False
    budget: float | None = option(None, "relative error that is allowed")


@dataclass(frozen=True)
class Loose(Unrelu):
    """Drop every relu with a tolerance that covers it."""

    name = "loose"
    atol = 10.0
    tolerance_reason = "the test wants it"


@dataclass(frozen=True)
class Scale(Pass):
    """Change a weight and no graph."""

    name = "scale"
    exact = False
    factor: float = option(2.0, "what to multiply by")

    def run(self, program: Program, ctx: Context) -> None:
        for name, weight in list(g.named_tensors(program.root)):
            setattr(program.root, name, weight * self.factor)


@dataclass(frozen=True)
class Crash(Pass):
    """Break half way."""

    name = "crash"

    def run(self, program: Program, ctx: Context) -> None:
        g.set_outputs(program.root, [g.placeholders(program.root)[0]])
        raise ZeroDivisionError("half way")


@dataclass(frozen=True)
class Alias(Pass):
    """Return the input itself."""

    name = "alias"

    def run(self, program: Program, ctx: Context) -> None:
        g.set_outputs(program.root, [g.placeholders(program.root)[0]])


@dataclass(frozen=True)
class Mistype(Pass):
    """Record a wrong shape."""

    name = "mistype"

    def run(self, program: Program, ctx: Context) -> None:
        node = next(
            iter(program.root.graph.find_nodes(op="call_function", target=aten.relu.default))
        )
        node.meta["val"] = g.fake(torch.zeros(7))


X = torch.tensor([[-1.0, 2.0, 3.0]])


def two_relus(x: torch.Tensor) -> torch.Tensor:
    return x.relu().relu() + 1


def run(step: Pass, program: Program | None = None, **options: object) -> tuple[Program, Record]:
    result = Pipeline((step,)).run(program or trace_function(two_relus, X), **options)
    return result, Record.from_json(result.history[-1])


def test_a_pass_that_changes_something() -> None:
    text, record = check_pass(Undouble(), two_relus, X)
    assert text.splitlines()[1:] == [
        "%1: float32[1,3] = aten.relu(%x0)",
        "%2: float32[1,3] = aten.add.Tensor(%1, 1)",
        "return %2",
    ]
    assert record.changed
    assert record.exact
    assert (record.max_abs, record.relative, record.drift, record.tolerance) == (0, 0, 0, "")
    assert (record.before.nodes, record.after.nodes) == (5, 4)


def test_a_pass_that_changes_nothing() -> None:
    _, record = check_pass(Nothing(), two_relus, X)
    assert not record.changed
    assert record.skipped == ["relu_default: is needed", "relu_default_1: is needed"]
    assert record.notes == {"seen": 5}
    assert record.before == record.after


def test_the_program_given_is_never_changed() -> None:
    program = trace_function(two_relus, X)
    before = str(program), program.fingerprint(), list(program.history)
    result, _ = run(Undouble(), program)
    with pytest.raises(ZeroDivisionError):
        run(Crash(), program)
    assert (str(program), program.fingerprint(), program.history) == before
    assert str(result) != str(program)
    assert Pipeline().run(program) is not program


def test_records_survive_as_json() -> None:
    result, record = run(Undouble())
    assert Record.from_json(json.loads(json.dumps(result.history[-1]))) == record


def test_changed_weights_count_as_a_change() -> None:
    program = trace_function(torch.nn.Linear(3, 2), X)
    _, record = run(Scale(), program)
    assert record.changed
    assert record.relative == pytest.approx(1.0)
    assert (record.before.parameters, record.before.bytes) == (8, 32)
    assert record.before.flops == 2 * 3 * 2


def test_an_exact_pass_that_is_not_exact_fails() -> None:
    with pytest.raises(ToleranceError) as caught:
        run(Unrelu())
    assert str(caught.value) == ("unrelu is exact and changed the output by 1 (allowed: nothing)")
    assert caught.value.__notes__ == ["in pass unrelu (number 1 of unrelu)"]


def test_a_stated_tolerance_is_recorded() -> None:
    _, record = run(Loose())
    assert record.max_abs == 1
    assert record.tolerance == "atol 10, rtol 0: the test wants it"


def test_a_tolerance_needs_a_reason() -> None:
    with pytest.raises(TypeError, match="Vague has a tolerance and no tolerance_reason"):
        type("Vague", (Pass,), {"rtol": 0.1})


def test_an_approximate_pass_is_measured() -> None:
    _, record = run(Round())
    assert not record.exact
    assert record.max_abs == 1
    assert record.relative == pytest.approx(1 / math.sqrt(1 + 9 + 16))


@pytest.mark.parametrize(
    ("step", "budget"), [(Round(-0.1), None), (Round(), -0.1), (Round(), float("nan"))]
)
def test_a_budget_that_nothing_is_within(step: Round, budget: float | None) -> None:
    who = "round" if budget is None else "the pipeline"
    with pytest.raises(DiffoptError, match=f"{who} has budget=.*; write the largest relative"):
        run(step, budget=budget)


@pytest.mark.parametrize(
    ("step", "budget"), [(Round(), 0.1), (Round(0.1), None), (Round(0.1), 1.0)]
)
def test_a_budget_makes_it_pass_or_fail(step: Round, budget: float | None) -> None:
    with pytest.raises(ToleranceError) as caught:
        run(step, budget=budget)
    assert str(caught.value) == f"{step} added a relative error of 0.196, its budget is 0.1"
    run(step, budget=budget, enforce=False)
    run(Round(), budget=0.2)


def test_outputs_that_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what takes hours to run: passes are done, and nothing is said of their errors."""
    program = trace_function(two_relus, X)
    with monkeypatch.context() as watched:
        watched.setattr(Program, "run", None)
        result = Pipeline((Unrelu(), Nothing())).run(program, compare=False)
    records = [Record.from_json(row) for row in json.loads(json.dumps(result.history))]
    assert [(r.max_abs, r.relative, r.drift) for r in records] == [(None, None, None)] * 2
    assert [r.changed for r in records] == [True, False]
    show.records_table(records, timing=False, stats=True)
    with pytest.raises(DiffoptError) as caught:
        Pipeline((Round(0.1),)).run(program, compare=False)
    assert str(caught.value) == (
        f"{Round(0.1)} has a budget, and outputs are not compared: leave one of both out"
    )
    broken = Pipeline((Mistype(),))
    with pytest.raises(VerifyError, match="recorded as"):
        broken.run(program, compare=False)


def test_a_new_alias_fails() -> None:
    positive = trace_function(lambda x: x * 1, X)
    with pytest.raises(VerifyError, match="output 0 shares memory with input 0: the caller may"):
        run(Alias(), positive)
    run(Alias(), positive, verify=False)


def test_a_broken_program_fails_and_names_the_pass() -> None:
    with pytest.raises(VerifyError, match="recorded as") as caught:
        Pipeline((Nothing(), Mistype())).run(trace_function(two_relus, X))
    assert caught.value.__notes__ == ["in pass mistype (number 2 of nothing,mistype)"]


def test_a_crash_leaves_a_reproducer(tmp_path: Path) -> None:
    program = trace_function(two_relus, X)
    with pytest.raises(ZeroDivisionError) as caught:
        Pipeline((Undouble(), Crash(), Nothing())).run(program, reproducer=tmp_path)
    stem = tmp_path / "reproduce-crash"
    command = f"diffopt optimize {stem}.program --passes 'crash,nothing' -o {stem}-out.program"
    assert caught.value.__notes__[1] == f"to see it again: {command}  (also in {stem}.sh)"
    assert Path(f"{stem}.sh").read_text() == command + "\n"
    saved = Program.load(f"{stem}.program")
    assert len(saved.history) == 1
    assert torch.equal(saved.run([X])[0], program.run([X])[0])


def test_an_error_of_the_users_leaves_none(tmp_path: Path) -> None:
    class Refuse(Crash):
        name = "refuse"

        def run(self, program: Program, ctx: Context) -> None:
            raise DiffoptError("give steps=")

    with pytest.raises(DiffoptError):
        run(Refuse(), reproducer=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_reproducer_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ZeroDivisionError) as caught:
        run(Crash(), reproducer=tmp_path / "file")
    assert caught.value.__notes__[1].startswith("no reproducer could be written: ")


def test_bisect_finds_the_first_pass_beyond_the_bound() -> None:
    pipeline = Pipeline((Undouble(), Unrelu(), Nothing()))
    program = trace_function(two_relus, X)
    culprit, result = bisect(pipeline, program, 0.01)
    assert culprit is not None
    assert culprit.text == "unrelu"
    assert len(result.history) == 3
    assert bisect(pipeline, program, 0.5)[0] is None


def test_drift_adds_up() -> None:
    program = trace_function(torch.nn.Linear(3, 2, bias=False), X)
    result = Pipeline((Scale(), Scale())).run(program)
    assert [row["drift"] for row in result.history] == pytest.approx([1, 3])
    assert [row["relative"] for row in result.history] == pytest.approx([1, 1])


def test_printing(tmp_path: Path) -> None:
    written: list[str] = []
    instruments = [
        PrintAfter(written.append, frozenset({"nothing"})),
        PrintChanged(written.append),
        Dump(tmp_path / "dump"),
    ]
    program = trace_function(two_relus, X)
    result = Pipeline((Undouble(), Nothing())).run(program, instruments=instruments)
    diff, after, nothing = written
    assert diff.startswith("--- before undouble\n+++ after undouble\n@@ ")
    assert "\n-" in diff
    assert after == f"# after nothing\n{result}\n"
    assert nothing == "# nothing changed nothing\n"
    names = [path.name for path in sorted((tmp_path / "dump").iterdir())]
    assert names == ["01-undouble.program", "02-nothing.program"]


def test_progress_is_told() -> None:
    told: list[tuple[str, float | None]] = []
    program = trace_function(two_relus, X)
    Pipeline((Undouble(), Nothing())).run(program, progress=lambda *each: told.append(each))
    assert told == [("undouble", 0.0), ("nothing", 0.5)]


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], (0, 0)),
        ([1.0, math.nan, math.inf], [1.0, math.nan, math.inf], (0, 0)),
        ([3.0, 0.0], [3.0, 4.0], (4, 0.8)),
        ([math.nan], [1.0], (math.inf, math.inf)),
        ([math.inf], [1.0], (math.inf, math.inf)),
        ([1.0], [math.inf], (math.inf, math.inf)),
        ([1.0], [0.0], (1, math.inf)),
        ([1.0, 2.0], [1.0], (math.inf, math.inf)),
        ([], [], (0, 0)),
    ],
)
def test_difference(new: list[float], old: list[float], expected: tuple[float, float]) -> None:
    assert difference([torch.tensor(new)], [torch.tensor(old)]) == pytest.approx(expected)


def test_difference_of_other_types() -> None:
    x = torch.tensor([1, 2])
    assert difference([x], [x.float()]) == (math.inf, math.inf)
    assert difference([x], [x, x]) == (math.inf, math.inf)
    assert difference([x > 1], [x > 0]) == pytest.approx((1, math.sqrt(0.5)))
    assert difference([torch.tensor([1j])], [torch.tensor([1j + 1])])[0] == 1


def test_generators_of_a_context_are_alike() -> None:
    ctx = Context(seed=3)
    assert torch.equal(
        torch.rand(3, generator=ctx.generator()), torch.rand(3, generator=ctx.generator())
    )


# Discovery


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points of packages that are not installed."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    monkeypatch.setattr(pass_manager, "_sources", pass_manager._sources.__wrapped__)
    return entries


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "diffopt.passes")


def test_a_pass_of_another_package_is_found(
    plugged: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_pass.py").write_text(
        "from diffopt.core import Pass\nclass Theirs(Pass):\n    name = 'theirs'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugged.append(entry("theirs", "their_pass:Theirs"))
    assert "theirs" in pass_manager.pass_names()
    assert str(Pipeline.parse("theirs")) == "theirs"
    plugged.append(entry("other", "their_pass:Theirs"))
    with pytest.raises(DiffoptError, match="their_pass:Theirs is not a Pass named 'other'"):
        Pipeline.parse("other")


def test_two_passes_of_one_name_are_an_error(plugged: list[EntryPoint]) -> None:
    plugged += [entry("theirs", "one:Theirs"), entry("theirs", "two:Theirs")]
    with pytest.raises(DiffoptError) as caught:
        pass_manager.pass_names()
    assert str(caught.value) == (
        "two passes are called 'theirs': one:Theirs and two:Theirs; uninstall or rename one"
    )


def test_an_unknown_pass_is_shown_with_a_suggestion(plugged: list[EntryPoint]) -> None:
    plugged.append(entry("sharpen", "one:Sharpen"))
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse("sharpn(1)")
    assert str(caught.value) == (
        "there is no pass 'sharpn'; did you mean 'sharpen'?\n  sharpn(1)\n  ^^^^^^"
    )
