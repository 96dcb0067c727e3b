"""Several requests in one run of a program with a leading dimension for them (pass `batch`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError, VerifyError
from diffopt.host.inputs import Draw, Expression, Host, Picture, TensorArgument
from diffopt.ir import dynamic_sizes
from diffopt.ir import graph as g

Axes = dict[str, dict[int, int]]
"""By component and index of an argument: its axis that has the size of the batch."""


def batch_axes(root: fx.GraphModule, size: int) -> Axes:
    """Return which axis of which argument of each component has the size of the batch.

    All shapes are inferred again for the size plus one. Where more than that axis changes, the
    graph would not serve every size: a `VerifyError`.
    """
    axes: Axes = {}

    def called(name: str, body: fx.GraphModule, values: list[Any]) -> None:
        pairs = zip(g.placeholders(body), values, strict=True)
        batched = {
            index: axis
            for index, (formal, value) in enumerate(pairs)
            if (axis := _axis(formal, value, size)) is not None
        }
        if axes.setdefault(name, batched) != batched:
            raise VerifyError(f"{name} is called with and without a dimension for requests")

    inputs = []
    for node in g.placeholders(root):
        value = node.meta["val"]
        inputs.append(g.fake(torch.empty([size + 1, *value.shape[1:]], dtype=value.dtype)))
    results = dynamic_sizes.infer_values(root, inputs, called)
    for node, value in zip(g.outputs(root), results, strict=True):
        if _axis(node, value, size) != 0:
            raise VerifyError(f"output {node.name} has no dimension for requests")
    return axes


def _axis(node: fx.Node, value: Tensor, size: int) -> int | None:
    """Return the axis along which a value has `size + 1` entries, and `size` are recorded."""
    before, after = list(node.meta["val"].shape), list(value.shape)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if not changed:
        return None
    if len(changed) > 1 or (before[changed[0]], after[changed[0]]) != (size, size + 1):
        raise VerifyError(f"{node.name}: of one request more, {before} becomes {after}")
    return changed[0]


def stack(sample: Sequence[Tensor], host: Host, count: int) -> list[Tensor]:
    """Return the stacked inputs of `count` requests: others first, `sample` last.

    In the others the elements of random draws and pictures are permuted, so that a value mixed up
    between requests changes an output.
    """
    kinds = [step for step in host.steps for _ in range(step.count)]
    free = [isinstance(kind, (Draw, TensorArgument, Expression, Picture)) for kind in kinds]
    requests = [list(sample)]
    for seed in range(count - 1):
        generator = torch.Generator().manual_seed(seed)
        requests.append(
            [
                t.flatten()[torch.randperm(t.numel(), generator=generator)].reshape(t.shape)
                if other
                else t
                for t, other in zip(sample, free, strict=True)
            ]
        )
    return [torch.stack(tensors) for tensors in zip(*reversed(requests), strict=True)]


def run_requests(
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    requests: Sequence[list[Tensor]],
    limits: tuple[int, int] | None,
) -> list[Sequence[Tensor]]:
    """Return the flat outputs of each request, of which as many run at once as `limits` allow.

    Args:
        run: Runs flat inputs, with a leading dimension for requests where there are limits.
        requests: The flat inputs of each, without that dimension.
        limits: The fewest and the most requests of one run; None: one, without the dimension.
    """
    if limits is None:
        return [run(tensors) for tensors in requests]
    outputs: list[Sequence[Tensor]] = []
    for group in _groups(requests, limits):
        results = run([torch.stack(tensors) for tensors in zip(*group, strict=True)])
        outputs += per_request(results, limits)
    return outputs


def per_request(
    outputs: Sequence[Tensor], limits: tuple[int, int] | None
) -> list[Sequence[Tensor]]:
    """Return the outputs of each request of a run; `limits` as for `run_requests`."""
    if limits is None:
        return [outputs]
    return [[tensor[k] for tensor in outputs] for k in range(len(outputs[0]))]


def _groups(flat: Sequence[list[Tensor]], limits: tuple[int, int]) -> list[list[list[Tensor]]]:
    """Split requests into runs of about equal size within the limits."""
    if not flat:
        return []
    low, high = limits
    runs = -(-len(flat) // high)
    if runs * low > len(flat):
        raise DiffoptError(f"got {len(flat)} requests; it was built for {low} to {high} at once")
    bounds = [len(flat) * k // runs for k in range(runs + 1)]
    return [list(flat[a:b]) for a, b in itertools.pairwise(bounds)]
