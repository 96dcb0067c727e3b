"""What each operator does to the axes of its tensors: one table, which all analyses ask.

An operator is described by the indices that it runs over, as an einsum is. Each axis of an operand
and of the result is made of such indices, the outermost first:

    linear       ...i,oi,o->...o               i is summed, the others are kept
    attention    ...ld,...md,...mv->...lv      m and d are summed
    softmax      ab->ab                        b, the dimension, is mixed
    slice, cat   ab->ab                        b, the dimension, is moved
    view         [4, 6, 8] -> [24, 2, 4]       a b (cd) -> (ab) c d

An operand's axis of size 1 is broadcast where the index is longer. An axis without an index is of
size 1. This is how Shardy writes sharding rules (`sdy.op_sharding_rule`, whose factors are these
indices), and torch's DTensor those of products and views (`einop_rule`, `DimSpec`).

To add an operator, add its name to a row of `_RULES`. Those that torch tags as pointwise need none.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir.nodes import args, schema_argument

aten = torch.ops.aten

Kind = Literal["kept", "moved", "mixed", "summed"]
"""What an entry of the result needs of the operands along an index.

- kept: the entry at the same place;
- moved: one entry at another place, as slices, concatenations and lookups read;
- mixed: several entries, as softmax, norms and the places of a convolution read;
- summed: all entries, in any order; the result lacks the index.
"""


@dataclass(frozen=True)
class Index:
    """One of the indices that an operator runs over."""

    name: str
    kind: Kind


Axis = tuple[Index, ...]
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Relation:
    """What the axes of an operator's operands and of its result have to do with each other.

    Attributes:
        operands: The tensors that it reads, each with the indices of all its axes.
        result: The indices of the axes of its result, or of each of its results.
    """

    operands: tuple[tuple[fx.Node, Axes], ...]
    result: Axes

    def sources(self, axis: int) -> list[tuple[fx.Node, int]]:
        """Return the operands' axes that have just the indices of an axis of the result."""
        wanted = self.result[axis]
        every = ((n, i, axis) for n, axes in self.operands for i, axis in enumerate(axes))
        return [(n, i) for n, i, axis in every if axis and axis == wanted]

    def merged(self, axis: int) -> list[int]:
        """Return the axes of the first operand that are merged into one of the result."""
        axes, whole = self.operands[0][1], self.result[axis]
        parts = [i for i, indices in enumerate(axes) if indices and {*indices} <= {*whole}]
        return parts if sum((axes[i] for i in parts), ()) == whole else []

    def of_kind(self, operand: int, kind: Kind) -> list[int]:
        """Return the axes of an operand that have an index of a kind."""
        axes = self.operands[operand][1]
        return [i for i, indices in enumerate(axes) if any(index.kind == kind for index in indices)]


def is_reshape(node: fx.Node) -> bool:
    """Tell whether an operator changes its argument's shape alone, with the elements in order."""
    return _TABLE.get(packet(node)) is _reshaped


