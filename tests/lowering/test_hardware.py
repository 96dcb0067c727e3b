"""Devices: what is described, what they lack, how targets name them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from diffopt import plugins
from diffopt.core import Progress
from diffopt.engine.engine import build
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering import hardware, legality, target
from diffopt.lowering.hardware import FORMATS, Hardware, hardware_names
from diffopt.lowering.target import Lowered, Target, parse_hardware, parse_target
from tests.command import Run
from tests.passes.build import Builder, body, parameter, program, randn
from tests.quantized import quantized

aten = torch.ops.aten

GPUS = {
    *("a100", "a100-40gb", "h100", "h200", "b200", "l4", "l40s", "a10", "t4"),
    *("rtx3090", "rtx4090", "rtx5090", "jetson-orin"),
}
names = pytest.mark.parametrize("name", sorted({*GPUS, "cpu", "cpu-amx"}))

BOX = Hardware("box", "A box", "cpu", 10**9, 1e9, {"fp32": 1e9}, sources=("its label",))


# What is described


def test_all_devices_are_described() -> None:
    assert {*GPUS, "cpu", "cpu-amx"} <= set(hardware_names())


@names
def test_a_description_is_whole(name: str) -> None:
    device = hardware.hardware(name)
    assert device.name == name
    assert device.kind == ("cuda" if name in GPUS else "cpu")
    assert device.memory > device.bandwidth / 1000 > 0
    assert (device.capability is not None) == (device.cores == 0) == (device.kind == "cuda")
    assert "fp32" in device.peak
    assert {*device.peak, *device.stored} <= set(FORMATS)
    assert device.sources
    hash(device)


@names
def test_smaller_numbers_are_no_slower(name: str) -> None:
    peak = hardware.hardware(name).peak
    for wide, narrow in (("fp32", "tf32"), ("tf32", "bf16"), ("bf16", "fp8"), ("bf16", "int8")):
        if wide in peak and narrow in peak:
            assert peak[wide] <= peak[narrow]
    if name in GPUS and "bf16" in peak:
        assert peak["bf16"] == peak["fp16"]


def test_rates_are_dense_and_sum_in_fp32() -> None:
    def rate(name: str, number: str) -> float:
        return hardware.hardware(name).peak[number] / 1e12

    # Tensor cores' multiply-adds a cycle: SMs · clock in GHz · operations of an SM.
    assert rate("a100", "bf16") == pytest.approx(108 * 1.410 * 2048 / 1e3, rel=0.01)
    assert rate("h100", "fp8") == pytest.approx(132 * 1.830 * 8192 / 1e3, rel=0.01)
    assert rate("t4", "fp16") == pytest.approx(40 * 1.590 * 1024 / 1e3, rel=0.01)
    # Half of what they are where sums are kept in fp16, and a quarter of those of int8.
    for name in ("rtx3090", "rtx4090", "rtx5090"):
        assert rate(name, "int8") == pytest.approx(4 * rate(name, "fp16"), rel=0.01)
    assert rate("rtx4090", "fp8") == pytest.approx(128 * 2.520 * 1024 / 1e3, rel=0.01)
    assert rate("cpu-amx", "int8") == pytest.approx(56 * 2.0 * 2048 / 1e3, rel=0.01)


@pytest.mark.parametrize(
    ("name", "what", "reason"),
    [
        ("h100", "fp8", None),
        ("h100", "2:4", None),
        ("rtx5090", "fp4", None),
        ("a100", "fp8", "they need compute capability 8.9, and it has 8.0"),
        ("t4", "bf16", "they need compute capability 8.0, and it has 7.5"),
        ("t4", "2:4", "they need compute capability 8.0, and it has 7.5"),
        ("h100", "int4", "GPUs lost them with compute capability 9.0, and it has 9.0"),
        ("l4", "int4", "NVIDIA L4 Tensor Core GPU datasheet (rates: half of those with sparsity) "),
        ("cpu", "fp8", "they need a GPU of compute capability 8.9"),
        ("cpu-amx", "2:4", "they need a GPU of compute capability 8.0"),
    ],
)
def test_what_a_device_lacks(name: str, what: str, reason: str | None) -> None:
    message = hardware.hardware(name).lacks(what)
    kind = "2:4 sparse" if what == "2:4" else what
    if reason is None:
        assert message is None
    elif "datasheet" in reason:
        assert message == f"{name} has no {kind} products: {reason}names none"
    else:
        assert message == f"{name} has no {kind} products: {reason}"


def test_a_format_that_does_not_exist() -> None:
    with pytest.raises(DiffoptError) as caught:
        BOX.lacks("fp9")
    assert str(caught.value) == "there is no format of numbers 'fp9'; did you mean 'fp8'?"


def test_weights_may_be_stored_in_more_formats() -> None:
    assert hardware.hardware("h100").can_store("int4")
    assert not hardware.hardware("a100").can_store("fp8")
    assert hardware.hardware("cpu").can_store("fp8")


def test_a_share_of_a_cpu() -> None:
    whole = hardware.hardware("cpu-amx")
    quarter = whole.with_cores(14)
    assert quarter.cores == 14
    assert quarter.bandwidth == whole.bandwidth / 4
    assert quarter.peak["bf16"] == whole.peak["bf16"] / 4
    assert quarter.memory == whole.memory
    assert whole.with_cores(0) == whole.with_cores(500) == whole
    h100 = hardware.hardware("h100")
    assert h100.with_cores(2) is h100


# Devices of other packages


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points of the group of devices, as if packages had been installed."""
    installed: list[EntryPoint] = []
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: installed if group == "diffopt.devices" else []
    )
    monkeypatch.setattr(hardware, "_sources", hardware._sources.__wrapped__)
    return installed


