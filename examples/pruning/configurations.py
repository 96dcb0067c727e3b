"""What is compared: what comes between `unroll` and `hoist`, and around `simplify,fuse`."""

from collections.abc import Mapping, Sequence

from diffopt.errors import DiffoptError
from diffopt.pruning.importance import METHODS
from examples.study.study import REFERENCE
from examples.study.texts import name_of, passes

RATIOS = (0.15, 0.3, 0.5)
GOAL = 0.3  # of the channels, whose KID is to be the reference's after training
FLOPS = 0.7  # that `auto` leaves
RECOVER = "recover(steps=1000,samples=200,lr=0.001)"
LONGER = "recover(steps=5000,samples=1000,lr=0.001)"
INT8 = "cast(bf16),quantize(int8)"
CACHE = "cache(auto,speedup=1.5)"
TARGET = "cpu(pack=true)"
"""Of the engines that are timed: the fastest one for the CPU that shares its weights."""
THEIRS = "torch-pruning"
UNROLLED = "unroll"
"""The program that passes begin with; it is not measured."""

FEWER = {25: (21, 18, 16, 14, 12, 10), 8: (7, 6, 5, 4)}
"""Steps of the whole model that cost what pruned ones do, by how many these have."""


def channels(ratio: float, importance: str) -> str:
    """Return the configuration that removes this share of each group of channels."""
    return f"prune(channels,ratio={ratio:g},importance={importance})"


def fewer(steps: int) -> str:
    """Return the configuration of so many steps of the unpruned model."""
    return f"unroll(steps={steps})"


def recovered(config: str) -> str:
    """Return the configuration that trains what another has left."""
    return f"{config},{RECOVER}"


def recovered_longer(config: str) -> str:
    """Return the configuration that does so for long."""
    return f"{config},{LONGER}"


BY_IMPORTANCE = {ratio: {m: channels(ratio, m) for m in METHODS} for ratio in RATIOS}
AUTO = f"prune(auto,flops={FLOPS})"
UNIFORM = "prune(all,ratio=0.175)"
"""What leaves as many FLOPs as `auto` does, by the same share of all groups."""
DIMS = f"prune((auto,dims),flops={FLOPS})"
"""What does so and lets heads stay."""
PEERS: Mapping[str, tuple[Sequence[str], str]] = {
    # It removes a channel of each group of a norm, of which all have 2 or 3: that is the least.
    "fashion-sd": (["prune(auto,flops=0.57)"], f"{THEIRS}(ratio=0.06)"),
    "fashion-dit": (
        [AUTO, "prune((auto,dims),flops=0.66)", "prune((dims,mlp),ratio=0.34)"],
        f"{THEIRS}(ratio=0.33)",
    ),
}
"""What leaves as many FLOPs, by diffopt and by torch-pruning."""
LOW_RANK = "low-rank(rank=0.4,data=true)"
KINDS = ("prune(heads,ratio=0.25)", "prune(mlp,ratio=0.3)", "prune(blocks,ratio=0.15)")
LONG = (BY_IMPORTANCE[GOAL]["taylor"], AUTO)
"""What is trained for long, too, and what is measured with few steps."""
LARGE = (REFERENCE, *(own["magnitude"] for own in BY_IMPORTANCE.values()), UNIFORM)
"""What is timed of larger models, whose weights are random."""
COMPOSED = f"{recovered(AUTO)},{CACHE},{INT8}"
PARTS = (recovered(AUTO), CACHE, INT8)


def smaller(model: str) -> list[str]:
    """Return the configurations that are trained, those of the goals first."""
    main = BY_IMPORTANCE[GOAL]
    ours, theirs = PEERS[model]
    rest = [own[m] for r, own in BY_IMPORTANCE.items() if r != GOAL for m in METHODS]
    return [
        *(main[m] for m in METHODS if m != "random"),
        AUTO,
        UNIFORM,
        DIMS,
        *(config for config in [*ours, theirs] if config != AUTO),
        *(config for config in rest if "random" not in config),
        main["random"],
        LOW_RANK,
        *KINDS,
    ]


def configurations(model: str, steps: int) -> list[str]:
    """Return what is measured of a model with so many steps, in that order."""
    beginning = [REFERENCE, *map(fewer, FEWER.get(steps, ()))]
    if steps != max(FEWER):
        return [*beginning, *(c for own in LONG for c in (own, recovered(own)))]
    pairs = [config for own in smaller(model) for config in (own, recovered(own))]
    after = pairs.index(recovered(UNIFORM)) + 1
    pairs[after:after] = [CACHE, INT8, COMPOSED]
    return [*beginning, *pairs, *map(recovered_longer, LONG)]


def is_timed(config: str) -> bool:
    """Tell whether a configuration is timed: training and what is removed change no time."""
    is_trained = config != untrained(config)
    has_twin = "importance=" in config and "importance=magnitude" not in config
    return config != REFERENCE and not is_trained and not has_twin


def untrained(config: str) -> str:
    """Return the configuration that has the same time and size."""
    return config.removesuffix(f",{RECOVER}").removesuffix(f",{LONGER}")


PLACES: Mapping[str, Sequence[str]] = {
    "front": ("unroll",),
    "smaller": ("prune", "low-rank", "merge-tokens", "recover"),
    "cache": ("cache",),
    "behind": ("cast", "quantize"),
}


def pipeline(calls: Sequence[str]) -> str:
    """Return the whole pipeline of a configuration's passes."""
    known = [name for names in PLACES.values() for name in names]
    for call in calls:
        if name_of(call) not in known:
            raise DiffoptError(f"{call}: a configuration is made of {', '.join(known)}")
    front, small, cache, behind = (
        [call for call in calls if name_of(call) in names] for names in PLACES.values()
    )
    return ",".join([*(front or ["unroll"]), *small, "hoist", *cache, "simplify,fuse", *behind])


def split(config: str) -> list[str]:
    """Return the passes of a configuration."""
    return [] if config == REFERENCE else passes(config)