def relate(node: fx.Node) -> Relation | None:
    """Return the relation of an operator's axes; None if it is not known."""
    if node.op != "call_function":
        return None
    rule = _TABLE.get(packet(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    return None if rule is None else rule(node)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value, or of the first of several."""
    value = node.meta["val"]
    return tuple((value if isinstance(value, Tensor) else value[0]).shape)


Rule = Callable[[fx.Node], Relation | None]
Dims = Callable[[fx.Node, int], Iterable[int]]
"""Returns some dimensions of a node's first argument, whose rank is the second argument."""

_LETTERS = "abcdefghijkl"


def _relation(
    operands: Iterable[tuple[fx.Node, Sequence[str]]],
    result: tuple[fx.Node, Sequence[str]],
    mixed: str = "",
    moved: str = "",
) -> Relation:
    """Return a relation of axes that have one index each; the name "" says that one has none.

    Indices are summed if the result lacks them, else kept; if sizes disagree, they are mixed.
    """
    operands = list(operands)
    sizes: dict[str, set[int]] = {}
    for node, names in [*operands, result]:
        for name, size in zip(names, shape(node), strict=True):
            sizes.setdefault(name, {1}).add(size)

    def axis(name: str) -> Axis:
        kind: Kind = "kept" if name in result[1] else "summed"
        if name in moved:
            kind = "moved"
        elif name in mixed or len(sizes[name]) > 2:
            kind = "mixed"
        return (Index(name, kind),) if name else ()

    return Relation(
        tuple((node, tuple(map(axis, names))) for node, names in operands),
        tuple(map(axis, result[1])),
    )


def _product(
    node: fx.Node, formula: str, operands: Sequence[Any], mixed: str = "", moved: str = ""
) -> Relation | None:
    """Return the relation that a formula says of some operands, which may be None.

    "..." are leading axes that fit each other by the last of them; an operand may have fewer.
    """
    inputs, _, result = formula.partition("->")
    outer = len(shape(node)) - len(result.removeprefix("..."))
    if outer < 0 or (outer > 0 and not result.startswith("...")):
        return None
    result, *terms = (
        term.replace("...", "ABCDEFGH"[:outer]) for term in (result, *inputs.split(","))
    )
    named = []
    for operand, term in zip(operands, terms, strict=True):
        if isinstance(operand, fx.Node):
            missing = len(term) - len(shape(operand))
            if missing < 0 or not {*term[:missing]} <= {*result}:
                return None
            named.append((operand, term[missing:]))
    return _relation(named, (node, result), mixed, moved)


# Arguments


def _dims(node: fx.Node, rank: int) -> list[int]:
    """Return the dimensions that "dim" names; all, if it names none."""
    dims = schema_argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    return [dim % rank for dim in dims]


def _cut_dim(node: fx.Node, rank: int) -> list[int]:
    """Return the dimension of a slice, unless all of it is read."""
    (dim,), size = _dims(node, rank), shape(args(node)[0])
    bounds = slice(*(schema_argument(node, name) for name in ("start", "end", "step")))
    return [] if bounds.indices(size[dim]) == (0, size[dim], 1) else [dim]


def _padded_dims(node: fx.Node, rank: int) -> list[int]:
    pads = args(node)[1]
    return [rank - 1 - i for i in range(len(pads) // 2) if any(pads[2 * i : 2 * i + 2])]


def _norm_dims(node: fx.Node, rank: int) -> range:
    return range(rank - len(args(node)[1]), rank)


def _places(node: fx.Node, rank: int) -> range:
    """Return the last dimensions, as many as an operator's name says: `avg_pool2d`."""
    return range(rank - int(str(packet(node))[-2]), rank)


# Rules


def _axes(kind: Kind = "kept", dims: Dims = lambda node, rank: ()) -> Rule:
    """Return the rule of what keeps all axes of its first argument, but for some dimensions.

    The result lacks these dimensions if it has fewer than the argument.
    """

    def rule(node: fx.Node) -> Relation | None:
        source = args(node)[0]
        names = _LETTERS[: len(shape(source))]
        some = "".join(names[dim] for dim in dims(node, len(names)))
        result = ["" if kind == "summed" and name in some else name for name in names]
        if len(shape(node)) < len(names):
            result = [name for name in names if name not in some]
        if len(shape(node)) != len(result):
            return None  # one of several results, of different ranks
        kinds = {kind: some} if kind in ("mixed", "moved") else {}
        return _relation([(source, names)], (node, result), **kinds)

    return rule


def permutation(node: fx.Node) -> list[int]:
    """Return which dimension of its argument each dimension of a permutation is."""
    order = list(range(len(shape(node))))
    if packet(node) is aten.permute:
        return [order[dim] for dim in args(node)[1]]
    if order:
        one, other = args(node)[1:3] if packet(node) is aten.transpose else (0, -1)
        order[one], order[other] = order[other], order[one]
    return order


def _permuted(node: fx.Node) -> Relation:
    result = [_LETTERS[dim] for dim in permutation(node)]
    return _relation([(args(node)[0], _LETTERS[: len(result)])], (node, result))


def _reshaped(node: fx.Node) -> Relation | None:
    """Cut both shapes at all borders of their axes: an index is what lies between two cuts.

    A border is the product of the sizes before it. Where one does not divide the next, an axis of
    either shape has a part of one of the other, and all up to the next common border is mixed.
    """
    source = args(node)[0]
    shapes = shape(source), shape(node)
    if math.prod(shapes[0]) != math.prod(shapes[1]) or 0 in shapes[0]:
        return None
    old, new = ([*itertools.accumulate(sizes, operator.mul, initial=1)] for sizes in shapes)
    indices: dict[tuple[int, int], Axis] = {}
    for block in itertools.pairwise(sorted({*old} & {*new})):
        cuts = sorted(cut for cut in {*old, *new} if block[0] <= cut <= block[1])
        pairs = [*itertools.pairwise(cuts)]
        if all(after % before == 0 for before, after in pairs):
            indices |= {pair: (Index(str(pair[0]), "kept"),) for pair in pairs}
        else:
            indices[block] = (Index(str(block[0]), "mixed"),)

    def axis(begin: int, end: int) -> Axis:
        return sum((indices[cut] for cut in indices if cut[0] < end and begin < cut[1]), ())

    before, after = (
        tuple(axis(*pair) for pair in itertools.pairwise(borders)) for borders in (old, new)
    )
    return Relation(((source, before),), after)


def _aligned(node: fx.Node, sources: Iterable[fx.Node], moved: str = "") -> Relation:
    """Relate axes that fit each other by the last of them."""
    names = _LETTERS[: len(shape(node))]
    return _relation(
        [(n, names[len(names) - len(shape(n)) :]) for n in sources], (node, names), moved=moved
    )


def _pointwise(node: fx.Node) -> Relation:
    return _aligned(node, (n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)))


def _repeated(node: fx.Node) -> Relation:
    source, repeats = args(node)
    return _aligned(node, [source], "".join(_LETTERS[i] for i, n in enumerate(repeats) if n != 1))


def _joined(node: fx.Node) -> Relation | None:
    """Relate the axes of a concatenation, or of a stack, whose new axis its operands lack."""
    sources, names = args(node)[0], _LETTERS[: len(shape(node))]
    (dim,) = _dims(node, len(names))
    before = names[:dim] + names[dim + 1 :] if packet(node) is aten.stack else names
    if any(len(shape(source)) != len(before) for source in sources):
        return None
    return _relation([(n, before) for n in sources], (node, names), moved=names[dim])


def _formula(formula: str, order: Sequence[int] = (0, 1, 2), **kinds: str) -> Rule:
    """Return the rule of a product of the arguments at some positions."""
    order = order[: formula.count(",") + 1]

    def rule(node: fx.Node) -> Relation | None:
        names = [p.name for p in node.target._schema.arguments]  # type: ignore[union-attr]
        return _product(node, formula, [schema_argument(node, names[i]) for i in order], **kinds)

    return rule


def _einsum(node: fx.Node) -> Relation | None:
    formula, operands = args(node)[:2]
    formula = formula.replace(" ", "")
    if "->" not in formula or "." in formula:
        return None
    if any(len({*term}) < len(term) for term in formula.replace("->", ",").split(",")):
        return None
    return _product(node, formula, operands)


def _attention(node: fx.Node) -> Relation | None:
    operands = [*args(node)[:3], schema_argument(node, "attn_mask")]
    mixed = "l" if schema_argument(node, "is_causal") else ""  # a mask of places
    return _product(node, "...ld,...md,...mv,...lm->...lv", operands, mixed=mixed)


def _convolution(node: fx.Node) -> Relation | None:
    count = len(shape(node)) - 2
    places, kernel = "xyz"[:count], "pqr"[:count]
    transposed = "transpose" in str(packet(node)) or schema_argument(node, "transposed")
    formula = f"bi{places},{'io' if transposed else 'oi'}{kernel},o->bo{places}"
    mixed = places if schema_argument(node, "groups") == 1 else places + "io"
    return _product(node, formula, [*args(node)[:2], schema_argument(node, "bias")], mixed=mixed)


def _batch_norm(node: fx.Node) -> Relation | None:
    if args(node)[5]:
        return None  # its statistics are those of the batch
    names = _LETTERS[: len(shape(node))]
    return _product(node, f"{names},b,b,b,b->{names}", args(node)[:5])


_RULES: tuple[tuple[Rule, str], ...] = (
    (_axes(), "alias clone contiguous detach dropout lift_fresh_copy _to_copy to type_as"),
    (_axes(), "zeros_like ones_like full_like empty_like"),
    (_reshaped, "view _unsafe_view reshape flatten unflatten squeeze unsqueeze"),
    (_permuted, "permute transpose t"),
    (lambda node: _aligned(node, [args(node)[0]]), "expand expand_as"),
    (_repeated, "repeat"),
    (_axes("moved", _dims), "repeat_interleave"),
    (_joined, "cat concat concatenate stack"),
    (_axes("moved", _cut_dim), "slice"),
    (_axes("moved", _dims), "split split_with_sizes chunk unsafe_split unsafe_chunk select unbind"),
    (_axes("summed", _dims), "mean sum amax amin var std linalg_vector_norm"),
    (_axes("mixed", _dims), "softmax _softmax log_softmax _log_softmax cumsum glu"),
    (_axes("mixed", _norm_dims), "layer_norm rms_norm"),
    (_axes("mixed", lambda node, rank: range(1, rank)), "group_norm"),
    (_axes("mixed", lambda node, rank: range(rank - 3, rank)), "pixel_shuffle pixel_unshuffle"),
    (_axes("mixed", _padded_dims), "pad constant_pad_nd reflection_pad2d replication_pad2d"),
    (_axes("mixed", _places), "avg_pool1d avg_pool2d avg_pool3d max_pool2d"),
    (_axes("mixed", _places), "adaptive_avg_pool1d adaptive_avg_pool2d"),
    (_axes("mixed", _places), "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    (_axes("mixed", _places), "_upsample_nearest_exact1d _upsample_nearest_exact2d"),
    (_axes("mixed", _places), "_upsample_nearest_exact3d upsample_linear1d upsample_trilinear3d"),
    (_axes("mixed", _places), "upsample_bilinear2d upsample_bicubic2d"),
    (_batch_norm, "batch_norm"),
    (_formula("vd,...->...d", moved="v"), "embedding"),
    (_formula("...i,oi,o->...o"), "linear"),
    (_formula("...mk,...kn->...mn"), "matmul mm bmm"),
    (_formula("...mk,...kn,...mn->...mn", (1, 2, 0)), "addmm baddbmm"),
    (_einsum, "einsum"),
    (_attention, "scaled_dot_product_attention"),
    (_convolution, "conv1d conv2d conv3d convolution"),
    (_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
)
_TABLE: dict[Any, Rule] = {operator.getitem: _axes()} | {
    getattr(aten, name): rule for rule, names in _RULES for name in names.split()
}
