"""`recover`: a damaged UNet, transformer and sampling loop do again what they did."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffopt.analysis.scope import choose_scope
from diffopt.core import Context, Pass, Pipeline, Record, find_pass
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import requests
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import stored_tensor
from diffopt.ir.program import Program
from diffopt.storage import disk_cache
from diffopt.training import distill
from diffopt.transforms import sparsity_2_4
from tests import loops
from tests.zoo import traced

BODY = {"sd": "unet", "dit": "transformer", "loop": "denoiser"}


@dataclass(frozen=True)
class Halve(Pass):
    """Let layers of the loop have half of their singular values."""

    exact = False

    def run(self, program: Program, ctx: Context) -> None:
        replacements: dict[int, torch.nn.Parameter] = {}
        for name in choose_scope(program, ("loop",)).loop:
            gm = program.components[name]
            for layer in qdq.layers(gm):
                weight = stored_tensor(gm, layer.weight)
                assert weight is not None
                u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
                s[len(s) // 2 :] = 0
                new = (u * s @ v).reshape(weight.shape)
                new = replacements.setdefault(
                    id(weight), torch.nn.Parameter(new, requires_grad=False)
                )
                gm._parameters[str(layer.weight.target)] = new


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))


@cache
def captured(name: str) -> Program:
    return loops.program(steps=4) if name == "loop" else traced(name, num_inference_steps=4)


@cache
def prepared(name: str, text: str = "unroll,hoist") -> Program:
    return Pipeline.parse(text).run(captured(name))


def recover(**options: Any) -> Pass:
    return find_pass("recover")(**{"samples": 8, "steps": 40, **options})


def halved(name: str, text: str = "unroll,hoist", **options: Any) -> tuple[Program, Record]:
    """Return a program that was damaged and recovered, and what `recover` said."""
    program = Pipeline((Halve(), recover(**options))).run(prepared(name, text))
    return program, Record.from_json(program.history[-1])


def errors(record: Record) -> tuple[float, float]:
    held_out = record.notes["held-out error"]
    return held_out["before"], held_out["after"]


def values(program: Program) -> list[torch.Tensor]:
    bodies = program.graphs.values()
    return [t for gm in bodies for _, t in sorted(g.named_tensors(gm), key=lambda row: row[0])]


def same(one: Program, other: Program) -> bool:
    pairs = zip(values(one), values(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# What it does


@pytest.mark.parametrize("name", ["sd", "dit", "loop"])
def test_less_error_with_the_same_graph(name: str) -> None:
    before = prepared(name)
    kept = [t.clone() for t in values(before)]
    program, record = halved(name, steps=20, lr=3e-3, samples=4)
    first, last = errors(record)
    assert last < 0.75 * first
    assert record.notes["steps"]["kept"] > 0
    damaged = Record.from_json(program.history[-2])
    assert record.drift < damaged.drift
    assert record.after == record.before  # nodes, parameters, FLOPs
    assert all(torch.equal(a, b) for a, b in zip(values(before), kept, strict=True))
    assert not any(t.requires_grad for t in values(program))


@pytest.mark.parametrize(("steps", "count"), [(1, 16), (24, 24)])
def test_there_are_as_many_requests_as_calls_are_drawn(steps: int, count: int) -> None:
    """In batches of 4, of 4 calls each: 16 at least."""
    _, record = halved("loop", steps=steps, samples=None)
    assert record.notes["requests"] == count


def test_blocks_are_matched() -> None:
    program, record = halved("dit", steps=3, samples=4)
    assert record.notes["blocks matched"] > 1
    other, record = halved("dit", steps=3, samples=4, features=0.0)
    assert record.notes["blocks matched"] == 0
    assert record.changed
    assert not same(program, other)


def test_weights_outside_of_the_loop_stay() -> None:
    before = prepared("sd")
    program, record = halved("sd", steps=2, lr=3e-3, samples=2)
    assert record.changed
    for name, gm in before.components.items():
        recovered = {key: t for key, t in g.named_tensors(program.components[name])}
        changed = [k for k, t in g.named_tensors(gm) if not torch.equal(t, recovered[k])]
        assert bool(changed) == (name == "unet")


def test_shared_weights_stay_shared() -> None:
    """Two bodies of `cache` read the same weights, before and after."""
    text = "unroll,hoist,cache(fora,interval=2)"
    program = Pipeline((Halve(), recover(steps=10))).run(prepared("dit", text))
    assert Record.from_json(program.history[-1]).changed
    names = choose_scope(program, ("loop",)).loop
    assert len(names) > 1
    ids = [{id(t) for _, t in g.named_tensors(program.components[n])} for n in names]
    assert ids[0] & ids[1]
    assert len(program.weights()) == len(prepared("dit", text).weights())


@pytest.mark.parametrize("then", ["", "quantize(int8,ends=true)"])
def test_sparse_weights_stay_sparse(then: str) -> None:
    before = prepared("loop", "unroll")
    sparse = before.clone()
    sparsity_2_4.sparsify(sparse, ["denoiser"], lambda name, module: True, lambda path, why: None)
    damaged = Pipeline.parse(then).run(sparse) if then else sparse
    recovered = damaged.clone()
    inputs, settings = requests(before, (), 4), distill.Settings(steps=20, lr=1e-3)
    outcome = distill.recover(distill.Task(recovered, before, inputs, ["denoiser"]), settings)
    assert outcome.after < 0.9 * outcome.before
    left, wanted = (
        [layer.node.name for layer in sparsity_2_4.sparse_layers(p.components["denoiser"])]
        for p in (recovered, damaged)
    )
    assert len(wanted) > 2
    assert left == wanted


@pytest.mark.parametrize("how", ["int4", "int8", "fp8,activations=rows", "int4,rank=2"])
def test_low_bits_stay_low(how: str) -> None:
    """In a program of few bits, numbers and scales change, and nothing gets wider."""
    pipeline = Pipeline((*Pipeline.parse(f"quantize({how},ends=true)").passes, recover(lr=1e-3)))
    program = pipeline.run(prepared("loop", "unroll"))
    record = Record.from_json(program.history[-1])
    first, last = errors(record)
    assert last < 0.9 * first
    assert record.after == record.before
    gm = program.components["denoiser"]
    before = Pipeline(pipeline.passes[:1]).run(prepared("loop", "unroll")).components["denoiser"]
    changed = {
        t.dtype
        for (_, t), (_, old) in zip(g.named_tensors(gm), g.named_tensors(before), strict=True)
        if not torch.equal(t.float(), old.float())
    }
    packed = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    assert packed[how[:4].strip(",")] in changed


def test_what_cache_leaves_out_is_made_up_for() -> None:
    pipeline = Pipeline((*Pipeline.parse("cache(fora,interval=2)").passes, recover()))
    record = Record.from_json(pipeline.run(prepared("dit")).history[-1])
    first, last = errors(record)
    assert last < first


@pytest.mark.parametrize(
    ("name", "text", "lr"),
    [("sd", "prune(channels,ratio=0.3,round-to=1)", 5e-3), ("dit", "prune(mlp,ratio=0.5)", 5e-4)],
)
def test_what_is_left_by_prune(name: str, text: str, lr: float) -> None:
    """Blocks have fewer channels, and are matched with those of the reference that are left."""
    pipeline = Pipeline((*Pipeline.parse(text).passes, recover(steps=10, lr=lr, samples=4)))
    program = pipeline.run(prepared(name))
    record = Record.from_json(program.history[-1])
    first, last = errors(record)
    assert last < 0.9 * first
    assert record.notes["blocks matched"] > 0
    assert record.drift < Record.from_json(program.history[-2]).drift


def test_own_latents_and_averages() -> None:
    _, record = halved("loop", own=0.5, ema=0.9)
    first, last = errors(record)
    assert last < 0.8 * first


def test_in_one_text_and_from_a_file(tmp_path: Path) -> None:
    """The reference at hand is the program before the first approximate pass."""
    options = "steps=10,samples=4"
    whole = Pipeline.parse(f"unroll,hoist,quantize(int4),simplify,recover({options})")
    one = whole.run(captured("loop"))
    prepared("loop").save(tmp_path / "before.program")
    Pipeline(whole.passes[:-1]).run(captured("loop")).save(tmp_path / "after.program")
    text = f'recover({options},reference="{tmp_path / "before.program"}")'
    other = Pipeline.parse(text).run(Program.load(tmp_path / "after.program"))
    assert Record.from_json(one.history[-1]).changed
    assert same(one, other)


def test_exact_passes_follow() -> None:
    """`fuse` and `simplify` check that they change nothing, here of a recovered program."""
    text = "unroll,quantize(int4),recover(steps=10,samples=4),hoist,fuse,simplify"
    program = Pipeline.parse(text).run(captured("loop"))
    assert [Record.from_json(row).exact for row in program.history[3:]] == [True] * 3


def test_again_after_more_damage() -> None:
    """The reference stays the one from before the first damage."""
    passes = (Halve(), recover(steps=20), *Pipeline.parse("quantize(int4)").passes, recover())
    program = Pipeline(passes).run(prepared("loop"))
    first, last = errors(Record.from_json(program.history[-1]))
    assert last < first
    _, halfway = errors(Record.from_json(program.history[-3]))
    assert first > halfway


# What it does not do


def test_modules_to_keep() -> None:
    program, _ = halved("loop", "unroll", keep=("out", "query"), steps=10)
    damaged = Pipeline((Halve(),)).run(prepared("loop", "unroll")).components["denoiser"]
    pairs = zip(
        g.named_tensors(program.components["denoiser"]), g.named_tensors(damaged), strict=True
    )
    changed = {name for (name, new), (_, old) in pairs if not torch.equal(new, old)}
    assert changed
    assert not any(name.startswith(("out", "query")) for name in changed)


def test_no_budget_is_spent() -> None:
    """The damage is allowed 50 %, and taking some of it away changes more than nothing."""
    pipeline = Pipeline((Halve(), recover(steps=10, lr=1e-2)))
    record = Record.from_json(pipeline.run(prepared("loop"), enforce=False).history[-1])
    assert record.relative > 1e-3
    text = "quantize(int4,ends=true,budget=0.5),recover(steps=10,samples=4)"
    result = Pipeline.parse(text).run(prepared("loop", "unroll"), budget=1e-9)
    assert Record.from_json(result.history[-1]).relative > 1e-9


def test_it_never_ends_worse() -> None:
    """With a rate that is much too large the first state is the best."""
    program, record = halved("loop", lr=1.0, steps=10)
    first, last = errors(record)
    assert first == last
    assert not record.changed
    assert record.skipped == ["denoiser: no step has made held-out calls better: try another lr"]
    assert same(program, Pipeline((Halve(),)).run(prepared("loop")))


def test_the_best_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fifth step on all is spoiled."""
    monkeypatch.setattr(distill, "_rate_factor", lambda step, steps: 1.0 if step < 5 else 1e4)
    before = prepared("loop")
    program = Pipeline((Halve(),)).run(before)
    inputs = requests(program, (), 4)
    settings = distill.Settings(steps=10)
    outcome = distill.recover(distill.Task(program, before, inputs, ["denoiser"]), settings)
    assert 0 < outcome.best < 6
    assert outcome.after == min(outcome.errors.values()) < outcome.before
    again = distill.recover(distill.Task(program, before, inputs, ["denoiser"]), settings)
    assert again.before == pytest.approx(outcome.after, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    before = prepared("loop")
    program = Pipeline((Halve(),)).run(before)
    settings = distill.Settings(steps=10, lr=1e30)
    inputs = requests(program, (), 8)
    outcome = distill.recover(distill.Task(program, before, inputs, ["denoiser"]), settings)
    assert outcome.steps < 10
    assert outcome.stopped.startswith(f"the loss is not finite in step {outcome.steps + 1} (of re")
    assert "denoiser, step" in outcome.stopped
    assert outcome.after <= outcome.before
    assert all(bool(t.isfinite().all()) for t in values(program) if t.is_floating_point())


# Killed


CHILD = """
import os, signal, sys
from diffopt.core import Pipeline
from diffopt.ir.program import Program

program, text, step = Program.load(sys.argv[1]), sys.argv[2], sys.argv[3]

def progress(what, fraction):
    if what.startswith(f"recovering: step {step},"):
        os.kill(os.getpid(), signal.SIGKILL)

Pipeline.parse(text).run(program, progress=progress)
"""


def test_a_killed_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    prepared("loop").save(tmp_path / "before.program")
    damaged = Pipeline((Halve(), *Pipeline.parse("quantize(int8)").passes)).run(prepared("loop"))
    damaged.save(tmp_path / "after.program")
    text = (
        f'recover(steps=20,samples=4,ema=0.5,own=0.4,every=0,reference="{tmp_path}/before.program"'
        ',checkpoint="{}")'
    )
    whole, broken = text.format(tmp_path / "whole"), text.format(tmp_path / "broken")
    for step in (3, 12):
        command = [sys.executable, "-c", CHILD, tmp_path / "after.program", broken, str(step)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list((tmp_path / "broken").glob("recover-*.zip"))) == 1
    seen: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = Pipeline.parse(broken).run(
            Program.load(tmp_path / "after.program"), progress=lambda what, _: seen.append(what)
        )
        straight = Pipeline.parse(whole).run(Program.load(tmp_path / "after.program"))
    finally:
        torch.set_num_threads(threads)
    assert next(w for w in seen if w.startswith("recovering")).startswith("recovering: step 12,")
    assert Record.from_json(straight.history[-1]).changed
    assert same(resumed, straight)
    notes = [Record.from_json(p.history[-1]).notes for p in (resumed, straight)]
    assert notes[0]["errors"] == notes[1]["errors"]

    # What follows a training may be interrupted, too: it is not done again.
    seen.clear()
    again = Pipeline.parse(broken).run(
        Program.load(tmp_path / "after.program"), progress=lambda what, _: seen.append(what)
    )
    assert not [what for what in seen if what.startswith("recovering")]
    assert same(again, straight)
    assert Record.from_json(again.history[-1]).notes["errors"] == notes[0]["errors"]


def test_a_broken_checkpoint_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def stop(what: str, fraction: float | None) -> None:
        if what.startswith("recovering: step 3,"):
            raise Killed

    pipeline = Pipeline((Halve(), recover(steps=5, every=0.0)))
    with pytest.raises(Killed):
        pipeline.run(prepared("loop"), progress=stop)
    (path,) = (disk_cache.folder() / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    first = pipeline.run(prepared("loop"))
    assert "truncated" in caplog.text
    assert same(first, pipeline.run(prepared("loop")))


# Several processes


def test_accelerate_in_one_process_changes_nothing() -> None:
    pytest.importorskip("accelerate")
    plain, _ = halved("loop", steps=6)
    other, record = halved("loop", steps=6, accelerate=True)
    assert record.changed
    assert same(plain, other)


SHARE = """
import sys
from diffopt.core import Pipeline
from diffopt.ir.program import Program
from diffopt.training.distributed import Workers

workers = Workers(accelerate=True)
assert workers.count == 2
result = Pipeline.parse(sys.argv[2]).run(Program.load(sys.argv[1]))
result.save(f"{sys.argv[3]}/{workers.rank}.program")
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    prepared("loop").save(tmp_path / "before.program")
    Pipeline((Halve(),)).run(prepared("loop")).save(tmp_path / "after.program")
    text = f'recover(steps=6,samples=4,reference="{tmp_path}/before.program"'
    (tmp_path / "share.py").write_text(SHARE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [
        tmp_path / "share.py",
        tmp_path / "after.program",
        f"{text},accelerate=true)",
        tmp_path,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, *launch, *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plain = Pipeline.parse(f"{text})").run(Program.load(tmp_path / "after.program"))
    both = [Program.load(tmp_path / f"{rank}.program") for rank in (0, 1)]
    assert same(*both)
    step_errors = [Record.from_json(p.history[-1]).notes["errors"] for p in (*both, plain)]
    assert step_errors[0] == step_errors[1]
    for step, error in step_errors[2].items():
        assert step_errors[0][step] == pytest.approx(error, rel=1e-4)  # sums in another order


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recover(steps=0)", "recover wants steps >= 1 and batch >= 1"),
        ("recover(lr=0)", "recover wants an lr above 0 and of at most 1, such as 0.0003"),
        ("recover(clip=0)", "recover wants clip > 0"),
        ("recover(samples=1)", "recover wants samples >= 2: one of them at least is held out"),
        ("recover(own=2)", "recover wants own from 0 to 1, and ema from 0 to below 1"),
        ("recover(features=-1)", "recover wants features >= 0 and every >= 0"),
    ],
)
def test_options_out_of_range(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as error:
        Pipeline.parse(text)
    assert error.value.message == message


def refused(pipeline: Pipeline, program: Program) -> str:
    with pytest.raises(DiffoptError) as error:
        pipeline.run(program)
    return error.value.message


def test_nothing_to_train_against() -> None:
    assert refused(Pipeline.parse("unroll,recover"), captured("loop")) == (
        "recover has nothing to train against: no pass before it has approximated the program. Put"
        " it behind one, as in unroll,prune(channels),recover, or name the program from before, as"
        " in recover(reference=FILE.program)"
    )


def test_a_reference_of_another_pipeline(tmp_path: Path) -> None:
    prepared("dit").save(tmp_path / "other.program")
    message = refused(
        Pipeline((recover(reference=str(tmp_path / "other.program")),)), captured("loop")
    )
    assert message.startswith("the reference is of another pipeline: it takes ")
    assert "float32[1,2,8]" in message
    missing = str(tmp_path / "none.program")
    assert refused(Pipeline((recover(reference=missing),)), captured("loop")) == (
        f"{missing}: no such file"
    )


def test_a_reference_with_other_steps(tmp_path: Path) -> None:
    loops.program(steps=3).save(tmp_path / "three.program")
    message = refused(
        Pipeline((recover(reference=str(tmp_path / "three.program")),)), captured("loop")
    )
    assert message == (
        "the reference has no call of denoiser, step 3, branch 0: it is of another sampling loop"
    )


def test_calls_that_mean_other_things() -> None:
    """`fuse` puts guidance and the sampler's step into the body."""
    message = refused(
        Pipeline((Halve(), *Pipeline.parse("fuse").passes, recover())), prepared("sd")
    )
    assert message.endswith(
        ": recover where both have the same calls, such as in front of `fuse`"
    ) or message.endswith("their calls mean different things; recover in front of `fuse`")


def test_nothing_trainable() -> None:
    assert refused(Pipeline((Halve(), recover(keep=("*",)))), prepared("loop")) == (
        "recover has nothing to train in denoiser: no weight is left"
    )


def test_a_pattern_that_matches_nothing() -> None:
    message = refused(Pipeline((Halve(), recover(keep=("quary",)))), prepared("loop"))
    assert message == "no module of denoiser matches 'quary'; did you mean 'query'?"


def test_damage_beyond_recovery() -> None:
    @dataclass(frozen=True)
    class Spoil(Halve):
        """Let weights be not finite."""

        def run(self, program: Program, ctx: Context) -> None:
            gm = program.components["denoiser"]
            for key, tensor in list(gm._parameters.items()):
                new = torch.full_like(tensor, math.nan)
                gm._parameters[key] = torch.nn.Parameter(new, requires_grad=False)

    with pytest.raises(DiffoptError) as error:
        Pipeline((Spoil(), recover())).run(prepared("loop"), enforce=False)
    assert error.value.message.startswith("denoiser returns values that are not finite in request ")
    assert error.value.message.endswith(": there is nothing to recover from")


def test_a_file_where_checkpoints_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffoptError) as error:
        recover(checkpoint=str(tmp_path / "file"))
    assert error.value.message == (
        f"recover(checkpoint={tmp_path / 'file'}): is a file, wants a folder"
    )
