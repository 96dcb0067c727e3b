"""The command line: what each command prints, writes and refuses."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffopt.capture.trace import trace
from diffopt.capture.verification import EQUAL
from tests.command import Run

PIPELINE = '''
import torch
from tests.zoo import CASES


def make():
    """Return a small Stable Diffusion pipeline."""
    return CASES["sd"].build()


def number():
    return 1 / 0


def not_a_pipeline():
    return torch.nn.Linear(2, 2)
'''


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced program of a small Stable Diffusion pipeline."""
    from diffopt.cli import load_model
    from diffopt.cli.load_model import TracedCall

    folder = tmp_path_factory.mktemp("program")
    (folder / "small_pipelines.py").write_text(PIPELINE)
    path = folder / "small.program"
    arguments = {"height": 16, "width": 16, "guidance_scale": 5.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        load_model.trace_model("small_pipelines:make", TracedCall(arguments, 2)).save(path)
    return path


@pytest.fixture(scope="session")
def engine(program: Path) -> Path:
    """An engine of that program that runs without compiling."""
    from diffopt.engine.engine import build
    from diffopt.ir.program import Program

    path = program.with_name("small.engine")
    build(Program.load(program), "eager", path)
    return path


@pytest.fixture
def pipelines(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `small_pipelines:…` importable."""
    monkeypatch.syspath_prepend(program.parent)


# Files and models


def test_trace_writes_a_program(diffopt: Run, pipelines: None, tmp_path: Path) -> None:
    done = diffopt(
        *("trace", "small_pipelines:make", "--steps", 2, "--set", "height=16"),
        *("--set", "width=16", "-o", "a.program"),
    )
    assert done.code == 0
    assert "arguments of the captured call" in done.out
    assert re.search(r"prompt +│ input +│ 'a cat'", done.out)
    assert re.search(r"height +│ bound +│ 16", done.out)
    assert re.search(r"eta +│ left out +│ 0.0", done.out)
    assert f"capture: {EQUAL}" in done.out
    assert done.err == "wrote a.program: 3 components, 5 calls\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.program"]


def test_optimize_writes_an_engine_and_run_images(
    diffopt: Run, program: Path, tmp_path: Path
) -> None:
    done = diffopt("optimize", program, "--passes", "", "--target", "eager", "-o", "a.engine")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("wrote a.engine (0.")
    done = diffopt("run", "a.engine", "--prompt", "a hat", "--seed", 3, "-n", 3, "-o", "a.png")
    assert (done.code, done.out, done.err) == (0, "", "wrote a.png (3 images)\n")
    assert Image.open("a.png").size == (3 * 16 + 2 * 2, 16)
    assert sorted(os.listdir(tmp_path)) == ["a.engine", "a.png"]


def test_seeds_count_up(diffopt: Run, engine: Path) -> None:
    assert diffopt("run", engine, "--seed", 5, "-n", 2, "-o", "two.npy").code == 0
    assert diffopt("run", engine, "--seed", 6, "-o", "one.pt").code == 0
    two, one = np.load("two.npy"), torch.load("one.pt")
    assert two.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(two[1:], one)
    assert np.abs(two[0] - two[1]).max() > 0.01


def test_a_program_that_draws_nothing_takes_no_seed(diffopt: Run) -> None:
    trace(torch.nn.Tanh(), input=torch.ones(1, 3)).save("a.program")
    command = ("run", "a.program", "--set", "input=[[1.0, 2.0, 3.0]]", "-o")
    assert diffopt(*command, "one.pt").code == 0
    assert torch.equal(torch.load("one.pt"), torch.tensor([[1.0, 2.0, 3.0]]).tanh())
    done = diffopt(*command, "two.pt", "--seed", 1)
    assert (done.code, done.err) == (
        2,
        "diffopt: error: seed=1: the program draws no random numbers; leave the seed out\n",
    )
    done = diffopt(*command, "two.pt", "-n", 4)
    assert (done.code, done.err) == (
        2,
        "diffopt: error: -n 4: the program draws no random numbers of a seed, and every image would"
        " be the same; leave -n out\n",
    )
    assert not os.path.exists("two.pt")


def test_a_batch_is_made_in_one_call(diffopt: Run, pipelines: None, engine: Path) -> None:
    small = ("--steps", 2, "--set", "height=16", "--set", "width=16", "--set", "guidance_scale=5.0")
    done = diffopt("trace", "small_pipelines:make", "--batch", 2, *small, "-o", "two.program")
    assert done.code == 0, done.err
    assert diffopt("run", "two.program", "--prompt", "a", "-n", 3, "-o", "three.npy").code == 0
    assert diffopt("run", engine, "--prompt", "a", "-n", 3, "-o", "each.npy").code == 0
    np.testing.assert_allclose(np.load("three.npy"), np.load("each.npy"), atol=1e-5)


def test_one_engine_makes_few_and_many(
    diffopt: Run, pipelines: None, program: Path, engine: Path
) -> None:
    words = ("optimize", program, "-p", "unroll", "--batch", "1..3", "-t", "eager")
    done = diffopt(*words, "-o", "range.engine")
    assert done.code == 0, done.err
    for name, file in (("many", "range.engine"), ("one", engine)):
        done = diffopt("run", file, "--prompt", "a dog", "-n", 4, "-o", f"{name}.npy")
        assert done.code == 0, done.err
    many, one = np.load("many.npy"), np.load("one.npy")
    assert many.shape == one.shape == (4, 3, 16, 16)
    np.testing.assert_allclose(many, one, atol=1e-4)
    done = diffopt("bench", "range.engine", "--batch", 3, "--rounds", 1, "--warmup", 1, "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert results["range.engine"]["max_abs"] < 1e-4


@pytest.mark.parametrize("text", ["0", "1..", "4..2", "1-8", "many", "0..3"])
def test_a_wrong_batch(diffopt: Run, program: Path, text: str) -> None:
    done = diffopt("optimize", program, "--batch", text, "-o", "a.engine")
    assert done.code == 2
    wanted = f"--batch {text}: wants a number such as 4, or a range such as 1..8"
    assert done.err == f"diffopt: error: {wanted}\n"


def test_tokens_add_a_pass(diffopt: Run, program: Path) -> None:
    done = diffopt("optimize", program, "-p", "unroll", "--tokens", 40, "--json", "-o", "a.program")
    assert done.code == 0, done.err
    record = json.loads(done.out)["passes"][-1]
    assert record["text"] == "lengths(max=40)"
    assert record["skipped"] == ["the program: every text has a fixed number of tokens"]


def test_tokens_and_a_range_of_requests(diffopt: Run, program: Path) -> None:
    done = diffopt("optimize", program, "--tokens", 40, "--batch", "1..4", "-o", "a.engine")
    assert done.code == 2
    assert done.err == (
        "diffopt: error: --tokens 40 --batch 1..4: requests of different lengths do not fit into "
        "one run; leave one of the two out\n"
    )


def test_a_program_runs_and_is_optimized_without_a_target(diffopt: Run, program: Path) -> None:
    assert diffopt("optimize", program, "--passes", "", "-o", "b.program").code == 0
    assert diffopt("run", "b.program", "-o", "b.pt").code == 0
    assert diffopt("run", program, "-o", "a.pt").code == 0
    assert torch.equal(torch.load("a.pt"), torch.load("b.pt"))
    done = diffopt("run", program, "-t", "eager", "-o", "a.pt")
    assert f"--target eager: {program} is a program, which runs without a target" in done.err


def test_errors_that_are_not_measured(diffopt: Run, program: Path) -> None:
    words = ("optimize", program, "-p", "simplify", "--no-compare", "-o", "x.program", "--json")
    (record,) = json.loads(diffopt(*words).out)["passes"]
    assert (record["max_abs"], record["relative"]) == (None, None)
    done = diffopt(*words, "--budget", "0.1")
    assert done.code == 2
    assert "has a budget, and outputs are not compared: leave one of both out" in done.err


# Reports


def test_inspect(diffopt: Run, program: Path, engine: Path) -> None:
    tables = diffopt("inspect", program)
    assert tables.code == 0
    assert "calls: 2× text_encoder, 2× unet, vae_decode" in tables.out
    assert "float32[1,4,8,8]" in tables.out
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in tables.out.splitlines()]
    assert ["unet", "unet", "0", "0-1"] in rows
    told = json.loads(diffopt("inspect", engine, "--json").out)
    assert told["calls"] == ["text_encoder"] * 2 + ["unet"] * 2 + ["vae_decode"]
    assert [(tag["component"], tag["step"], tag["branch"]) for tag in told["tags"]] == [
        ("text_encoder", 0, 0),
        ("text_encoder", 0, 1),
        ("unet", 0, 0),
        ("unet", 1, 0),
        ("vae_decode", 0, 0),
    ]
    assert [row["name"] for row in told["components"]] == ["text_encoder", "unet", "vae_decode"]
    assert told["components"][1]["calls"] == 2
    assert told["components"][1]["total"] == 2 * told["components"][1]["flops"] > 0
    assert told["source"] == "small_pipelines:make"


def test_inspect_prints_a_graph(diffopt: Run, program: Path) -> None:
    done = diffopt("inspect", program, "--graph", "vae_decode")
    assert "aten.conv2d(" in done.out
    assert "= unet(" in diffopt("inspect", program, "--graph", "program").out
    wrong = diffopt("inspect", program, "--graph", "vae")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err == (
        "diffopt: error: there is no component 'vae'; there are program, text_encoder, unet,"
        " vae_decode\n"
    )


def test_verify(diffopt: Run, engine: Path, program: Path) -> None:
    assert diffopt("verify", engine).out == f"{engine}: ok\n"
    assert diffopt("verify", program).out == f"{program}: ok\n"
    damaged = bytearray(engine.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path("bad.engine").write_bytes(damaged)
    done = diffopt("verify", "bad.engine")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("diffopt: error: bad.engine: ")
    assert len(done.err.splitlines()) == 1
    told = diffopt("verify", "bad.engine", "--json")
    assert told.code == 1
    assert json.loads(told.out)["ok"] is False


def test_bench(diffopt: Run, engine: Path, pipelines: None) -> None:
    done = diffopt("bench", engine, "--rounds", 2, "--warmup", 1, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["rounds"] == 2
    ours, eager = told["results"][str(engine)], told["results"]["eager"]
    assert (ours["max_abs"], ours["psnr"]) == (0, None)
    assert eager["speedup"] == 1
    assert len(ours["seconds"]) == 2
    done = diffopt("bench", engine, "--against", engine, "--rounds", 1, "--warmup", 1)
    assert "max difference" in done.out
    assert "1 rounds" in done.out


def test_passes_and_targets(diffopt: Run) -> None:
    assert diffopt("passes").code == 0
    assert {row["name"] for row in json.loads(diffopt("targets", "--json").out)} >= {"cpu", "eager"}
    assert "eager" in diffopt("targets").out
    cpu = diffopt("targets", "cpu").out
    assert "options of cpu" in cpu
    assert "max-autotune" in cpu


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "optimize none.program --passes nonesuch -o a.engine",
            "there is no pass 'nonesuch'",
        ),
        (
            "optimize none.program --passes= -t cpuu -o a.engine",
            "there is no target 'cpuu'; did you mean 'cpu'?\n  cpuu\n  ^^^^",
        ),
        ("optimize none.program --passes= -o a.engine", "there is no file none.program"),
        (
            "optimize none.program --passes= -o a.png",
            "the output's name must end in .engine or .program, got 'a.png'",
        ),
        (
            "optimize none.program --passes= -o none/a.engine",
            "there is no folder none to write a.engine into",
        ),
        (
            "trace nonesuch -o a.program",
            "there is no nonesuch; MODEL is a local diffusers directory, a hub id, a .program file,"
            " or package.module:function",
        ),
        ("trace . -o a.program", ". is no diffusers directory: it has no model_index.json"),
        (
            "trace nonesuch.module:make -o a.program",
            "nonesuch.module:make: No module named 'nonesuch'",
        ),
        ("trace json:make -o a.program", "json:make: module json has no 'make'"),
        (
            "trace os:system -o a.program",
            "os:system has to be callable without arguments: missing a required argument:"
            " 'command'",
        ),
        (
            "trace os:path -o a.program",
            "os:path is a module; name a function that returns a pipeline",
        ),
        ("trace os:getcwd -o a.program", "os:getcwd() returned a str, which cannot be called"),
        (
            "trace small_pipelines:make --steps 100000 -o a.program",
            "small_pipelines:make refuses this call: ValueError: `num_inference_steps`: 100000",
        ),
        (
            "run none.engine -o a.png --seed 1 --set seed=2",
            "seed is given by --seed and by --set seed=: give one of the two",
        ),
        (
            "run none.engine -o a.png --prompt a --set prompt=b",
            "prompt is given by --prompt and by --set prompt=: give one of the two",
        ),
        (
            "compare a.engine b.engine -o a.png --prompt a --set prompt=b",
            "prompt is given by --prompt and by --set prompt=: give one of the two",
        ),
        ("bench a.engine --set seed=1", "seed is given by --seed and by --set seed="),
        (
            "run none.engine -o a.png --set x=null",
            "--set: write None, as in Python, for null, or the word itself in quotes: \"'null'\"",
        ),
        (
            "trace small_pipelines:make --set steps -o a.program",
            "--set wants name=value, got 'steps'",
        ),
        (
            "trace small_pipelines:make --set hight=16 -o a.program",
            "StableDiffusionPipeline has no argument 'hight'; did you mean 'height'?",
        ),
        ("run none.engine -o a.png", "there is no file none.engine"),
        (
            "run none.engine -o a.txt",
            "cannot write 'a.txt': the name must end in one of .png, .jpg, .jpeg, .webp, .pt, .npy",
        ),
        ("run none.engine", "Missing option '--output' / '-o'."),
        ("run none.engine -o a.png --seed x", "Invalid value for '--seed'"),
        ("verify none.engine", "there is no file none.engine"),
        (
            "bench none.engine --against eagre",
            "--against: 'eagre' is no file; did you mean 'eager'?",
        ),
        ("passes nonesuch", "there is no pass 'nonesuch'"),
        ("targets gpu", "there is no target 'gpu'"),
        ("tarce", "No such command 'tarce'."),
    ],
)
def test_errors(diffopt: Run, pipelines: None, tmp_path: Path, words: str, message: str) -> None:
    done = diffopt(*words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"diffopt: error: {message}")
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_engine_is_one_line(diffopt: Run, engine: Path) -> None:
    Path("short.engine").write_bytes(engine.read_bytes()[:1000])
    done = diffopt("run", "short.engine", "-o", "a.png")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert not Path("a.png").exists()


def test_a_wrong_argument_is_one_line(diffopt: Run, engine: Path) -> None:
    done = diffopt("run", engine, "--guidance-scale", 9, "-o", "a.png")
    assert done.code == 2
    assert "guidance_scale" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 1 << 65], f"seed={1 << 65}: must be a whole number from -2**63 to 2**64 - 1"),
        (["--set", "seed=1.7"], "seed=1.7: must be a whole number"),
        (
            ["--set", "guidance_scale=None"],
            "guidance_scale=None: 'guidance_scale' was bound to",
        ),
        (["--target", "eager(x=1)"], "eager has no option 'x'"),
    ],
)
def test_wrong_values_are_one_line(
    diffopt: Run, engine: Path, words: list[object], message: str
) -> None:
    done = diffopt("run", engine, "-o", "a.png", *words)
    assert done.code == 2
    assert done.err.startswith(f"diffopt: error: {message}")
    assert "Traceback" not in done.err
    assert not Path("a.png").exists()


def test_what_kernels_refuse_is_one_line(
    diffopt: Run, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise IndexError("index out of range in self\nand more")

    monkeypatch.setattr("diffopt.lowering.executor.SlotExecutor.run", run)
    done = diffopt("run", engine, "-o", "a.png")
    assert (done.code, done.err) == (
        2,
        "diffopt: error: the run fails on these arguments: index out of range in self\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["a.png", "a.pt", "a.npy"])
def test_a_full_disk_is_one_line(
    diffopt: Run, engine: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: Path("/dev/full").write_bytes(b"x"))
    done = diffopt("run", engine, "-o", name)
    assert done.code == 2
    assert done.err == f"diffopt: error: {name}: cannot be written: No space left on device\n"
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("bound", ["nan", "-1"])
def test_a_bound_that_nothing_meets(diffopt: Run, program: Path, bound: str) -> None:
    done = diffopt("optimize", program, "-p", "simplify", "--bisect", bound, "-o", "a.program")
    assert (done.code, done.err.partition(":")[2].strip()[:14]) == (2, "error: bisect=")


def test_a_folder_that_cannot_be_made_is_one_line(diffopt: Run, program: Path) -> None:
    Path("file").write_text("")
    done = diffopt("optimize", program, "-p", "simplify", "--dump", "file/x", "-o", "a.program")
    assert (done.code, done.err) == (2, "diffopt: error: file/x: Not a directory\n")


def test_a_bug_keeps_its_traceback(diffopt: Run, pipelines: None) -> None:
    with pytest.raises(ZeroDivisionError):
        diffopt("trace", "small_pipelines:number", "-o", "a.program")


def test_a_program_cannot_be_traced_again(diffopt: Run, program: Path) -> None:
    done = diffopt("trace", program, "--steps", 3, "-o", "a.program")
    assert (done.code, done.err) == (
        2,
        f"diffopt: error: {program} is traced already: trace its pipeline to change the call\n",
    )


def test_an_unreachable_hub_is_one_line(diffopt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = diffopt("trace", "someone/nonesuch-model", "-o", "a.program")
    assert done.code == 2
    assert done.err.startswith(
        "diffopt: error: someone/nonesuch-model is no local directory, and could not be had from"
        " the hub: "
    )
    assert len(done.err.splitlines()) == 1


def test_an_interrupted_run_leaves_nothing(
    diffopt: Run, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        args[1].write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", lambda value, file: interrupt(value, file))
    assert diffopt("run", engine, "-o", "a.pt").code == 130
    assert list(tmp_path.iterdir()) == []


# Help


@pytest.mark.parametrize(
    "command", ["trace", "optimize", "run", "bench", "inspect", "verify", "passes", "targets"]
)
def test_help_has_an_example(diffopt: Run, command: str) -> None:
    done = diffopt(command, "--help")
    assert done.code == 0
    assert f"diffopt {command}" in done.out.partition("Options")[2]


def test_alone_it_prints_help(diffopt: Run) -> None:
    done = diffopt()
    assert (done.code, done.err) == (2, "")
    assert "From a model to a picture" in done.out
    assert diffopt("--version").out.startswith("diffopt ")
