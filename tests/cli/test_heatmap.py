"""Which blocks are computed in which step: rows, tables and pictures."""

import io
import json
import re
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import fx

import diffopt
from diffopt.caching import step_map
from diffopt.caching.layer_groups import LIMIT, layer_groups
from diffopt.cli import heatmap, output
from diffopt.core import Pipeline, Record, Size
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.ir.sampling_loop import Loop
from tests.command import Run
from tests.passes.build import Builder, body, parameter, program, randn
from tests.zoo import CASES

aten = torch.ops.aten


def loop(*paths: str) -> Loop:
    """Return a loop whose body has a linear layer for each path."""

    def make(b: Builder, x: fx.Node) -> fx.Node:
        for path in paths:
            x = b(aten.relu.default, b(aten.linear.default, x, parameter(4, 4)))
            x.args[0].meta["module"] = path
        return x

    gm = body(make, randn(2, 4))
    whole: Program = program(lambda b, x: b.call("body", x), randn(2, 4), body=gm)
    return Loop(whole, "body", gm, {}, 1, 1)


def labels(*paths: str) -> dict[str, int]:
    """Return the rows of such a loop, with the number of their layers."""
    return {label: len(nodes) for label, nodes in layer_groups(loop(*paths)).items()}


# Rows


def unet(levels: int) -> list[str]:
    """Return layers like those of a UNet: blocks of blocks, and layers beside them."""
    paths = ["conv_in"]
    for level in range(levels):
        for part in range(2):
            paths += [f"down.{level}.resnets.{part}.conv{i}" for i in (1, 2)]
            paths += [f"down.{level}.attentions.{part}.blocks.0.{name}" for name in ("q", "out.0")]
            paths += [f"down.{level}.attentions.{part}.proj"]
        paths += [f"down.{level}.downsamplers.0.conv"]
    return [*paths, "mid.resnets.0.conv1", "mid.resnets.0.conv2", "conv_out"]


def test_blocks_of_blocks_are_divided_as_long_as_there_is_room() -> None:
    counts = labels(*unet(2))
    assert list(counts)[:6] == [
        "conv_in",
        "down.0.resnets.0",
        "down.0.attentions.0",  # one block and a layer: not divided
        "down.0.resnets.1",
        "down.0.attentions.1",
        "down.0.downsamplers.0.conv",
    ]
    assert counts["down.0.attentions.0"] == 3
    assert counts["mid.resnets.0"] == 2
    assert sum(counts.values()) == len(unet(2))
    assert list(labels(*unet(12))) == [
        "conv_in",
        *(f"down.{level}" for level in range(12)),
        "mid.resnets.0",
        "conv_out",
    ]


def test_more_blocks_than_rows_share_them() -> None:
    paths = [f"blocks.{i}.{name}" for i in range(LIMIT + 9) for name in ("attn", "mlp")]
    counts = labels("embed", *paths, "out.linear")
    assert list(counts)[:3] == ["embed", "blocks.0-1", "blocks.2-3"]
    assert list(counts)[-2:] == [f"blocks.{LIMIT + 8}", "out.linear"]
    assert counts["blocks.0-1"] == 4
    assert sum(counts.values()) == len(paths) + 2


@pytest.mark.parametrize(
    ("paths", "counts"),
    [
        (["", "", ""], {"body": 3}),
        (["net.a.0", "net.a.2", "", "net.b"], {"net.a": 3, "net.b": 1}),
        (["attn", "attn"], {"attn": 2}),
    ],
)
def test_models_without_blocks(paths: list[str], counts: dict[str, int]) -> None:
    assert labels(*paths) == counts


# Pictures and tables

SIZE = Size(1, 1, 1, 1)


def record(rows: dict[str, str], text: str = "cache(fora)", **more: Any) -> Record:
    note = {
        "map": rows,
        "legend": step_map.LEGEND,
        "flops": {"before": 3000, "predicted": 2000, "measured": 1500},
        "bodies": 2,
        "peak cache bytes": 2**20,
    }
    notes = {"calls saved": 1, "calibration": {"error": 0.5}, "unet": note | more}
    return Record(text, True, False, 1.0, 0.1, 0.25, 0.25, [], notes, SIZE, SIZE)


def read(picture: Image.Image) -> list[str]:
    """Return the signs of the cells in a picture, line by line."""
    signs = {tuple(bytes.fromhex(step_map.COLOURS[m][1:])): s for s, m in step_map.LEGEND.items()}
    lines = [""]
    for y in range(picture.height):
        pixel_signs = [signs.get(picture.getpixel((x, y))) for x in range(picture.width)]  # type: ignore[call-overload]
        runs = [(sign, len(list(run))) for sign, run in groupby(pixel_signs)]
        line = "".join(sign for sign, pixels in runs if sign and pixels > 9)  # letters have less
        if line != lines[-1]:
            lines.append(line)
    return [line for line in lines if line]


