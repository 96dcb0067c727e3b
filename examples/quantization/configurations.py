"""The configurations: passes after `unroll,hoist,simplify,fuse`.

Leading passes `unroll`, with other steps, and `cache` take their places in that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from diffopt.core import Pipeline
from examples.study.study import REFERENCE
from examples.study.texts import passes

ONE_STEP = "ranges of one step: "
"""The prefix of a configuration that is calibrated only at the step in the middle."""

BF16 = "cast(bf16)"
CACHE = "cache(auto,speedup=2)"
SHORTCUTS = "up_blocks.*conv_shortcut"


def quantized(options: str) -> str:
    """Return the configuration that quantizes like this, with bf16 for the rest."""
    return f"{BF16},quantize({options})"


INT8 = quantized("int8")
INT4 = quantized("int4")
FP8 = quantized("fp8")
INT8_ONE_STEP = f"{ONE_STEP}{INT8}"
INT8_ONE_GROUP = quantized("int8,groups=1")
INT8_UNSPLIT = quantized("int8,split=false")
INT8_KEEP = quantized("int8,keep=first:2,last:2")
INT8_SMOOTH = quantized("int8,smooth=true")
SHORTCUTS_INT8 = quantized(f"int8,layers={SHORTCUTS}")
SHORTCUTS_UNSPLIT = quantized(f"int8,layers={SHORTCUTS},split=false")
INT4_ADAROUND = quantized("int4,rounding=adaround")
INT4_RANK = quantized("int4,rank=16")
INT4_RANK_32 = quantized("int4,rank=32")
INT4_BOTH = quantized("int4,rounding=adaround,rank=16")
INT4_ALL = quantized("int4,components=*")
CACHE_INT8 = f"{CACHE},{INT8}"

ACTIVATIONS = tuple(quantized(f"int8,activations={a}") for a in ("dynamic", "rows", "none"))
OBSERVERS = tuple(quantized(f"int8,observer={o}") for o in ("percentile", "mse", "entropy"))
INT4_WEIGHTS = quantized("int4,activations=none")
LARGE = (REFERENCE, BF16, INT8, INT4, INT4_WEIGHTS, INT4_ALL)
"""Configurations of larger models, which are only timed."""
BUDGETS = tuple(quantized(f"auto,budget={b}") for b in (0.02, 0.05))


def fewer(steps: int, then: str) -> str:
    """Return what has fewer steps and is like another configuration otherwise."""
    return f"unroll(steps={steps}),{then}"


FEWER = {25: (23, 20, 17), 50: (46, 40, 33)}
"""Steps at which bf16 takes about as long as int8 does with all of them, by all steps."""

MAIN = (
    REFERENCE,
    BF16,
    INT8,
    INT8_ONE_STEP,
    INT4,
    INT4_ADAROUND,
    INT4_RANK,
    INT4_RANK_32,
    INT4_BOTH,
)
CONFIGS: Mapping[int, tuple[str, ...]] = {
    25: (
        *MAIN,
        *(fewer(n, BF16) for n in FEWER[25]),
        INT8_UNSPLIT,
        SHORTCUTS_INT8,
        SHORTCUTS_UNSPLIT,
        INT8_ONE_GROUP,
        *ACTIVATIONS,
        INT4_WEIGHTS,
        INT4_ALL,
        FP8,
        *OBSERVERS,
        INT8_SMOOTH,
        INT8_KEEP,
        *BUDGETS,
        CACHE,
        f"{CACHE},{BF16}",
        CACHE_INT8,
    ),
    50: (*MAIN, *(fewer(n, BF16) for n in FEWER[50]), CACHE, f"{CACHE},{BF16}", CACHE_INT8),
}
"""By steps."""

EMULATED = (FP8, INT8_ONE_STEP, INT8_ONE_GROUP, SHORTCUTS_INT8, SHORTCUTS_UNSPLIT, *OBSERVERS)
"""Configurations that are not timed: the CPU has no kernels for them, or the same as for others."""


@dataclass(frozen=True)
class Pair:
    """Two configurations that differ in one thing.

    Attributes:
        what: A description of the difference.
        having: The configuration that has it.
        lacking: The one that does not.
        goal: Whether it is a goal that the first is nearer to the reference.
    """

    what: str
    having: str
    lacking: str
    goal: bool = False


PAIRS = (
    Pair("ranges for each group of steps, not of one step", INT8, INT8_ONE_STEP, goal=True),
    Pair("ranges for each group of steps, not one for all", INT8, INT8_ONE_GROUP),
    Pair("operands of concatenations apart", INT8, INT8_UNSPLIT),
    Pair("the same, only shortcuts quantized", SHORTCUTS_INT8, SHORTCUTS_UNSPLIT, goal=True),
    Pair("four steps not quantized", INT8_KEEP, INT8),
    *(Pair(f"other ranges: {c.rpartition('=')[2][:-1]}", c, INT8) for c in OBSERVERS),
    Pair("smoothed, W8A8", INT8_SMOOTH, INT8),
    Pair("rounding learned, W4A8", INT4_ADAROUND, INT4),
    Pair("a branch of rank 16, W4A8", INT4_RANK, INT4),
    Pair("both, W4A8", INT4_BOTH, INT4),
)

SUMS = ((CACHE_INT8, (CACHE, INT8)), (f"{CACHE},{BF16}", (CACHE, BF16)))
"""Configurations, and their parts."""

FOUR_BITS = (INT4_ADAROUND, INT4_RANK, INT4_RANK_32, INT4_BOTH)
"""Configurations that improve on 4-bit weights rounded to nearest."""


def split(config: str) -> tuple[str, str]:
    """Return the leading passes of a configuration, as a configuration, and the passes after."""
    text = config.removeprefix(ONE_STEP)
    if text == REFERENCE:
        return REFERENCE, ""
    Pipeline.parse(text)  # raises an error that shows what is wrong
    calls = passes(text)
    front = [*takewhile(_is_front, calls)]
    return ",".join(front) or REFERENCE, ",".join(calls[len(front) :])


def beginning(front: str) -> str:
    """Return the whole pipeline of leading passes."""
    calls = [] if front == REFERENCE else passes(front)
    unroll = next((step for step in calls if step.startswith("unroll")), "unroll")
    caches = [step for step in calls if step.startswith("cache")]
    return ",".join([unroll, "hoist", *caches, "simplify", "fuse"])


def _is_front(step: str) -> bool:
    return step.startswith(("unroll", "cache"))
