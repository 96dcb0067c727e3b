"""Policies of the `cache` pass: which values of the denoiser a step takes from earlier steps.

A policy is one file of `diffopt/caching/policies`, or an entry point of the group
`diffopt.policies`. It chooses; `diffopt.caching.apply_plan` carries out.
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

Part = Literal["skips", "blocks", "branches", "cross-attention"]
Value = tuple[fx.Node, fx.Node | None]

ATTENTION_AND_MLP = ("attention", "cross-attention", "mlp")

_PARTS: dict[Part, str] = {
    "skips": "skip connections",
    "blocks": "transformer blocks",
    "branches": "attention or MLP branches",
    "cross-attention": "cross-attention",
}


@dataclass(frozen=True)
class Policy(spec.Choice):
    """Choose what each step reuses; a frozen dataclass whose fields, made with `option`, it reads.

    `needs` says what a denoiser must have for the policy to mean anything.
    """

    name: ClassVar[str] = "policy"
    needs: ClassVar[Part | None] = None

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

    def plan(self, loop: Loop, parts: DenoiserStructure, ctx: Context) -> Plan:
        """Return what each step takes from which earlier steps."""
        raise NotImplementedError

    def finish(self, loop: Loop, ctx: Context) -> None:
        """Rewrite what is around the denoiser's calls, once the plan has been carried out."""


def hold(values: Iterable[Value], computed: Collection[int], steps: int) -> Plan:
    """Return the plan that takes the values, each with its base, from the last computed step."""
    values, plan, last = list(values), dict[int, list[Reuse]](), 0
    for step in range(steps):
        if step == 0 or step in computed:
            last = step
        else:
            plan[step] = [Reuse(value, (Term(last),), base) for value, base in values]
    return plan


def merge(plans: Iterable[Plan]) -> Plan:
    """Return one plan of several that are about different values or steps."""
    merged: dict[int, list[Reuse]] = {}
    for plan in plans:
        for step, reuses in plan.items():
            merged.setdefault(step, []).extend(reuses)
    return merged


def branch_values(parts: DenoiserStructure, kinds: Collection[str]) -> list[Value]:
    """Return what the branches of these kinds add to their streams, before any gate."""
    values = (branch.ungated for branch in parts.branches if branch.kind in kinds)
    return [(value, None) for value in dict.fromkeys(values)]


def stack(parts: DenoiserStructure) -> Sequence[Block]:
    """Return the blocks of a transformer, from the first to the last with an attention.

    Blocks across which long skips go are none: what they pass on is read from outside as well.
    """
    kept = [block for block in parts.blocks if _keeps_types(block)]
    places = [i for i, block in enumerate(kept) if any(b.attentions for b in block.branches)]
    return kept[places[0] : places[-1] + 1] if places and not parts.skips else []


def residuals(blocks: Sequence[Block]) -> list[Value]:
    """Return what each stream is after the blocks, with what it was before them as its base."""
    before: dict[fx.Node, fx.Node] = {}
    for block in blocks:
        for source, result in zip(block.stream_in, block.stream_out, strict=True):
            before[result] = before.pop(source, source)
    return list(before.items())


def _keeps_types(block: Block) -> bool:
    pairs = zip(block.stream_in, block.stream_out, strict=True)
    return all(format_type(a.meta["val"]) == format_type(b.meta["val"]) for a, b in pairs)


def has(parts: DenoiserStructure) -> Mapping[Part, int]:
    """Count what policies are about."""
    kinds = [branch.kind for branch in parts.branches]
    return {
        "skips": len(parts.skips),
        "blocks": len(stack(parts)),
        "branches": sum(kind in ATTENTION_AND_MLP for kind in kinds),
        "cross-attention": kinds.count("cross-attention"),
    }


def check_fits(policy: Policy, name: str, parts: DenoiserStructure) -> None:
    """Raise where the policy has no meaning on the denoiser called `name`."""
    found = has(parts)
    if policy.needs is None or found[policy.needs]:
        return
    there = [f"{count} {_PARTS[part]}" for part, count in found.items() if count]
    others = {word: find_policy(word) for word in policy_names()}
    fitting = [word for word, cls in others.items() if cls.needs is None or found[cls.needs]]
    raise DiffoptError(
        f"{policy.name} needs {_PARTS[policy.needs]}, and {name} has none; it has "
        f"{_listed(there) or 'nothing that a policy knows'}: use {_listed(fitting, 'or')}"
    )


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else "".join(words)


def policy_names() -> list[str]:
    """Return the names of all policies, without importing any."""
    return sorted(_sources())


def find_policy(name: str) -> type[Policy]:
    """Return the policy called `name`."""
    found: type[Policy] = plugins.find(name, _sources(), Policy, "cache policy")
    return found


@cache
def _sources() -> dict[str, str]:
    """Map the name of each policy to where it is, as "module:class"."""
    return plugins.sources("diffopt.caching.policies", "cache policies", "diffopt.policies")
