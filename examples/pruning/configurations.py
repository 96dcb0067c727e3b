"""The configurations: passes between `unroll` and `hoist`, and around `simplify,fuse`."""

from collections.abc import Mapping, Sequence

from diffopt.errors import DiffoptError
from diffopt.pruning.importance import METHODS
from examples.study.study import REFERENCE
from examples.study.texts import name_of, passes

RATIOS = (0.15, 0.3, 0.5)
GOAL = 0.3  # the ratio whose KID is to be the reference's after training
FLOPS = 0.7  # the target of `auto`
RECOVER = "recover(steps=1000,samples=200,lr=0.001)"
LONGER = "recover(steps=5000,samples=1000,lr=0.001)"
INT8 = "cast(bf16),quantize(int8)"
CACHE = "cache(auto,speedup=1.5)"
TARGET = "cpu(pack=true)"
"""The target of timed engines: the fastest one for the CPU that shares weights."""
THEIRS = "torch-pruning"
UNROLLED = "unroll"
"""The program before pruning; it is not measured."""

FEWER = {25: (21, 18, 16, 14, 12, 10), 8: (7, 6, 5, 4)}
"""Steps of the unpruned model that cost as much as a pruned one, by the steps of that."""


def channels(ratio: float, importance: str) -> str:
    """Return the configuration that removes this ratio of each group of channels."""
    return f"prune(channels,ratio={ratio:g},importance={importance})"


def fewer(steps: int) -> str:
    """Return the configuration of so many steps of the unpruned model."""
    return f"unroll(steps={steps})"


def recovered(config: str) -> str:
    """Return the configuration with training after another one."""
    return f"{config},{RECOVER}"


def recovered_longer(config: str) -> str:
    """Return the configuration with longer training after another one."""
    return f"{config},{LONGER}"


BY_IMPORTANCE = {ratio: {m: channels(ratio, m) for m in METHODS} for ratio in RATIOS}
AUTO = f"prune(auto,flops={FLOPS})"
UNIFORM = "prune(all,ratio=0.175)"
"""As many FLOPs as `auto`, with the same ratio for all groups."""
DIMS = f"prune((auto,dims),flops={FLOPS})"
"""As many FLOPs as `auto`, with all heads kept."""
PEERS: Mapping[str, tuple[Sequence[str], str]] = {
    # Its least step is one channel of each group of the norms, which have 2 or 3 channels.
    "fashion-sd": (["prune(auto,flops=0.57)"], f"{THEIRS}(ratio=0.06)"),
    "fashion-dit": (
        [AUTO, "prune((auto,dims),flops=0.66)", "prune((dims,mlp),ratio=0.34)"],
        f"{THEIRS}(ratio=0.33)",
    ),
}
"""Configurations with as many FLOPs: diffopt's, and torch-pruning's."""
LOW_RANK = "low-rank(rank=0.4,data=true)"
KINDS = ("prune(heads,ratio=0.25)", "prune(mlp,ratio=0.3)", "prune(blocks,ratio=0.15)")
LONG = (BY_IMPORTANCE[GOAL]["taylor"], AUTO)
"""Configurations with longer training as well, which few steps are measured with."""
LARGE = (REFERENCE, *(by_method["magnitude"] for by_method in BY_IMPORTANCE.values()), UNIFORM)
"""Configurations of larger models, whose weights are random: only times are measured."""
COMPOSED = f"{recovered(AUTO)},{CACHE},{INT8}"
PARTS = (recovered(AUTO), CACHE, INT8)


def smaller(model: str) -> list[str]:
    """Return the pruned configurations, those of the goals first."""
    main = BY_IMPORTANCE[GOAL]
    ours, theirs = PEERS[model]
    rest = [channels(ratio, m) for ratio in RATIOS if ratio != GOAL for m in METHODS]
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
    """Return the configurations of a model with so many steps, in order."""
    beginning = [REFERENCE, *map(fewer, FEWER.get(steps, ()))]
    if steps != max(FEWER):
        return [*beginning, *(c for pruned in LONG for c in (pruned, recovered(pruned)))]
    pairs = [config for pruned in smaller(model) for config in (pruned, recovered(pruned))]
    after = pairs.index(recovered(UNIFORM)) + 1
    pairs[after:after] = [CACHE, INT8, COMPOSED]
    return [*beginning, *pairs, *map(recovered_longer, LONG)]


def is_timed(config: str) -> bool:
    """Tell whether to time it: neither training nor the choice of channels changes times."""
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
