"""Timing contenders in turn, and comparing what they make."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffopt.cli import bench as bench_command
from diffopt.cli import load_model, timing
from diffopt.cli.flags import BenchFlags
from diffopt.cli.load_model import TracedCall
from diffopt.core import Pipeline
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program


def noisy(size: float) -> timing.Sampler:
    return lambda seed: torch.full((1, 3, 2, 2), 0.5) + size


def test_measure() -> None:
    calls: list[tuple[str, int]] = []

    def counted(name: str, make: timing.Sampler) -> timing.Sampler:
        def call(seed: int) -> torch.Tensor:
            calls.append((name, seed))
            return make(seed)

        return call

    told: list[str] = []
    results = timing.measure(
        {"eager": counted("eager", noisy(0)), "near": counted("near", noisy(0.1))},
        "eager",
        rounds=3,
        warmup=2,
        seed=7,
        progress=lambda what, fraction: told.append(what),
    )
    assert calls[:4] == [("eager", 7), ("eager", 7), ("near", 7), ("near", 7)]
    assert calls[4:] == [(name, seed) for seed in (7, 8, 9) for name in ("eager", "near")]
    assert told == ["warming up eager", "warming up near", *(f"round {i} of 3" for i in (1, 2, 3))]
    assert [len(result.seconds) for result in results.values()] == [3, 3]
    assert (results["eager"].max_abs, results["eager"].psnr) == (0, math.inf)
    assert results["near"].max_abs == pytest.approx(0.1)
    assert results["near"].psnr == pytest.approx(20)


def test_medians_and_spreads() -> None:
    result = timing.Result(9.0, [1.0, 2.0, 3.0, 4.0, 50.0], 0.0, 0.0)
    assert (result.median, result.spread) == (3.0, 2.0)
    assert timing.Result(1.0, [1.0], 0.0, 0.0).spread == 0.0


def test_compile_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.zoo import CASES

    compiled = []

    def compile(function: object, mode: str | None) -> object:
        compiled.append((getattr(function, "__qualname__", str(function)), mode))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self).__name__, mode))
    )
    timing.compile_pipeline(CASES["sd"].build(), "default")
    assert sorted(compiled) == [
        ("AutoencoderKL.decode", "default"),
        ("UNet2DConditionModel", "default"),
    ]


# Whether the model is the one that the engine was built from

MODEL = '''
from tests.zoo import CASES

change = None


def make():
    """Return a small Stable Diffusion pipeline, which can be changed."""
    pipe = CASES["sd"].build()
    if change is not None:
        change(pipe)
    return pipe
'''
SMALL = {"height": 16, "width": 16, "guidance_scale": 5.0}

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with two engines that were built from it."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "a_model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        program = load_model.trace_model("a_model:make", TracedCall(SMALL, 2))
    program.save(folder / "a.program")
    build(program, "eager", folder / "plain.engine")
    # Passes that replace most weights: the engine still is of that model.
    rewritten = Pipeline.parse("unroll,hoist,simplify,fuse").run(program)
    build(rewritten, "eager", folder / "rewritten.engine")
    return folder


@pytest.fixture
def compare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a benchmark of one round, with the model changed."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)

    def run(
        file: str, change: Change | None = None, against: str = "eager", model: str = ""
    ) -> None:
        __import__("a_model")
        monkeypatch.setattr(sys.modules["a_model"], "change", change)
        bench_command.run(
            BenchFlags(Path(file), against, model, rounds=1, warmup=1, as_json=True), {}
        )

    return run


def change_one_value(pipe: Any) -> None:
    pipe.unet.conv_in.weight[0, 0, 1, 1] += 1e-3


def change_two_modules(pipe: Any) -> None:
    change_one_value(pipe)
    pipe.vae.decoder.conv_out.bias[0] += 1e-3


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
        pipe.unet.requires_grad_(False)


@pytest.mark.parametrize("file", ["plain.engine", "rewritten.engine", "a.program"])
def test_a_model_that_has_not_changed_is_compared(
    compare: Callable[..., None], capsys: pytest.CaptureFixture[str], file: str
) -> None:
    compare(file)
    compare(file, model="a.program")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["plain.engine", "rewritten.engine", "a.program"])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (change_one_value, "unet"),
        (change_two_modules, "unet, vae"),
        (add_lora, "unet, unet (settings)"),
    ],
)
def test_a_model_with_other_weights_is_one_line(
    compare: Callable[..., None], file: str, change: Change, names: str
) -> None:
    with pytest.raises(DiffoptError) as caught:
        compare(file, change)
    assert str(caught.value) == (
        f"{file} was built from other weights of {names} than a_model:make has now; build it again,"
        " or give the --dtype that it was built with"
    )


def test_engines_to_compare_with_are_of_the_same_model(
    compare: Callable[..., None], folder: Path
) -> None:
    compare("plain.engine", against="rewritten.engine")
    program = Program.load("a.program")
    program.digests["unet"] = "another"
    build(program, "eager", "stale.engine")
    with pytest.raises(DiffoptError) as caught:
        compare("plain.engine", against="eager,stale.engine")
    assert str(caught.value) == (
        "stale.engine was built from other weights of unet than a_model:make has now;"
        " build it again, or give the --dtype that it was built with"
    )
    program.source = "another:model"  # images of two models may be compared
    build(program, "eager", "other.engine")
    compare("plain.engine", against="other.engine")


def test_a_module_that_one_of_both_lacks_does_not_matter(compare: Callable[..., None]) -> None:
    program = Program.load("a.program")
    program.digests["safety_checker"] = "turned off since"
    del program.digests["vae"]
    build(program, "eager", "less.engine")
    compare("less.engine", lambda pipe: pipe.vae.decoder.conv_out.bias.add_(1e-3))


def test_the_same_lora_is_the_same_model(
    compare: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    __import__("a_model")
    monkeypatch.setattr(sys.modules["a_model"], "change", add_lora)
    build(
        load_model.trace_model("a_model:make", TracedCall(SMALL, 2)),
        "eager",
        "lora.engine",
    )
    compare("lora.engine", add_lora)
    with pytest.raises(DiffoptError, match=r"other weights of unet, unet \(settings\) than"):
        compare("lora.engine")


def test_a_local_directory(compare: Callable[..., None], tmp_path: Path) -> None:
    from tests.zoo import CASES

    pipe = CASES["sd"].build()
    pipe.save_pretrained(tmp_path / "model")
    build(
        load_model.trace_model(f"{tmp_path}/model", TracedCall(SMALL, 2)),
        "eager",
        "directory.engine",
    )
    compare("directory.engine")
    change_one_value(pipe)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(DiffoptError) as caught:
        compare("directory.engine")
    assert str(caught.value) == (
        f"directory.engine was built from other weights of unet than {tmp_path}/model has now;"
        " build it again, or give the --dtype that it was built with"
    )