@pytest.mark.parametrize("steps", [2, 12, 50])
def test_every_cell_has_its_place_and_colour(steps: int) -> None:
    table = {"conv_in": "#" * steps, "blocks.0": ("#+-~" * steps)[:steps], "out": "~" * steps}
    picture = heatmap.draw(record(table, f"cache(mask,{'10' * (steps // 2)})"))
    assert read(picture) == ["#+-~", *table.values()]


def test_many_steps_are_narrow() -> None:
    picture = heatmap.draw(record({"blocks.0": "#" * 400}))
    assert read(picture) == ["#+-~", "#"], "no lines between the cells"
    assert 800 < picture.width < 1100


def test_several_maps_are_one_below_the_other() -> None:
    first, second = {"a": "##-"}, {"b": "#~~~", "c": "####"}
    whole = program(lambda b, x: b(aten.relu.default, x), randn(2, 4))
    history = [asdict(record(first)), asdict(record({})), asdict(record(second))]
    whole.history.extend(history)
    assert read(heatmap.draw(whole)) == ["#+-~", "##-", "#+-~", "#~~~", "####"]


def test_the_tables_on_a_terminal_and_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(**how: Any) -> str:
        out = io.StringIO()
        console = Console(file=out, width=120, highlight=False, **how)
        monkeypatch.setattr(output, "stdout", lambda: console)
        output.records_table([record({"blocks.0": "#--~"})], timing=False, stats=True)
        return out.getvalue()

    plain = printed()
    assert "│ blocks.0 │ #--~ │" in plain
    assert "# computed   + in part   - reused   ~ extrapolated" in plain
    numbers = ["unet", "3 k", "2 k", "1.5 k", "2×", "2", "1", "0.25"]
    assert numbers in [[w.strip() for w in line.split("│")[1:-1]] for line in plain.splitlines()]
    assert "calls saved = 1" in plain
    assert "calibration = {'error': 0.5}" in plain
    assert "legend" not in plain
    coloured = printed(force_terminal=True, color_system="truecolor")
    for colour in step_map.COLOURS.values():
        red, green, blue = bytes.fromhex(colour[1:])
        assert f"48;2;{red};{green};{blue}m" in coloured


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program, and with a program and an engine of it that cache."""
    folder = tmp_path_factory.mktemp("cached")
    arguments = {**CASES["dit"].inputs(0), "num_inference_steps": 4}
    before = Pipeline.parse("unroll,hoist").run(diffopt.trace(CASES["dit"].build(), **arguments))
    before.save(folder / "before.program")
    cached = Pipeline.parse("cache(mask,1010,branches)").run(before)
    cached.save(folder / "cached.program")
    build(cached, "eager", folder / "cached.engine")
    return folder


@pytest.mark.parametrize("name", ["cached.program", "cached.engine"])
def test_inspect_draws_what_it_prints(diffopt: Run, folder: Path, name: str) -> None:
    done = diffopt("inspect", folder / name, "--picture", "heat.png")
    assert (done.code, done.err) == (0, "wrote heat.png\n")
    assert read(Image.open("heat.png")) == ["#+-~", "####", "#-#-", "#-#-", "####"]
    assert re.search(r"transformer_blocks\.0 *│ #-#- ", done.out)
    assert re.search(r"│ transformer │ +[\d.]+ M │", done.out)
    told = json.loads(diffopt("inspect", folder / name, "--json").out)
    note = told["passes"][-1]["notes"]["transformer"]
    assert note["map"]["transformer_blocks.1"] == "#-#-"
    assert note["legend"] == step_map.LEGEND
    assert note["flops"].keys() == {"before", "predicted", "measured"}


def test_optimize_prints_it_too(diffopt: Run, folder: Path) -> None:
    words = ("optimize", folder / "before.program", "-p", "cache(mask,1001,branches)")
    done = diffopt(*words, "--stats", "-o", "other.program")
    assert done.code == 0, done.err
    assert re.search(r"transformer_blocks\.0 *│ #--# ", done.out)


@pytest.mark.parametrize(
    ("name", "picture", "message"),
    [
        (
            "before.program",
            "heat.png",
            "no pass has made a step take values of earlier steps, so there is no map to draw: "
            "optimize with one that does, as in unroll,hoist,cache(fora)",
        ),
        (
            "cached.program",
            "heat.pdf",
            "the output's name must end in .png or .jpg or .jpeg or .webp, got 'heat.pdf'",
        ),
        ("cached.program", "no/heat.png", "there is no folder no to write heat.png into"),
    ],
)
def test_errors(
    diffopt: Run, folder: Path, tmp_path: Path, name: str, picture: str, message: str
) -> None:
    done = diffopt("inspect", folder / name, "--picture", picture)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"diffopt: error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_record_without_a_map_is_refused() -> None:
    with pytest.raises(DiffoptError, match="there is no map to draw"):
        heatmap.draw(record({}))
