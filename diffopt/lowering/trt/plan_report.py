"""Reports the kernels of a plan, without a GPU.

A plan of TensorRT's built-in compiler (Myelin) contains its program as text:

    main {
      function={ name=__myl_MulMinMaxRounCast … input_args={ "x0.1" … } output_args={ "q.1" } … }
      fully_connected={ name="mm" output={"y.1" } input={"q.1" "w_constantInt8" … } … }
      runtime_fusion={ name=__myl_CastMulCastFc input_args={ … } … binary=0 … backbone=gemm }

preceded by the type of every tensor, and followed by the same for each `runtime_…` step. So a
product of 8-bit integers can be told from one that widens 8-bit weights, before a GPU has run it.
Plans of builders that write no such text have an empty report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_TYPES = {"half": "fp16", "float": "fp32", "fp8_e4m3": "fp8"}
_NARROW_TYPES = ("int4", "int8", "fp8", "fp4")
_PRODUCTS = {"fully_connected": "gemm", "corrltn": "conv"}

_GRAPH = re.compile(rb"header \{\n.*?\nmain \{\n.*?\n\}", re.DOTALL)
_TENSOR = re.compile(
    rb'^  (?:sub_)?tensor=\{[^\n]* name="([^"]*)"[^\n]* type=(\w+) \}$', re.MULTILINE
)
_STEP = re.compile(rb"^ +(\w+)=\{ name=(.*?) \}$", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(rb'"([^"]*)"')


@dataclass(frozen=True)
class _Step:
    """A step of a plan: its kind, its text, and the types of its inputs."""

    kind: str
    text: bytes
    inputs: tuple[str, ...]


def kernels(plan: bytes) -> dict[str, int]:
    """Return the number of steps by kind: {"gemm int8": 4, "attention fp16": 1, "other": 9}.

    A product is named by the types in which it multiplies; "(int4 widened)" says that its kernel
    reads 4-bit values.
    """
    counts: Counter[str] = Counter()
    outer: list[_Step] = []
    inner: list[list[_Step]] = []
    for match in [*_GRAPH.finditer(plan), None]:
        if match is None or b"input_sync_idx" in match.group():  # the next program begins
            counts.update(_name(step, inner) for step in outer)
            outer, inner = [], []
        if match is not None:
            steps = _steps(match.group())
            if outer:
                inner.append(steps)
            else:
                outer = steps
    return dict(sorted(counts.items()))


def _steps(graph: bytes) -> list[_Step]:
    tensors, _, main = graph.rpartition(b"\nmain {\n")
    types = {n: t.decode() for n, t in _TENSOR.findall(tensors)}
    return [
        _Step(kind.decode(), text, _input_types(text, types)) for kind, text in _STEP.findall(main)
    ]


def _input_types(text: bytes, types: dict[bytes, str]) -> tuple[str, ...]:
    match = re.search(rb"input(?:_args)?=\{([^}]*)\}", text)
    names = _QUOTED.findall(match.group(1)) if match else []
    kinds = [types.get(name, "?") for name in names]
    return tuple(_TYPES.get(kind, kind) for kind in kinds)


def _name(step: _Step, inner: Sequence[Sequence[_Step]]) -> str:
    if step.kind in _PRODUCTS:
        return _product(step)
    if step.kind == "function" and b"mha" in step.text.partition(b" ")[0]:
        return f"attention {step.inputs[0]}"
    binary = re.search(rb"binary *= *(\d+)", step.text)
    if not step.kind.startswith("runtime_") or binary is None or int(binary[1]) >= len(inner):
        return "other"
    products = [step for step in inner[int(binary[1])] if step.kind in _PRODUCTS]
    if not products:
        return "other"
    narrow = sorted(
        {kind for kind in step.inputs if kind in _NARROW_TYPES} - set(products[0].inputs)
    )
    return _product(products[0]) + "".join(f" ({number} widened)" for number in narrow)


def _product(step: _Step) -> str:
    first, second = (*step.inputs, "?", "?")[:2]
    return f"{_PRODUCTS[step.kind]} {first}" + (f"×{second}" if second != first else "")


def totals(lines: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the bytes of a plan's weights and activations, from the builder's log."""
    totals = {}
    for _, text in lines:
        if match := re.match(r"Total (Weights|Activation) Memory: (\d+) bytes", text):
            totals[match.group(1).lower().removesuffix("s")] = int(match.group(2))
    return totals
