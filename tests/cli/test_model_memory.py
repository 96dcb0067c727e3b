"""Diffusers directories: types to load weights in, missing parts, and too little memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffopt.cli import load_model, model_memory
from diffopt.ir.program import Program
from tests.command import Run
from tests.zoo import CASES

SMALL = ["--set", "height=16", "--set", "width=16", "--steps", "2", "--no-check"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with weights in bfloat16, those of the UNet in two files."""
    path = tmp_path_factory.mktemp("model") / "small"
    pipe = CASES["sd"].build().to(torch.bfloat16)
    pipe.save_pretrained(path, max_shard_size="100KB")
    assert (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_of_the_type_that_was_asked_for(
    dtype: str, folder: Path, diffopt: Run, tmp_path: Path
) -> None:
    outcome = diffopt("trace", folder, "--dtype", dtype, "-o", "x.program", *SMALL)
    assert outcome.code == 0, outcome.err
    weights = Program.load(tmp_path / "x.program").components["unet"].parameters()
    assert {tensor.dtype for tensor in weights} == {load_model.DTYPES[dtype]}


def test_a_component_that_a_pipeline_was_saved_without_stays_absent(tmp_path: Path) -> None:
    pipe = CASES["sd3"].build()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)  # from_pretrained alone refuses this folder
    assert load_model.load_model(str(tmp_path)).text_encoder_3 is None


def test_an_index_of_another_kind_is_one_line(diffopt: Run, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[]")
    outcome = diffopt("trace", tmp_path, "-o", "x.program")
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_weights_that_are_stored_in_the_type_are_mapped(folder: Path) -> None:
    pipe = load_model.load_model(str(folder), "bf16")
    maps = Path("/proc/self/maps").read_text()
    assert str(folder / "unet") in maps
    assert next(pipe.unet.parameters()).dtype == torch.bfloat16


def refusal(outcome: Any) -> str:
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    return str(line)


def test_a_type_that_there_is_not(folder: Path, diffopt: Run) -> None:
    line = refusal(diffopt("trace", folder, "--dtype", "fp61", "-o", "x.program"))
    assert line.endswith("--dtype fp61: wants fp32, bf16, fp16; did you mean 'fp16'?")


def test_a_program_has_types_of_its_own(diffopt: Run, tmp_path: Path) -> None:
    (tmp_path / "x.program").write_bytes(b"")
    line = refusal(diffopt("optimize", "x.program", "--dtype", "bf16", "-o", "y.program"))
    assert line.endswith("--dtype bf16 is for diffusers pipelines; x.program has types of its own")


def test_float16_is_no_type_for_a_cpu(folder: Path, diffopt: Run) -> None:
    line = refusal(diffopt("optimize", folder, "--dtype", "fp16", "-o", "y.engine"))
    assert line.endswith(
        "--dtype fp16 --target cpu: CPUs compute float16 slowly; write --dtype bf16"
    )


def test_more_than_there_is_memory(
    folder: Path, diffopt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_memory, "_free_memory", lambda: 100_000)
    line = refusal(diffopt("trace", folder, "-o", "x.program"))
    assert "its weights in fp32 take 0.0 GB, and 0.0 GB of memory are free" in line
    assert line.endswith("--dtype bf16 maps them as they are stored")
    assert diffopt("trace", folder, "--dtype", "bf16", "-o", "x.program", *SMALL).code == 0


def test_a_missing_part_of_the_weights(folder: Path, diffopt: Run, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    lost = sorted((copy / "unet").glob("*-00002-of-*.safetensors"))[0]
    lost.unlink()
    line = refusal(diffopt("trace", copy, "-o", "x.program"))
    assert lost.name in line
