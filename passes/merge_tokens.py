"""Let attention and its projections work on fewer tokens: similar ones are merged (ToMe for SD).

Before:

    %1: float32[2,64,96] = aten.linear(%x, %to_q)
    …
    %5: float32[2,2,64,48] = aten.scaled_dot_product_attention(%2, %3, %4)
    …
    %7: float32[2,64,96] = aten.linear(%6, %to_out)

After `merge-tokens(ratio=0.5)`, where `%places` says which of 32 each of the 64 tokens has become:

    %means: float32[2,32,96] = aten.cat([%alone, %merged], 1)
    %1: float32[2,32,96] = aten.linear(%means, %to_q)
    …
    %7: float32[2,32,96] = aten.linear(%6, %to_out)
    %8: float32[2,64,96] = aten.gather(%7, 1, %places)

In each square of 2 x 2 tokens one is a destination (where tokens are no picture: one in 4). All
others look for the destination that is most similar, by the cosine of what the projections read,
and a share of `ratio` of all tokens, those that are most similar to theirs, are merged with it into
their mean. After the output's projection each token gets the result of the one that it has become.
How many tokens are merged is known when the program is compiled; which ones is not.

Run it before `fuse`, which folds weights of norms into the projections: tokens are then compared
without them.

Not rewritten when
- the attention has a mask, is causal, or is cross attention;
- its tokens are joined of several sequences (text and picture), or no [batch, tokens, features];
- what depends on each token's position comes between the projections and the attention (rotary
  embeddings): the mean of several tokens has no position;
- it has fewer tokens than `tokens`, or than the `levels` largest numbers that the component has;
- its module matches `skip`, or none of `layers`.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from diffopt.analysis.scope import choose_scope
from diffopt.analysis.token_attention import ATTENTION, Site, Unfit, find_site
from diffopt.core import Context, Pass, option
from diffopt.core.module_filter import ModuleFilter
from diffopt.errors import DiffoptError
from diffopt.ir.nodes import module_path
from diffopt.ir.program import Program
from diffopt.transforms import token_merging

MOST = 1 - 1 / token_merging.CELL**2
"""The share of tokens that are no destinations."""


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Merge similar tokens in front of self-attention, and part them behind it."""

    exact = False

    ratio: float = option(0.5, "share of the tokens that are merged into others, up to 0.75")
    merge: Literal["all", "keys"] = option(
        "all", "tokens of queries, keys and values; or of keys and values alone"
    )
    levels: int = option(
        1, "how many of a component's numbers of tokens to merge at, the largest first; 0: all"
    )
    tokens: int = option(0, "least number of tokens to merge at")
    choice: Literal["regular", "random"] = option(
        "random", "which token of a square others are merged into: the first, or any"
    )
    layers: tuple[str, ...] = option(("*",), "patterns of the modules whose attention to merge in")
    skip: tuple[str, ...] = option((), "patterns of modules to leave alone")
    components: tuple[str, ...] = option(
        ("loop",), "loop; all; or names of components, which may be patterns"
    )
    budget: float | None = option(None, "largest relative error that the pass may add")

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= MOST:
            raise DiffoptError(
                f"merge-tokens has ratio={self.ratio:g}; write a number from 0 to {MOST:g}: one"
                f" token in {token_merging.CELL**2} is what others are merged into"
            )
        if self.levels < 0 or self.tokens < 0:
            raise DiffoptError("merge-tokens wants levels and tokens to be 0 or more")

    def run(self, program: Program, ctx: Context) -> None:
        """Find the attentions of every component, and merge in those with most tokens."""
        if self.ratio == 0:
            return
        scope = choose_scope(program, self.components)
        patterns = ModuleFilter(self.layers, self.skip)
        merged: dict[str, str] = {}
        for name in scope.calls:
            gm = program.components[name]
            sites = self._sites(name, gm, patterns, ctx)
            sizes = sorted({site.count for site in sites}, reverse=True)
            least = sizes[: self.levels or None][-1] if sizes else 0
            for number, site in enumerate(sites):
                path = f"{name}.{module_path(site.attention)}"
                removed = token_merging.merged_count(site.grid, self.ratio)
                if site.count < max(least, self.tokens) or not removed:
                    ctx.skip(path, f"it has {site.count} tokens, too few")
                    continue
                token_merging.merge(gm, site, removed, self._into(site, ctx.seed + number))
                shape = " x ".join(map(str, site.grid))
                merged[path] = f"{shape} tokens, {site.count - removed} left"
        patterns.check("attention", scope.calls)
        ctx.note("merged", merged)
        why = collections.Counter(text.partition(": ")[2] for text in ctx.skipped)
        ctx.note("left alone", dict(why.most_common()))

    def _sites(
        self, name: str, gm: fx.GraphModule, patterns: ModuleFilter, ctx: Context
    ) -> list[Site]:
        """Return the attentions to merge in, all of which are found before any is changed."""
        sites = []
        for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
            path = module_path(node)
            if not patterns.matches(name, path):
                continue
            try:
                sites.append(find_site(node, self.merge == "all"))
            except Unfit as reason:
                ctx.skip(f"{name}.{path}", str(reason))
        return sites

    def _into(self, site: Site, seed: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed) if self.choice == "random" else None
        return token_merging.destinations(site.grid, random)
