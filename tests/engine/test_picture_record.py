"""What made a picture, in the picture."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import diffopt as compiler
from diffopt.engine import picture_record
from diffopt.errors import DiffoptError
from tests.command import Run
from tests.zoo import CASES


def test_words_stand_for_what_is_no_text() -> None:
    program = compiler.Program.__new__(compiler.Program)
    program.history = [{"text": "unroll"}, {"text": "fuse"}]
    arguments = {
        "prompt": "ä\n",
        "image": Image.new("RGB", (4, 2)),
        "latents": torch.ones(1, 2),
        "scale": 7.5,
        "left": None,
        "output_type": "pil",
    }
    assert picture_record.record(program, arguments, images=2) == {
        "prompt": "ä\n",
        "image": "an RGB picture of 4x2",
        "latents": "a float32 tensor of [1, 2]",
        "scale": 7.5,
        "images": 2,
        "passes": "unroll,fuse",
    }


def test_pictures_of_run_say_what_made_them(diffopt: Run, tmp_path: Path) -> None:
    arguments = CASES["sd"].inputs(0) | {"num_inference_steps": 1, "output_type": "pil"}
    arguments.pop("generator", None)
    generator = torch.Generator().manual_seed(0)
    program = compiler.trace(CASES["sd"].build(), **arguments, generator=generator)
    engine = compiler.build(program, "eager", tmp_path / "a.engine")
    run = ("run", "a.engine", "--prompt", "a\x1b[2Jb", "--seed", 3, "-n", 2)
    assert diffopt(*run, "-o", "a.png").code == 0
    told = {
        "prompt": "a\x1b[2Jb",
        "seed": 3,
        "images": 2,
        "engine": engine.digest(),
        "passes": "",
        "target": "eager",
    }
    assert picture_record.read("a.png") == told
    assert json.loads(diffopt("inspect", "a.png", "--json").out) == told
    lines = diffopt("inspect", "a.png").out.splitlines()
    assert lines[:3] == ["prompt: a\\x1b[2Jb", "seed: 3", "images: 2"]
    assert diffopt(*run, "-o", "a.jpg").code == 0


@pytest.mark.parametrize("text", [None, "{", "[1]", "[" * 100_000])
def test_other_pictures(tmp_path: Path, text: str | None) -> None:
    info = PngInfo()
    if text is not None:
        info.add_itxt(picture_record.KEY, text)
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    with pytest.raises(DiffoptError) as caught:
        picture_record.read(path)
    assert str(caught.value) == (
        f"{path}: does not say what made it, as a PNG file of diffopt's does"
    )


def test_damaged_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(DiffoptError, match=r"^there is no file .*a\.png$"):
        picture_record.read(path)
    Image.effect_noise((64, 64), 9).save(path)
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[:40], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DiffoptError, match=r"is no intact PNG file$"):
            picture_record.read(path)
