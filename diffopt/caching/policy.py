"""Policies of the `cache` pass: which values of the denoiser a step reuses from earlier steps.

A policy is one file of `diffopt/caching/policies`, or an entry point of the group
`diffopt.policies`. It makes a plan; `diffopt.caching.apply_plan` rewrites the program.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import fx

from diffopt import plugins, spec
from diffopt.analysis.denoiser_structure import Block, DenoiserStructure
from diffopt.caching.apply_plan import Loop, Plan, Reuse, Term
from diffopt.errors import DiffoptError
from diffopt.ir.printing import format_type
from diffopt.spec import option

if TYPE_CHECKING:
    from diffopt.core import Context

__all__ = ["Policy", "find_policy", "hold", "merge", "option", "policy_names"]

Needs = Literal["skips", "blocks", "branches", "cross-attention"]
ReusedValue = tuple[fx.Node, fx.Node | None]

ATTENTION_AND_MLP = ("attention", "cross-attention", "mlp")

_REQUIREMENTS: dict[Needs, str] = {
    "skips": "skip connections",
    "blocks": "transformer blocks",
    "branches": "attention or MLP branches",
    "cross-attention": "cross-attention",
}


@dataclass(frozen=True)
class Policy(spec.Choice):
    """Choose what each step reuses; a frozen dataclass whose fields are its options.

    `needs` is what a denoiser must have for the policy to apply.
    """

    name: ClassVar[str] = "policy"
    needs: ClassVar[Needs | None] = None

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def find(cls, word: str) -> type[Policy]:
        """Return the policy called `word`."""
        return find_policy(word)

    @classmethod
    def words(cls) -> list[str]:
        """Return the names of all policies."""
        return policy_names()

    def runs(self) -> float:
        """Return in about how many runs of the program the plan is made; by default none."""
        return 0.0

    def plan(self, loop: Loop, structure: DenoiserStructure, ctx: Context) -> Plan:
        """Return which values each step reuses from which earlier steps."""
        raise NotImplementedError

    def finish(self, loop: Loop, ctx: Context) -> None:
        """Rewrite the pipeline around the denoiser's calls after the plan has been applied."""


def hold(values: Iterable[ReusedValue], computed: Collection[int], steps: int) -> Plan:
    """Return the plan that reuses values, each with its base, from the last computed step."""
    values, plan, last = list(values), dict[int, list[Reuse]](), 0
    for step in range(steps):
        if step == 0 or step in computed:
            last = step
        else:
            plan[step] = [Reuse(value, (Term(last),), base) for value, base in values]
    return plan


def merge(plans: Iterable[Plan]) -> Plan:
    """Merge plans of different values or steps."""
    merged: dict[int, list[Reuse]] = {}
    for plan in plans:
        for step, reuses in plan.items():
            merged.setdefault(step, []).extend(reuses)
    return merged


def branch_values(structure: DenoiserStructure, kinds: Collection[str]) -> list[ReusedValue]:
    """Return the results of residual branches of these kinds, in front of any gate."""
    values = (branch.ungated for branch in structure.branches if branch.kind in kinds)
    return [(value, None) for value in dict.fromkeys(values)]


def transformer_blocks(structure: DenoiserStructure) -> Sequence[Block]:
    """Return the blocks of a transformer, from the first to the last with an attention.

    None with long skips: these read values from between the blocks, which must not be skipped.
    """
    blocks = [block for block in structure.blocks if _keeps_types(block)]
    places = [i for i, block in enumerate(blocks) if any(b.attentions for b in block.branches)]
    return blocks[places[0] : places[-1] + 1] if places and not structure.skips else []


def block_residuals(blocks: Sequence[Block]) -> list[ReusedValue]:
    """Return each stream's value after the blocks, with its value before them as base."""
    before: dict[fx.Node, fx.Node] = {}
    for block in blocks:
        for source, result in zip(block.stream_in, block.stream_out, strict=True):
            before[result] = before.pop(source, source)
    return list(before.items())


def _keeps_types(block: Block) -> bool:
    pairs = zip(block.stream_in, block.stream_out, strict=True)
    return all(format_type(a.meta["val"]) == format_type(b.meta["val"]) for a, b in pairs)


def count_structures(structure: DenoiserStructure) -> Mapping[Needs, int]:
    """Count the structures that policies may need."""
    kinds = [branch.kind for branch in structure.branches]
    return {
        "skips": len(structure.skips),
        "blocks": len(transformer_blocks(structure)),
        "branches": sum(kind in ATTENTION_AND_MLP for kind in kinds),
        "cross-attention": kinds.count("cross-attention"),
    }


def check_fits(policy: Policy, name: str, structure: DenoiserStructure) -> None:
    """Raise DiffoptError where the denoiser called `name` lacks what the policy needs."""
    counts = count_structures(structure)
    if policy.needs is None or counts[policy.needs]:
        return
    present = [f"{count} {_REQUIREMENTS[need]}" for need, count in counts.items() if count]
    others = {word: find_policy(word) for word in policy_names()}
    fitting = [word for word, cls in others.items() if cls.needs is None or counts[cls.needs]]
    raise DiffoptError(
        f"{policy.name} needs {_REQUIREMENTS[policy.needs]}, and {name} has none; it has "
        f"{_listed(present) or 'nothing that a policy knows'}: use {_listed(fitting, 'or')}"
    )


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else "".join(words)


def policy_names() -> list[str]:
    """Return the names of all policies, without importing any."""
    return sorted(_sources())


def find_policy(name: str) -> type[Policy]:
    """Return the policy called `name`."""
    cls: type[Policy] = plugins.find_class(name, _sources(), Policy, "cache policy")
    return cls


@cache
def _sources() -> dict[str, str]:
    """Map the name of each policy to where it is, as "module:class"."""
    return plugins.sources("diffopt.caching.policies", "cache policies", "diffopt.policies")
