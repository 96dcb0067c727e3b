"""`diffopt compare`: the same images of several files, side by side and in numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import diffopt as compiler
from diffopt.capture.trace import trace_function
from diffopt.cli import compare as compare_command
from diffopt.cli import image_files, image_metrics
from diffopt.core.equivalence import difference
from diffopt.engine.engine import build
from diffopt.host.outputs import first_output
from diffopt.ir.program import Program
from tests.command import Run
from tests.zoo import CASES


def traced(**more: Any) -> Program:
    arguments = CASES["sd"].inputs(0) | {"num_inference_steps": 1, "output_type": "pil"} | more
    return compiler.trace(CASES["sd"].build(), **arguments)


def changed(program: Program, amount: float) -> Program:
    """Return a program that makes slightly other images."""
    other = Program.from_members(*program.to_members())
    bias = next(
        tensor
        for name, tensor in other.components["vae_decode"].named_parameters()
        if name.endswith("conv_out_bias")
    )
    bias.data = bias + amount
    return other


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A program, an engine of it, one whose images differ, and one for two requests at once."""
    folder = tmp_path_factory.mktemp("files")
    program = traced()
    program.save(folder / "exact.program")
    build(program, "eager", folder / "exact.engine")
    build(changed(program, 0.1), "eager", folder / "other.engine")
    both = traced(prompt=["a", "b"], generator=[torch.Generator().manual_seed(k) for k in range(2)])
    both.save(folder / "both.program")
    batched = compiler.Pipeline.parse("batch(max=3,min=2)").run(program)
    batched.save(folder / "batched.program")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the network of the extra, whose own tests are elsewhere."""
    monkeypatch.setattr(image_metrics, "features", lambda images: images.flatten(1) + 1)


def test_images_and_numbers(diffopt: Run, files: dict[str, Path]) -> None:
    paths = [files[n] for n in ("exact.program", "exact.engine", "other.engine")]
    words = ("--prompt", "a red cat", "--prompt", "a hat", "--seed", 5, "-n", 2)
    done = diffopt("compare", *paths, *words, "--json", "-o", "grid.png")
    assert done.code == 0, done.err
    assert done.err == "wrote grid.png (3 × 4 images)\n"
    told = json.loads(done.out)
    assert (told["prompts"], told["seeds"]) == (["a red cat", "a hat"], [5, 6])
    program, engine, other = told["results"]
    assert [row["file"] for row in told["results"]] == [str(path) for path in paths]
    exact = {"relative": 0, "max_abs": 0, "psnr": None, "features": 0}
    assert {k: v for k, v in program.items() if k != "file"} == exact
    assert {k: v for k, v in engine.items() if k != "file"} == exact

    def make(file: Path) -> Tensor:
        loaded = Program.load(file) if file.suffix == ".program" else compiler.load(file)
        calls = [(text, seed) for text in ("a red cat", "a hat") for seed in (5, 6)]
        return torch.cat(
            [first_output(loaded(prompt=t, seed=s, output_type="pt")) for t, s in calls]
        )

    first, last = make(paths[0]), make(paths[2])
    largest, relative = difference([last], [first])
    assert other["relative"] == pytest.approx(relative) != 0
    assert other["max_abs"] == pytest.approx(largest)
    error = float((last.double() - first.double()).square().mean())
    assert other["psnr"] == pytest.approx(-10 * np.log10(error))
    gap = torch.linalg.vector_norm((last - first).flatten(1), dim=1)
    norm = torch.linalg.vector_norm(first.flatten(1) + 1, dim=1)
    assert other["features"] == pytest.approx(float((gap / norm).mean()))

    sheet = np.asarray(Image.open("grid.png"))
    wide = sheet.shape[1] // 3
    assert sheet.shape[0] > 4 * 18
    for column, images in ((0, first), (2, last)):
        left = sheet[-72:, find_left(sheet, column) :][:, :16]
        for row in range(4):
            pixels = (images[row].movedim(0, -1).numpy() * 255).round().astype("uint8")
            np.testing.assert_array_equal(left[row * 18 : row * 18 + 16], pixels)
    assert (sheet[: sheet.shape[0] - 72, :wide] < 128).any(), "there is a heading"


def find_left(sheet: np.ndarray, column: int) -> int:
    """Return where a column's images begin, which are not white as what is around them."""
    used = (sheet[-72:-2] != 255).any(axis=(0, 2))
    starts = [x for x in range(1, len(used)) if used[x] and not used[x - 1]]
    assert len(starts) == 3
    return starts[column]


def test_a_table(diffopt: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr(image_metrics, "features", features_of_the_extra)
    monkeypatch.setattr(image_metrics, "_network", image_metrics._network.__wrapped__)
    done = diffopt("compare", files["exact.engine"], files["other.engine"], "-o", "a.webp")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if ".engine" in line]
    assert lines[0].rstrip() == f"1 image of each, against those of {files['exact.engine']}"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[1:]]
    assert cells[0] == [str(files["exact.engine"]), "0", "0", "inf", "-"]
    assert cells[1][0] == str(files["other.engine"])
    assert float(cells[1][1]) > 0
    assert cells[1][4] == "-"
    assert Image.open("a.webp").size[1] > 16


features_of_the_extra = image_metrics.features


