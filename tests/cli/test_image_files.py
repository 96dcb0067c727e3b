"""What a pipeline returns, as a file."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffopt.cli import image_files
from diffopt.errors import DiffoptError
from diffopt.host.outputs import first_output


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (5, 3, 2), (7, 3, 3), (8, 4, 2), (10, 5, 2)],
)
def test_grid(count: int, columns: int, rows: int) -> None:
    sheet = image_files.grid([Image.new("L", (10, 6), index) for index in range(count)])
    assert sheet.size == (columns * 12 - 2, rows * 8 - 2)
    assert sheet.getpixel((0, 0)) == 0
    last = ((count - 1) % columns * 12, (count - 1) // columns * 8)
    assert sheet.getpixel(last) == count - 1


@pytest.mark.parametrize(
    ("result", "first"),
    [
        (SimpleNamespace(images=[1]), [1]),
        (SimpleNamespace(frames=[2]), [2]),
        ({"x": 3}, 3),
        ((4, 5), 4),
        (6, 6),
    ],
)
def test_first_output(result: object, first: object) -> None:
    assert first_output(result) == first


def test_several_calls_become_one_file(tmp_path: Path) -> None:
    pictures = [[Image.new("L", (4, 4))] * 2] * 2
    assert image_files.save(pictures, tmp_path / "a.png", 3) == 3
    assert Image.open(tmp_path / "a.png").size == (16, 4)
    assert image_files.save([torch.ones(2, 3), np.zeros((2, 3))], tmp_path / "a.pt", 3) == 3
    assert torch.load(tmp_path / "a.pt").tolist() == [[1.0] * 3] * 2 + [[0.0] * 3]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("before")
    with pytest.raises(DiffoptError, match="returns no pictures"):
        image_files.save([torch.ones(1)], path, 1)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