def test_a_device_of_another_package(entries: list[EntryPoint]) -> None:
    entries.append(EntryPoint("box", "tests.lowering.test_hardware:BOX", "diffopt.devices"))
    assert "box" in hardware_names()
    target = parse_target("box:eager")
    assert str(target) == "box:eager"
    assert target.hardware is not None
    assert target.hardware.title == "A box"


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        (
            "h100",
            "mine:H100",
            "two devices are called 'h100': targets/devices.toml and mine:H100;"
            " uninstall or rename one",
        ),
        (
            "bix",
            "tests.lowering.test_hardware:BOX",
            "tests.lowering.test_hardware:BOX is not a Hardware named 'bix'",
        ),
        (
            "gpus",
            "tests.lowering.test_hardware:GPUS",
            "tests.lowering.test_hardware:GPUS is not a Hardware named 'gpus'",
        ),
    ],
)
def test_wrong_entry_points(entries: list[EntryPoint], name: str, place: str, message: str) -> None:
    entries.append(EntryPoint(name, place, "diffopt.devices"))
    with pytest.raises(DiffoptError) as caught:
        hardware.hardware(name)
    assert str(caught.value) == message


# Targets by name


@dataclass(frozen=True)
class Plans(Target):
    """Take GPUs, and compile nothing."""

    name = "plans"
    kinds = ("cuda",)

    size: int = target.option(0, "an option")

    def compile(self, program: Program, progress: Progress) -> Lowered:
        raise AssertionError("compiled what is refused")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering for GPUs beside those for CPUs, and none that is the default of GPUs."""
    known = {n: f"diffopt.targets.{n}:{n.capitalize()}" for n in ("cpu", "eager")}
    monkeypatch.setattr(
        target, "_sources", lambda: {**known, "plans": "tests.lowering.test_hardware:Plans"}
    )


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(
    ("text", "name", "device"),
    [
        ("h100:plans", "plans", "h100"),
        ("rtx4090:plans(size=3)", "plans", "rtx4090"),
        ("cpu", "cpu", ""),
        ("cpu-amx", "cpu", "cpu-amx"),
        ("cpu-amx(threads=2)", "cpu", "cpu-amx"),
        ("eager", "eager", ""),
        ("cpu:eager", "eager", "cpu"),
    ],
)
def test_texts_that_parse_and_print(text: str, name: str, device: str) -> None:
    target = parse_target(text)
    assert (target.name, target.device) == (name, device)
    assert str(target) == text
    assert parse_target(str(target)) == target
    assert hash(target) == hash(parse_target(text))


@pytest.mark.usefixtures("plans")
def test_a_lowering_named_as_a_device() -> None:
    assert parse_target("cpu:cpu") == parse_target("cpu")
    assert parse_target("cpu-amx:cpu") == parse_target("cpu-amx")


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10", "there is no target 'h10'; did you mean 'h100'?\n  h10\n  ^^^"),
        ("h10:plans", "there is no device 'h10'; did you mean 'h100'?\n  h10:plans\n  ^^^"),
        (
            "h100:plan(size=3)",
            "there is no lowering 'plan'; did you mean 'plans'?\n  h100:plan(size=3)\n       ^^^^",
        ),
        ("h100", "h100 needs a lowering: h100:plans\n  h100\n  ^^^^"),
        (
            "h100:eager",
            "eager does not take h100; it takes cpu, cpu-amx\n  h100:eager\n       ^^^^^",
        ),
        ("h100:", "wants DEVICE:LOWERING, got 'h100:'\n  h100:\n  ^^^^^"),
        (":plans", "wants DEVICE:LOWERING, got ':plans'\n  :plans\n  ^^^^^^"),
        (
            "h100:plans(sise=3)",
            "h100:plans has no option 'sise'; did you mean 'size'?\n"
            "  h100:plans(sise=3)\n             ^^^^",
        ),
        (
            "h100:plans(device=a100)",
            "h100:plans has no option 'device'; there are size\n"
            "  h100:plans(device=a100)\n             ^^^^^^",
        ),
    ],
)
def test_texts_that_do_not_parse(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        parse_target(text)
    assert str(caught.value) == message


@pytest.mark.usefixtures("plans")
def test_a_lowering_that_needs_a_device() -> None:
    with pytest.raises(DiffoptError) as caught:
        parse_target("plans")
    first, *_ = str(caught.value).splitlines()
    ways = ", ".join(f"{name}:plans" for name in hardware_names() if name in GPUS)
    assert first == f"plans needs a device: {ways}"


@pytest.mark.usefixtures("plans")
def test_the_device_of_a_text() -> None:
    assert parse_hardware("h100").name == parse_hardware("h100:plans").name == "h100"
    assert parse_hardware("cpu").cores == 64
    assert parse_hardware("cpu-amx(threads=2)").cores == 2
    with pytest.raises(DiffoptError) as caught:
        parse_hardware("eager")
    known = ", ".join(hardware_names())
    assert str(caught.value) == f"target eager names no device: write one of {known}"


# Formats that a device lacks


def layers() -> Program:
    """Return a program of one linear layer in a component."""

    def make(make: Builder, x: torch.fx.Node) -> torch.fx.Node:
        node: torch.fx.Node = make(aten.linear.default, x, parameter(8, 8))
        return node

    x = randn(4, 8)
    return program(lambda m, x: m.call("net", x)[0], x, net=body(make, x))


def test_fp8_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    model = quantized(layers(), "fp8", "dynamic")
    with pytest.raises(DiffoptError) as caught:
        build(model, Plans(device="a100"), tmp_path / "x")
    (node,) = model.components["net"].graph.find_nodes(
        op="call_function", target=aten.linear.default
    )
    assert str(caught.value) == (
        f"target a100:plans cannot take this program: in net the input of {node.name} is in fp8,"
        " and a100 has no fp8 products: they need compute capability 8.9, and it has 8.0;"
        " quantize activations to int8, or weights alone"
    )
    with pytest.raises(AssertionError, match="compiled"):
        build(model, Plans(device="h100"), tmp_path / "x")
    with pytest.raises(AssertionError, match="compiled"):
        build(model, Plans(), tmp_path / "x")  # nothing is known of the device


def test_stored_fp8_is_refused_where_nothing_widens_it() -> None:
    model = quantized(layers(), "fp8", None)
    assert legality.unsupported(model, hardware.hardware("a100")) == (
        "in net weight_fp8 is in fp8, and a100 has no fp8 products: they need compute capability"
        " 8.9, and it has 8.0; quantize to int8 or int4"
    )
    assert legality.unsupported(model, hardware.hardware("cpu")) is None
    assert legality.unsupported(model, hardware.hardware("l4")) is None


def test_int4_weights_are_widened() -> None:
    model = quantized(layers(), "int4", "static")
    for name in GPUS:
        assert legality.unsupported(model, hardware.hardware(name)) is None
    without = replace(hardware.hardware("h100"), stored=())
    assert legality.unsupported(model, without) == (
        "in net unpack_int4_default is in int4, and h100 has no int4 products: GPUs lost them with"
        " compute capability 9.0, and it has 9.0; quantize to int8 or fp8"
    )


def test_int8_inputs_where_there_are_no_integers() -> None:
    model = quantized(layers(), "int8", "rows")
    (node,) = model.components["net"].graph.find_nodes(
        op="call_function", target=aten.linear.default
    )
    assert legality.unsupported(model, BOX) == (
        f"in net the input of {node.name} is in int8, and box has no int8 products: they need a GPU"
        " of compute capability 7.5; quantize weights alone"
    )


def test_bf16_is_refused_on_turing() -> None:
    x = randn(4, 8).bfloat16()
    relu = program(lambda make, x: make(aten.relu.default, x), x)
    assert legality.unsupported(relu, hardware.hardware("t4")) == (
        "in the program x is in bf16, and t4 has no bf16 products: they need compute capability"
        " 8.0, and it has 7.5; cast to fp16 or fp32"
    )
    assert legality.unsupported(relu, hardware.hardware("a10")) is None


# The command line


def test_targets_are_listed(diffopt: Run) -> None:
    text = diffopt("targets").out
    assert all(name in text for name in (*hardware_names(), "eager"))
    rows = json.loads(diffopt("targets", "--json").out)
    assert {row["name"] for row in rows if row["kind"] == "device"} == set(hardware_names())
    assert {row["name"] for row in rows if row["kind"] == "lowering"} >= {"cpu", "eager"}


def test_a_device_is_described(diffopt: Run) -> None:
    text = diffopt("targets", "h100").out
    assert "device h100: NVIDIA H100 SXM" in text
    assert "3350 GB/s" in text
    assert "989.4·10¹² operations a second" in text
    assert "h100 has no fp4 products: they need compute capability 10.0" in text
    assert "source: NVIDIA H100 Tensor Core GPU datasheet" in text
    (row,) = json.loads(diffopt("targets", "h100", "--json").out)
    assert row["kind"] == "device"
    assert row["peak"]["fp8"] == 1978.9e12
    assert row["capability"] == [9, 0]


def test_what_is_both_a_lowering_and_a_device(diffopt: Run) -> None:
    text = diffopt("targets", "cpu").out
    assert "options of cpu" in text
    assert "device cpu: AMD EPYC 7763" in text
    assert [row["kind"] for row in json.loads(diffopt("targets", "cpu", "--json").out)] == [
        "lowering",
        "device",
    ]


def test_a_wrong_target_is_told_before_tracing(diffopt: Run) -> None:
    done = diffopt("optimize", "none.program", "--passes=", "-t", "h1000:eager", "-o", "a.engine")
    assert done.code == 2
    assert done.err.startswith("diffopt: error: there is no device 'h1000'; did you mean 'h100'?")