@pytest.mark.parametrize("name", ["both.program", "batched.program"])
def test_files_that_make_several_images_at_once(
    diffopt: Run, files: dict[str, Path], name: str
) -> None:
    words = ("--prompt", "a hat", "-n", 3, "--json", "-o", "a.png")
    done = diffopt("compare", files["exact.program"], files[name], *words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["results"][1]["max_abs"] < 1e-4


def test_prompts_of_a_file_and_other_arguments(diffopt: Run, files: dict[str, Path]) -> None:
    Path("prompts.txt").write_text("a dog\n\na house\n")
    words = ("--prompt", "a hat", "--prompts", "prompts.txt", "--set", "height=16", "--json")
    done = diffopt("compare", files["exact.program"], files["exact.engine"], *words, "-o", "a.png")
    assert done.code == 0, done.err
    assert json.loads(done.out)["prompts"] == ["a hat", "a dog", "a house"]
    assert "(2 × 3 images)" in done.err


def test_headings_of_files_with_one_name(diffopt: Run, files: dict[str, Path]) -> None:
    Path("b").mkdir()
    Path("b/exact.engine").write_bytes(files["exact.engine"].read_bytes())
    Path("a.engine").write_bytes(files["exact.engine"].read_bytes())
    sizes = []
    for other in ("b/exact.engine", "a.engine"):
        assert diffopt("compare", files["exact.engine"], other, "-o", "a.png").code == 0
        sizes.append(Image.open("a.png").size[0])
    assert sizes[0] > sizes[1] + 50, "the folders are written where the names are the same"


def test_columns() -> None:
    pictures = [[Image.new("L", (10, 6), 10 * c + r) for r in range(3)] for c in range(2)]
    sheet = image_files.columns(["", "a long heading\nof two lines"], pictures)
    assert sheet.mode == "RGB"
    top = sheet.height - 3 * 8
    for row in range(3):
        assert sheet.getpixel((2, top + row * 8)) == (row,) * 3
        assert sheet.getpixel((16, top + row * 8)) == (10 + row,) * 3
    assert sheet.width > 14 + 60
    assert top > 20


def test_videos_show_every_frame() -> None:
    videos = torch.rand(2, 5, 3, 4, 4)
    pictures = compare_command._pictures(videos)
    assert len(pictures) == 10
    pixels = (videos[1, 2].movedim(0, -1).numpy() * 255).round().astype("uint8")
    np.testing.assert_array_equal(np.asarray(pictures[7]), pixels)


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{exact.engine} -o a.png", "compare wants two files or more, got only {exact.engine}"),
        ("{exact.engine} none.engine -o a.png", "there is no file none.engine"),
        (
            "{exact.engine} {other.engine} -o a.pt",
            "'a.pt' is no picture: its name must end in one of .png, .jpg, .jpeg, .webp",
        ),
        ("{exact.engine} {other.engine}", "Missing option '--output' / '-o'."),
        (
            "{exact.engine} {other.engine} --prompts none.txt -o a.png",
            "none.txt: cannot be read: No such file or directory",
        ),
        (
            "{exact.engine} {other.engine} --set hight=16 -o a.png",
            "hight=16: the program was traced without 'hight'; did you mean 'height'?; trace it"
            " again with 'hight' among the arguments (its inputs are: generator, prompt, seed)",
        ),
    ],
)
def test_errors(
    diffopt: Run, files: dict[str, Path], tmp_path: Path, words: str, message: str
) -> None:
    for name, path in files.items():
        words, message = (text.replace(f"{{{name}}}", str(path)) for text in (words, message))
    done = diffopt("compare", *words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err == f"diffopt: error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_of_prompts(diffopt: Run, files: dict[str, Path]) -> None:
    Path("empty.txt").write_text("\n")
    engine = files["exact.engine"]
    done = diffopt("compare", engine, engine, "--prompts", "empty.txt", "-o", "a.png")
    assert (done.code, done.out) == (2, "")
    assert done.err == "diffopt: error: empty.txt: has no prompts; write one a line\n"
    assert not Path("a.png").exists()


def test_images_of_other_sizes(diffopt: Run) -> None:
    for name, size in (("small", 4), ("large", 6)):
        wide = trace_function(lambda x, n=size: x.expand(1, 3, 4, n) * 1, torch.zeros(1))
        wide.save(f"{name}.program")
    done = diffopt(
        *("compare", "small.program", "large.program", "-o", "a.png", "--set", "x0=[1.0]")
    )
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "diffopt: error: large.program makes images of the shape [3, 4, 6] and small.program of"
        " [3, 4, 4]: they cannot be compared\n"
    )
    assert not Path("a.png").exists()


def test_what_is_no_picture(diffopt: Run) -> None:
    trace_function(lambda x: x + 1, torch.zeros(2, 3)).save("sum.program")
    done = diffopt(
        *("compare", "sum.program", "sum.program", "-o", "a.png"),
        *("--set", "x0=[[1.0,2.0,3.0],[1.0,2.0,3.0]]"),
    )
    assert (done.code, done.out) == (2, "")
    assert done.err == "diffopt: error: sum.program makes no pictures, but values of [3]\n"


def test_help_has_an_example(diffopt: Run) -> None:
    done = diffopt("compare", "--help")
    assert done.code == 0
    assert "diffopt compare" in done.out.partition("Options")[2]
