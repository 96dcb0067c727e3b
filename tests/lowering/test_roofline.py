"""The roofline: what is multiplied and moved, what bounds it, and how the command prints it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.engine.engine import build
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.program import Program
from diffopt.lowering.hardware import Hardware, hardware
from diffopt.lowering.roofline import Kernel, Work, roofline, work
from examples import roofline as example
from tests import loops
from tests.command import Run
from tests.passes.build import Builder, body, parameter, program, randn
from tests.quantized import pack, quantized

aten = torch.ops.aten

X = randn(4, 8)
SIZE = X.nbytes  # 128

# One operation a second of fp32, ten of bf16, one byte a second.
SLOW = Hardware("slow", "Slow", "cpu", 10**6, 1.0, {"fp32": 1.0, "bf16": 10.0, "fp16": 10.0})


def worked(make: Callable[..., Any], *samples: Tensor) -> Work:
    return work(body(make, *samples))


def kernels(cost: Work) -> list[tuple[int, int]]:
    """Return the FLOPs and bytes of the kernels, without those that move nothing."""
    return [(kernel.flops, kernel.bytes) for kernel in cost.kernels if kernel != Kernel()]


# What is moved


def test_a_product_reads_its_weights_and_writes_its_result() -> None:
    cost = worked(
        lambda make, x: make(aten.linear.default, x, parameter(16, 8), parameter(16, seed=1)), X
    )
    moved = SIZE + 4 * (16 * 8 + 16) + 4 * 4 * 16
    assert kernels(cost) == [(2 * 4 * 8 * 16, moved)]
    assert cost.most == cost.least == cost.bytes == moved
    assert cost.flops == {"fp32": 2 * 4 * 8 * 16}


def test_what_is_between_products_is_one_kernel() -> None:
    def make(make: Builder, x: fx.Node) -> fx.Node:
        first = make(aten.linear.default, x, parameter(8, 8))
        low = make(aten.mul.Tensor, make(aten.relu.default, first), 2.0)
        node: fx.Node = make(aten.linear.default, low, parameter(8, 8, seed=1))
        return node

    cost = worked(make, X)
    products, weight = 2 * 4 * 8 * 8, 4 * 8 * 8
    assert kernels(cost) == [
        (products, 2 * SIZE + weight),
        (0, 2 * SIZE),
        (products, 2 * SIZE + weight),
    ]
    assert cost.bytes == 6 * SIZE + 2 * weight
    assert cost.most == 8 * SIZE + 2 * weight  # between relu and mul, too
    assert cost.least == 2 * SIZE + 2 * weight


def test_a_sum_with_a_product_of_itself_is_no_part_of_its_kernel() -> None:
    def make(make: Builder, x: fx.Node) -> fx.Node:
        before = make(aten.relu.default, x)
        product = make(aten.linear.default, before, parameter(8, 8))
        node: fx.Node = make(aten.add.Tensor, before, product)
        return node

    cost = worked(make, X)
    assert kernels(cost) == [
        (0, 2 * SIZE),
        (2 * 4 * 8 * 8, 2 * SIZE + 4 * 8 * 8),
        (0, 3 * SIZE),  # joined with relu, it would not have to read what that wrote
    ]


def test_a_value_that_several_read_is_read_by_each_kernel() -> None:
    def make(make: Builder, x: fx.Node) -> list[fx.Node]:
        low = make(aten.relu.default, x)
        return [make(aten.linear.default, low, parameter(8, 8, seed=n)) for n in (0, 1)]

    cost = worked(make, X)
    assert cost.bytes == 2 * SIZE + 2 * (2 * SIZE + 4 * 8 * 8)


def test_views_cost_nothing_and_parts_are_read_once() -> None:
    def make(make: Builder, x: fx.Node) -> fx.Node:
        product = make(aten.linear.default, x, parameter(8, 8))
        parts = [make(aten.slice.Tensor, product, 1, start, start + 4) for start in (0, 4)]
        transposed = [make(aten.t.default, part) for part in parts]
        node: fx.Node = make(aten.mm.default, parts[0], transposed[1])
        return node

    first, second = worked(make, X).kernels
    assert first.bytes == 2 * SIZE + 4 * 8 * 8
    assert (second.flops, second.bytes) == (2 * 4 * 4 * 4, SIZE + 4 * 4 * 4)


def test_the_same_part_read_twice_is_read_once() -> None:
    cost = worked(lambda make, x: make(aten.add.Tensor, x, make(aten.mul.Tensor, x, x)), X)
    assert kernels(cost) == [(0, 2 * SIZE)]


def test_repeated_numbers_are_read_once() -> None:
    def make(make: Builder, x: fx.Node, row: fx.Node) -> fx.Node:
        node: fx.Node = make(aten.add.Tensor, x, make(aten.expand.default, row, [4, 8]))
        return node

    cost = worked(make, X, randn(1, 8))
    assert kernels(cost) == [(0, 2 * SIZE + 4 * 8)]


def test_of_a_table_only_the_rows_that_are_asked_for_are_read() -> None:
    index = torch.tensor([1, 5])
    cost = worked(lambda make, i: make(aten.embedding.default, parameter(1000, 8), i), index)
    assert kernels(cost) == [(0, 2 * 4 * 8 + index.nbytes + 2 * 4 * 8)]


def test_constants_are_made_ahead() -> None:
    def make(make: Builder, x: fx.Node) -> fx.Node:
        weight = make(aten.mul.Tensor, parameter(8, 8), 2.0)
        node: fx.Node = make(aten.linear.default, x, weight)
        return node

    cost = worked(make, X)
    assert kernels(cost) == [(2 * 4 * 8 * 8, 2 * SIZE + 4 * 8 * 8)]


def test_results_of_several_values() -> None:
    x = randn(2, 8, 4)

    def make(make: Builder, x: fx.Node) -> fx.Node:
        norm = make(aten.native_group_norm.default, x, None, None, 2, 8, 4, 2, 1e-5)
        picked: fx.Node = make(operator.getitem, norm, 0)
        return picked

    cost = worked(make, x)
    assert kernels(cost) == [(0, 3 * x.nbytes + 2 * 2 * 2 * 4)]  # with means and deviations


def test_a_group_norm_reads_its_input_twice() -> None:
    x = randn(2, 8, 4)

    def make(make: Builder, x: fx.Node, elementwise: bool) -> fx.Node:
        weight = parameter(8, 8, 1)
        before = make(aten.relu.default, x) if elementwise else make(aten.conv1d.default, x, weight)
        norm = make(aten.group_norm.default, before, 2)
        node: fx.Node = make(aten.silu.default, norm)
        return node

    product, norm = worked(partial(make, elementwise=False), x).kernels
    assert (product.bytes, norm.bytes) == (2 * x.nbytes + 4 * 8 * 8, 3 * x.nbytes)
    relu, norm = worked(partial(make, elementwise=True), x).kernels
    assert (relu.bytes, norm.bytes) == (2 * x.nbytes, 2 * x.nbytes)  # relu adds up what it makes


# Formats


def layer(number: qdq.Number, scaling: qdq.Scaling | None, group: int | None = None) -> Work:
    """Return the work of one quantized layer, whose input something else has computed."""

    def make(make: Builder, x: fx.Node) -> fx.Node:
        low = make(aten.relu.default, x)
        low = qdq.quantize(make.gm, low, scaling, number="int8") if scaling else low
        packed = pack(parameter(16, 8), number, group)
        weight = qdq.place_weight(make.gm, "weight", packed, torch.float32)
        node: fx.Node = make(aten.linear.default, low, weight)
        return node

    return worked(make, X)


def test_weights_are_read_as_they_are_stored() -> None:
    scales = 4 * 16
    for number, stored in (("int8", 16 * 8), ("int4", 16 * 8 // 2), ("fp8", 16 * 8)):
        cost = layer(number, None)  # type: ignore[arg-type]
        assert cost.flops == {"fp32": 2 * 4 * 8 * 16}
        assert cost.kernels[-1].bytes == SIZE + stored + scales + 4 * 4 * 16


def test_products_of_integers() -> None:
    cost = layer("int8", "rows")
    assert cost.flops == {"int8": 2 * 4 * 8 * 16}
    # A byte for each input: its scales are applied to the result, by whom is left open.
    assert cost.kernels[-1].bytes == 4 * 8 + 16 * 8 + 4 * 16 + 4 * 4 * 16


def test_a_scale_for_each_group_makes_products_of_floats() -> None:
    assert layer("int8", "rows", group=4).flops == {"fp32": 2 * 4 * 8 * 16}


def test_fp8_weights_with_int8_inputs_make_products_of_floats() -> None:
    assert layer("fp8", "rows").flops == {"fp32": 2 * 4 * 8 * 16}


def test_attention_counts_in_its_own_format() -> None:
    q = randn(1, 2, 16, 8).bfloat16()
    cost = worked(lambda make, q: make(aten.scaled_dot_product_attention.default, q, q, q), q)
    assert cost.flops == {"bf16": 2 * 2 * 2 * 16 * 16 * 8}
    assert cost.bytes == 2 * q.nbytes


# Time


def test_the_slower_of_the_two_is_the_bound() -> None:
    assert Kernel("fp32", 7, 3).seconds(SLOW) == (7.0, "compute")
    assert Kernel("bf16", 7, 3).seconds(SLOW) == (3.0, "memory")
    assert Kernel("int8", 7, 3).seconds(SLOW) == (7.0, "compute")  # widened to fp32


def test_kernels_follow_each_other() -> None:
    def make(make: Builder, x: fx.Node) -> fx.Node:
        node: fx.Node = make(aten.relu.default, make(aten.linear.default, x, parameter(8, 8)))
        return node

    model = program(lambda m, x: m.call("net", x)[0], X, net=body(make, X))
    row, outer = roofline(model, replace(SLOW, bandwidth=2.0)).rows
    assert (row.bytes, row.least) == (4 * SIZE + 4 * 8 * 8, 2 * SIZE + 4 * 8 * 8)
    assert row.seconds == 2 * 4 * 8 * 8 + 2 * SIZE / 2  # a product, and what moving the rest takes
    assert (row.bound, row.limit) == ("compute", 2 * 4 * 8 * 8)
    assert (outer.component, outer.flops, outer.seconds) == ("program", {}, 0.0)
    narrow, _ = roofline(model, replace(SLOW, bandwidth=0.5)).rows
    assert (narrow.seconds, narrow.bound) == (2.0 * narrow.bytes, "memory")
    assert narrow.limit == 2.0 * narrow.least


def test_faster_hardware_is_faster() -> None:
    model = loops.program()
    estimates = [roofline(model, hardware(name)) for name in ("t4", "a10", "a100", "h100", "b200")]
    assert [r.seconds for r in estimates] == sorted((r.seconds for r in estimates), reverse=True)
    assert all(0 < r.limit <= r.seconds for r in estimates)


# Programs


def test_every_operation_of_a_program_is_counted() -> None:
    model = loops.program()
    estimate = roofline(model, hardware("h100"))
    assert sum(row.calls * sum(row.flops.values()) for row in estimate.rows) == model.flops()
    assert estimate.weights == g.tensor_bytes(model.weights().values())
    assert [row.component for row in estimate.rows][-1] == "program"
    (denoiser,) = [row for row in estimate.rows if row.calls > 1]
    assert denoiser.steps == tuple(range(denoiser.calls))


def test_fewer_bits_move_fewer_bytes() -> None:
    plain = loops.program()
    small = quantized(plain, "int8", "static")
    h100 = hardware("h100")
    before, after = roofline(plain, h100), roofline(small, h100)
    assert sum(r.least for r in after.rows) < sum(r.least for r in before.rows)
    assert any("int8" in row.flops for row in after.rows)


def test_what_the_device_lacks_is_refused() -> None:
    x = X.bfloat16()
    relu = program(lambda make, x: make(aten.relu.default, x), x)
    with pytest.raises(DiffoptError) as caught:
        roofline(relu, hardware("t4"))
    assert str(caught.value).startswith("t4 cannot run this program: in the program x is in bf16")


# The command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roofline") / "loop.program"
    loops.program().save(path)
    return path


def test_inspect_with_a_target(diffopt: Run, saved: Path) -> None:
    text = diffopt("inspect", saved, "--target", "h100").out
    assert f"{saved} on h100: " in text
    assert "bound by" in text
    assert "of 80 GB memory" in text
    cores = diffopt("inspect", saved, "-t", "cpu-amx(threads=2)").out
    assert "on cpu-amx, 2 cores: " in cores


def test_inspect_with_a_target_as_json(diffopt: Run, saved: Path) -> None:
    told = json.loads(diffopt("inspect", saved, "--target", "rtx4090", "--json").out)
    estimate = roofline(Program.load(saved), hardware("rtx4090"))
    assert told["hardware"]["name"] == "rtx4090"
    assert told["seconds"] == estimate.seconds
    assert told["limit"] == estimate.limit
    assert [row["bytes"] for row in told["components"]] == [row.bytes for row in estimate.rows]


def test_inspect_with_a_wrong_target(diffopt: Run) -> None:
    done = diffopt("inspect", "none.program", "--target", "h1000")
    assert done.code == 2
    assert done.err.startswith("diffopt: error: there is no target 'h1000'; did you mean 'h100'?")


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loop.engine"
    build(loops.program(), "eager", path)
    example.main(str(path))
    *_, last = capsys.readouterr().out.splitlines()
    name, *times = (cell.strip() for cell in last.strip("|").split("|"))
    limit, predicted, measured, _ = map(float, times)
    assert name == str(path)
    assert limit <= predicted <= measured
