"""The reference of pruning: the whole program, with zeros in place of removed elements.

Every value keeps its shape. After each operator the elements of removed units are set to 0; norms
and means have the statistics of the others. Group norms with several groups lose whole groups, so
they need no change.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.analysis.reachability import packet
from diffopt.ir import graph as g
from diffopt.ir.nodes import stored_tensor
from diffopt.ir.program import Program
from diffopt.pruning.coupling import Coupling, Unit

aten = torch.ops.aten


def run(
    program: Program, coupling: Coupling, units: Iterable[Unit], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Run `program`, which `coupling` is of and from which nothing was removed, without units."""
    labels = torch.tensor([unit.label for unit in units], dtype=torch.long)
    removed = torch.isin(coupling.classes, labels)
    with torch.no_grad():
        return _run(program, coupling, removed, "", program.root, inputs)


def _run(
    program: Program,
    coupling: Coupling,
    removed: Tensor,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    env: dict[fx.Node, Any] = dict(zip(g.placeholders(gm), inputs, strict=True))
    factors = coupling.flow.values[name]
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            value: Any = stored_tensor(gm, node)
        elif node.op == "call_module":
            body = getattr(gm, str(node.target))
            arguments = [env[a] for a in node.args]
            value = _run(program, coupling, removed, str(node.target), body, arguments)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            rule = _NORMS.get(packet(node))
            if rule is None:
                # Masked values may have other strides.
                is_view = node.target in (aten.view.default, aten._unsafe_view.default)
                value = (aten.reshape.default if is_view else node.target)(*args, **kwargs)
            else:
                source = node.args[0]
                value = rule(node, args, kwargs, _mask(factors[source], removed, args[0]))
        if isinstance(value, Tensor) and factors[node]:
            value = value.masked_fill(_mask(factors[node], removed, value), 0)
        env[node] = value
    return [env[node] for node in g.outputs(gm)]


def _mask(factors: Sequence[Tensor], removed: Tensor, value: Tensor) -> Tensor:
    """Return which elements of a value were removed."""
    mask = torch.zeros(value.shape, dtype=torch.bool)
    for factor in factors:
        mask |= removed[factor]
    return mask


def _layer_norm(node: fx.Node, args: Any, kwargs: Any, mask: Tensor) -> Tensor:
    """Normalise the remaining elements along the last axis."""
    x, _, *rest = args
    lost = mask.flatten(0, -2)[0] if mask.dim() > 1 else mask
    keep = (~lost).nonzero()[:, 0]
    if len(keep) in (0, x.shape[-1]):
        return node.target(*args, **kwargs)
    weights = [w[keep] if isinstance(w, Tensor) else w for w in rest[:2]]
    result = node.target(x[..., keep], [len(keep)], *weights, *rest[2:], **kwargs)
    return torch.zeros_like(x).index_copy(-1, keep, result)


def _group_norm(node: fx.Node, args: Any, kwargs: Any, mask: Tensor) -> Tensor:
    """Normalise the remaining channels of a single group."""
    x, groups, *rest = args
    keep = (~mask.flatten(2)[0, :, 0]).nonzero()[:, 0]
    if groups > 1 or len(keep) in (0, x.shape[1]):
        return node.target(*args, **kwargs)
    weights = [w[keep] if isinstance(w, Tensor) else w for w in rest[:2]]
    result = node.target(x[:, keep], 1, *weights, *rest[2:], **kwargs)
    return torch.zeros_like(x).index_copy(1, keep, result)


def _mean(node: fx.Node, args: Any, kwargs: Any, mask: Tensor) -> Tensor:
    """Divide by the number of remaining elements; a mean of none is 0."""
    x, dims, keepdim, *_ = [*args, *(None, False)[len(args) - 1 :]]
    count = (~mask).sum(dims, keepdim=keepdim).clamp_min(1)
    return x.sum(dims, keepdim=keepdim) / count


_NORMS = {
    aten.layer_norm: _layer_norm,
    aten.rms_norm: _layer_norm,
    aten.group_norm: _group_norm,
    aten.mean: _mean,
}
