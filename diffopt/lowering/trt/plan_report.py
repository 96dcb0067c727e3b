"""What is in a plan, as far as the builder says it without a GPU.

A plan of the compiler that TensorRT has built in holds its program as text:

    main {
      function={ name=__myl_MulMinMaxRounCast … input_args={ "x0.1" … } output_args={ "q.1" } … }
      fully_connected={ name="mm" output={"y.1" } input={"q.1" "w_constantInt8" … } … }
      runtime_fusion={ name=__myl_CastMulCastFc input_args={ … } … binary=0 … backbone=gemm }

with the type of every tensor in front of it, and behind it the same for each `runtime_…` step. So
one can tell a product of 8-bit integers from one that widens 8-bit weights, before any GPU has run
it. A builder that writes no such text gives no such table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_TYPES = {"half": "fp16", "float": "fp32", "fp8_e4m3": "fp8"}
_NARROW = ("int4", "int8", "fp8", "fp4")
_PRODUCTS = {"fully_connected": "gemm", "corrltn": "conv"}

_GRAPH = re.compile(rb"header \{\n.*?\nmain \{\n.*?\n\}", re.DOTALL)
_TENSOR = re.compile(
    rb'^  (?:sub_)?tensor=\{[^\n]* name="([^"]*)"[^\n]* type=(\w+) \}$', re.MULTILINE
)
_STEP = re.compile(rb"^ +(\w+)=\{ name=(.*?) \}$", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(rb'"([^"]*)"')


@dataclass(frozen=True)
class _Step:
    """A step of a plan: its kind, its text, and the types of its operands and results."""

    kind: str
    text: bytes
    takes: tuple[str, ...]
    gives: tuple[str, ...]


def kernels(plan: bytes) -> dict[str, int]:
    """Return how many steps of a plan do what: {"gemm int8": 4, "attention fp16": 1, "other": 9}.

    A product is named by the types that its operands have in it; the kernel of one with "(int4
    widened)" reads numbers of 4 bits.
    """
    counts: Counter[str] = Counter()
    outer: list[_Step] = []
    inner: list[list[_Step]] = []
    for found in [*_GRAPH.finditer(plan), None]:
        if found is None or b"input_sync_idx" in found.group():
            counts.update(_name(step, inner) for step in outer)
            outer, inner = [], []
        if found is not None:
            steps = _steps(found.group())
            if outer:
                inner.append(steps)
            else:
                outer = steps
    return dict(sorted(counts.items()))


def _steps(graph: bytes) -> list[_Step]:
    tensors, _, main = graph.rpartition(b"\nmain {\n")
    types = {n: t.decode() for n, t in _TENSOR.findall(tensors)}
    steps = []
    for kind, text in _STEP.findall(main):
        takes, gives = (_operands(text, word, types) for word in (rb"input", rb"output"))
        steps.append(_Step(kind.decode(), text, takes, gives))
    return steps


def _operands(text: bytes, word: bytes, types: dict[bytes, str]) -> tuple[str, ...]:
    found = re.search(word + rb"(?:_args)?=\{([^}]*)\}", text)
    names = _QUOTED.findall(found.group(1)) if found else []
    kinds = [types.get(name, "?") for name in names]
    return tuple(_TYPES.get(kind, kind) for kind in kinds)


def _name(step: _Step, inner: Sequence[Sequence[_Step]]) -> str:
    if step.kind in _PRODUCTS:
        return _product(step)
    if step.kind == "function" and b"mha" in step.text.partition(b" ")[0]:
        return f"attention {step.takes[0]}"
    binary = re.search(rb"binary *= *(\d+)", step.text)
    if not step.kind.startswith("runtime_") or binary is None or int(binary[1]) >= len(inner):
        return "other"
    products = [own for own in inner[int(binary[1])] if own.kind in _PRODUCTS]
    if not products:
        return "other"
    narrow = sorted({kind for kind in step.takes if kind in _NARROW} - set(products[0].takes))
    return _product(products[0]) + "".join(f" ({number} widened)" for number in narrow)


def _product(step: _Step) -> str:
    first, second = (*step.takes, "?", "?")[:2]
    return f"{_PRODUCTS[step.kind]} {first}" + (f"×{second}" if second != first else "")


def totals(lines: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the bytes that the builder's log says a plan needs, for weights and activations."""
    found = {}
    for _, text in lines:
        if match := re.match(r"Total (Weights|Activation) Memory: (\d+) bytes", text):
            found[match.group(1).lower().removesuffix("s")] = int(match.group(2))
    return found
