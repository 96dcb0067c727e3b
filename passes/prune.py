"""Remove the least important channels, heads and hidden units: smaller dense weights.

Before:

    %1: float32[4,16] = aten.linear(%x, %up)
    %2: float32[4,16] = aten.silu(%1)
    %3: float32[4,8] = aten.linear(%2, %down)

After `prune(mlp,ratio=0.25)`:

    %1: float32[4,12] = aten.linear(%x, %up)
    %2: float32[4,12] = aten.silu(%1)
    %3: float32[4,8] = aten.linear(%2, %down)

Coupled channels are found in the graphs of all bodies at once (`coupling`): through residual sums,
concatenations, norms, heads of attentions, the halves of gates. `mlp` are units that only linears
produce and read, `heads` are those of attentions, `channels` all others: inside of convolution
blocks, and in the residual streams themselves. Of group norms whole groups are removed, so that the
statistics of the others do not change. Attention keeps its scale. `blocks` are whole residual
blocks: x + f(x) becomes x. `2:4` removes nothing: two of every four weights along the inputs of
layers become zero, for GPUs with sparse kernels (see `sparsity_2_4`).

With `scope=layer` the same share of every group is removed, with `global` the least important units
of all groups, relative to the mean of their group. `ratios` sets shares of groups, by the first
pattern that matches a layer which produces the group: `ratios=*.ff.*:0.5,*attn*:0`.

With `dims` heads are kept, and the same dimensions are removed in all of an attention's heads: of
queries and keys together, and of values.

`prune(auto,flops=0.7)` removes channels, heads and hidden units such that at most 0.7 of the
components' FLOPs are left, at the least error: that of a few shares of each group is measured
(`ratio_search`). With `(auto,dims)` it removes dimensions of heads instead of heads.

Not rewritten when
- a layer's outputs are a result of its component, or an operator without a rule reads them;
- a layer's module matches `skip`, or it is in none of `components`;
- its group has one unit only.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffopt.analysis.scope import boundary_weights, choose_scope
from diffopt.core import Context, Needs, Pass, Size, option
from diffopt.core.module_filter import ModuleFilter
from diffopt.errors import DiffoptError
from diffopt.execution.calibration_inputs import representative
from diffopt.ir.program import Program
from diffopt.pruning import block_removal, ratio_search, removal
from diffopt.pruning.ablation import FEW, Ablation
from diffopt.pruning.coupling import KINDS, Coupling, Group, Unit, couple
from diffopt.pruning.importance import Method, importance
from diffopt.pruning.selection import RatioScope, select_units, unit_scores
from diffopt.transforms.sparsity_2_4 import sparsify

What = Literal["channels", "heads", "dims", "mlp", "blocks", "all", "2:4", "auto"]

RATIO = 0.3
MOST = ratio_search.RATIOS[-1]
_OF_WEIGHTS = ("magnitude", "random")
SKIPPED = "layers and skip leave it alone"
_PARTLY = "layers and skip leave some of the layers alone that go together"


@dataclass(frozen=True)
class Prune(Pass):
    """Remove the least important channels, heads or hidden units."""

    exact = False

    what: tuple[What, ...] = option(
        ("channels",),
        "what goes: channels, heads, mlp; all of these; dims inside of heads; auto: of each what"
        " measurements say; blocks; or weights, 2:4",
    )
    ratio: float = option(RATIO, "share to remove of each group, or of all")
    importance: Method = option(  # noqa: RUF009 (a string)
        "magnitude", "how it is measured what matters: magnitude, taylor, diff-pruning, random"
    )
    scope: RatioScope = option(  # noqa: RUF009 (a string)
        "layer", "whether each group loses that share (layer), or all together (global)"
    )
    ratios: tuple[str, ...] = option((), "shares of groups of their own, as pattern:share")
    layers: tuple[str, ...] = option(("*",), "patterns of the modules to prune")
    skip: tuple[str, ...] = option((), "patterns of modules to leave alone")
    round_to: int = option(8, "channels are left in multiples of this, in groups that have many")
    samples: int = option(8, "requests to measure importance with")
    components: tuple[str, ...] = option(
        ("loop",), "loop; all; or names of components, which may be patterns"
    )
    budget: float | None = option(None, "largest relative error that the pass may add")
    flops: float | None = option(None, "auto: the part of the FLOPs to leave, at the most")
    most: float = option(MOST, "auto: the largest share that one group may lose")

    def __post_init__(self) -> None:
        if not self.what:
            raise DiffoptError("prune wants channels, heads, mlp, blocks or 2:4: name at least one")
        if not 0 <= self.ratio < 1:
            raise DiffoptError(f"prune has ratio={self.ratio:g}; write a share from 0 to below 1")
        if self.round_to < 1 or self.samples < 1:
            raise DiffoptError("prune wants round-to and samples to be 1 or more")
        for text in self.ratios:
            read_ratio(text)
        if "dims" in self.what and {"heads", "all"} & set(self.what):
            raise DiffoptError(
                "prune(dims) lets heads stay, and takes of all of them alike: leave heads and all"
                " out, as in prune((channels,mlp,dims))"
            )
        if wrong := self._wrong_auto() or self._without_use():
            raise DiffoptError(wrong)

    def _wrong_auto(self) -> str | None:
        """Return what is wrong with the options around `auto`."""
        if "auto" not in self.what:
            for name, value, default in (("flops", self.flops, None), ("most", self.most, MOST)):
                if value != default:
                    return f"prune has {name}={value:g} without auto: write prune(auto,flops=0.7)"
            return None
        if set(self.what) - {"auto", "dims"}:
            return (
                "prune(auto) takes channels, heads and mlp by itself: write auto alone, or"
                " (auto,dims)"
            )
        if self.flops is None:
            return "prune(auto) wants the part of the FLOPs to leave: write prune(auto,flops=0.7)"
        if not 0 < self.flops < 1:
            return f"prune has flops={self.flops:g}; write the part to leave, between 0 and 1"
        if not ratio_search.RATIOS[0] <= self.most < 1:
            return (
                f"prune has most={self.most:g}; write the largest share that a group may lose,"
                f" from {ratio_search.RATIOS[0]:g} to below 1"
            )
        if self.ratio != RATIO or self.ratios or self.scope != "layer":
            return "prune(auto) chooses the shares itself: leave ratio, ratios and scope out"
        return None

    def _without_use(self) -> str | None:
        """Return what is wrong with an option that does not apply, or None."""
        if not {*self.what} <= {"blocks", "2:4"}:
            return None
        what = " and ".join(self.what)
        if self.ratios or self.scope != "layer":
            name = "ratios" if self.ratios else "scope"
            return f"prune({what}) knows no {name}: these are of channels, heads, dims and mlp"
        if self.what == ("2:4",) and self.ratio != RATIO:
            return "prune(2:4) knows no ratio: two of four weights go, always"
        return None

    def needs(self) -> Needs:
        """Return that importance is measured, unless it is that of the weights alone."""
        is_measured = self.importance not in _OF_WEIGHTS or self.flops is not None
        return "calibration" if is_measured else "nothing"

    def run(self, program: Program, ctx: Context) -> None:
        """Find coupled units, measure their importance, and remove the least important ones."""
        _check_floats(program)
        names = component_names(program, self.components)
        before = Size.of(program)
        measured = self._importance(program, names, ctx)
        if "blocks" in self.what:
            self._remove_blocks(program, names, measured, ctx)
            program.refresh()
        if set(self.what) - {"blocks", "2:4"}:
            coupling = couple(program, in_heads="dims" in self.what)
            groups, ratios = self._groups(coupling, names, ctx)
            scores = [unit_scores(group, measured) for group in groups]
            if self.flops is None:
                units = select_units(groups, scores, ratios, self.ratio, self.scope, self.round_to)
            else:
                inputs = representative(str(self), program, ctx.prompts, FEW, ctx.seed)
                ablation = Ablation(program, coupling, names, inputs)
                choice = ratio_search.search_ratios(
                    ablation, groups, scores, self.flops, self.most, self.round_to, ctx.progress
                )
                units = choice.units
                ctx.notes.update(choice.notes())
            removal.remove(program, coupling, [unit for own in units for unit in own])
            self._report(groups, units, ctx)
            program.refresh()
        if "2:4" in self.what:
            self._sparsify(program, names, ctx)
        after = Size.of(program)
        for key in ("parameters", "flops"):
            ctx.note(key, {"before": getattr(before, key), "after": getattr(after, key)})

    def _remove_blocks(
        self, program: Program, names: Sequence[str], measured: dict[int, Tensor], ctx: Context
    ) -> None:
        """Remove the least important residual blocks."""
        patterns = ModuleFilter(self.layers, self.skip)
        all_blocks = block_removal.residual_blocks(program, names)
        blocks = []
        for block in all_blocks:
            if not patterns.matches(*_split(block.name)):
                ctx.skip(block.name, SKIPPED)
            elif not block.fits:
                ctx.skip(block.name, "its stream has another shape or type than the sum")
            else:
                blocks.append(block)
        if len(self.what) == 1:
            patterns.check("block", names)
        if not blocks:
            raise _nothing("residual blocks", names, ctx)
        count = round(self.ratio * len(blocks))
        if count == len(blocks):
            raise DiffoptError(
                f"ratio={self.ratio:g} of {len(blocks)} blocks is all of them; ask for less"
            )
        blocks.sort(key=lambda block: block_removal.block_score(block, measured))
        block_removal.remove_blocks(blocks[:count])
        ctx.note("blocks", {"of": len(all_blocks), "removed": [b.name for b in blocks[:count]]})

    def _sparsify(self, program: Program, names: Sequence[str], ctx: Context) -> None:
        """Make the weights that are left 2:4 sparse, but for those of the first and last layers."""
        scope = choose_scope(program, self.components)
        ends = {id(tensor) for tensor in boundary_weights(program, scope)}
        patterns = ModuleFilter(self.layers, self.skip)
        measured = self._importance(program, names, ctx)
        done = sparsify(program, names, patterns.matches, ctx.skip, measured, ends)
        patterns.check("layer", names)
        if not done["layers"]:
            raise DiffoptError(
                f"there are no layers to make 2:4 sparse in {', '.join(names)}: their inputs are no"
                " multiples of 4, or they are skipped"
            )
        ctx.note("2:4", done)

    def _groups(
        self, coupling: Coupling, names: Sequence[str], ctx: Context
    ) -> tuple[list[Group], list[float | None]]:
        """Return the groups to prune, each with its ratio, if it has one of its own."""
        kinds = [k for k in KINDS if {k, "all", "auto"} & set(self.what)]
        patterns = ModuleFilter(self.layers, self.skip)
        rules = [(ModuleFilter([p]), ratio) for p, ratio in map(read_ratio, self.ratios)]
        groups, ratios = [], []
        for group in coupling.groups:
            is_inside = [layer.partition(".")[0] in names for layer in group.layers]
            if not all(is_inside):
                if any(is_inside):
                    ctx.skip(group.name, "a layer of another component goes with it")
                continue
            wanted = [patterns.matches(*_split(layer)) for layer in group.layers]
            ratio = _own_ratio(group, rules)
            if group.kind not in kinds:
                continue
            if not all(wanted):
                ctx.skip(group.name, SKIPPED if not any(wanted) else _PARTLY)
            elif len(group.units) == 1:
                ctx.skip(group.name, "its channels go together, so none can go")
            else:
                groups.append(group)
                ratios.append(ratio)
        fixed = [(n, reason) for n, reason in coupling.fixed if n.partition(".")[0] in names]
        for name, reason in fixed:
            patterns.matches(*_split(name))
            ctx.skip(name, reason)
        for selector in (patterns, *(selector for selector, _ in rules)):
            selector.check("layer", names)
        if not groups:
            raise _nothing(" or ".join(kinds), names, ctx)
        return groups, ratios

    def _importance(
        self, program: Program, names: Sequence[str], ctx: Context
    ) -> dict[int, Tensor]:
        inputs: Sequence[Sequence[Tensor]] = ()
        if self.importance not in _OF_WEIGHTS:
            inputs = representative(str(self), program, ctx.prompts, self.samples, ctx.seed)
        return importance(
            program, self.importance, inputs, names, seed=ctx.seed, progress=ctx.progress
        )

    def _report(
        self, groups: Sequence[Group], units: Sequence[Sequence[Unit]], ctx: Context
    ) -> None:
        kinds: dict[str, dict[str, int]] = {}
        for group, removed in zip(groups, units, strict=True):
            row = kinds.setdefault(group.kind, {"groups": 0, "units": 0, "removed": 0})
            row["groups"] += 1
            row["units"] += len(group.units)
            row["removed"] += len(removed)
            if not removed:
                why = f"the share is less than half of one of its {len(group.units)}"
                ctx.skip(group.name, why if self.flops is None else "others cost less to remove")
        ctx.note("pruned", kinds)
        reasons = collections.Counter(text.rpartition(": ")[2] for text in ctx.skipped)
        ctx.note("left alone", dict(reasons.most_common()))


def component_names(program: Program, wanted: Sequence[str]) -> list[str]:
    """Return the names of the components to prune."""
    scope = choose_scope(program, wanted)
    return list(scope.loop if tuple(wanted) == ("loop",) else scope.calls)


def read_ratio(text: str) -> tuple[str, float]:
    """Return the pattern and the share of `*.ff.*:0.5`."""
    pattern, colon, number = text.rpartition(":")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not (colon and pattern) or not 0 <= share < 1:
        raise DiffoptError(
            f"prune has ratios={text}; write a pattern and a share from 0 to below 1, as *.ff.*:0.5"
        )
    return pattern, share


def _nothing(what: str, names: Sequence[str], ctx: Context) -> DiffoptError:
    """Return the error that nothing can be pruned, with the most frequent reason."""
    reasons = collections.Counter(text.rpartition(": ")[2] for text in ctx.skipped)
    # A reason that the user has asked for is more helpful than one that holds in any case.
    first = [reason for reason in (SKIPPED, _PARTLY) if reason in reasons]
    first += [reason for reason, _ in reasons.most_common(1)]
    why = f" ({first[0]})" if first else ""
    return DiffoptError(f"there are no {what} to prune in {', '.join(names)}{why}")


def _own_ratio(group: Group, rules: Sequence[tuple[ModuleFilter, float]]) -> float | None:
    """Return the ratio of the first pattern that matches a layer of a group."""
    matched = [any([patterns.matches(*_split(n)) for n in group.layers]) for patterns, _ in rules]
    return next((share for (_, share), is_it in zip(rules, matched, strict=True) if is_it), None)


def _split(layer: str) -> tuple[str, str]:
    component, _, path = layer.partition(".")
    return component, path


def _check_floats(program: Program) -> None:
    """Raise for a program with quantized weights: their scales are those of all channels."""
    for name, gm in program.components.items():
        for node in gm.graph.nodes:
            if node.op == "call_function" and "quantize" in str(node.target):
                raise DiffoptError(
                    f"prune finds quantized values in {name}: write prune before quantize"
                )
