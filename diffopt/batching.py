"""Several requests in one run of a program that `vectorize` has given a dimension for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from diffopt import graph as g
from diffopt import sizes
from diffopt.errors import DiffoptError, VerifyError
from diffopt.host import Draw, Given, Host, Picture

if TYPE_CHECKING:
    from diffopt.program import Program

Axes = dict[str, dict[int, int]]
"""By component: the axis of each argument that has the size of the batch."""


def batch_axes(root: fx.GraphModule, size: int) -> Axes:
    """Return, of each component, which axis of which argument has the size of the batch.

    All shapes are worked out again for another size. Where more than that axis changes, a graph
    would not serve every size: a `VerifyError`.
    """
    axes: Axes = {}

    def called(name: str, body: fx.GraphModule, values: list[Any]) -> None:
        pairs = zip(g.placeholders(body), values, strict=True)
        found = {
            index: axis
            for index, (take, value) in enumerate(pairs)
            if (axis := _axis(take, value, size)) is not None
        }
        if axes.setdefault(name, found) != found:
            raise VerifyError(f"{name} is called with and without a dimension for requests")

    takes = []
    for node in g.placeholders(root):
        value = node.meta["val"]
        takes.append(g.fake(torch.empty([size + 1, *value.shape[1:]], dtype=value.dtype)))
    results = sizes.propagate(root, takes, called)
    for node, value in zip(g.outputs(root), results, strict=True):
        if _axis(node, value, size) != 0:
            raise VerifyError(f"output {node.name} has no dimension for requests")
    return axes


def _axis(node: fx.Node, value: Tensor, size: int) -> int | None:
    """Return the axis along which a value has grown by one from what is recorded, `size`."""
    before, after = list(node.meta["val"].shape), list(value.shape)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if not changed:
        return None
    if len(changed) > 1 or (before[changed[0]], after[changed[0]]) != (size, size + 1):
        raise VerifyError(f"{node.name}: of one request more, {before} becomes {after}")
    return changed[0]


def stack(sample: Sequence[Tensor], host: Host, count: int) -> list[Tensor]:
    """Return the inputs of `count` requests: of the one seen at capture, last, and of others.

    The others have that one's random draws and pictures in another order of their elements, so
    that a value that went to the wrong request would show.
    """
    kinds = [step for step in host.steps for _ in range(step.count)]
    free = [isinstance(kind, (Draw, Given, Picture)) for kind in kinds]
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


def serve(
    program: Program,
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    requests: Sequence[Mapping[str, Any]],
) -> list[Any]:
    """Return what each call returns, running as many at once as the program allows.

    Args:
        program: Prepares the inputs and packs the outputs.
        run: Runs flat inputs.
        requests: The arguments of each call.
    """
    flat = [program.prepare(**request) for request in requests]
    outputs: list[Sequence[Tensor]] = []
    for group in _groups(flat, program.batch):
        if program.batch is None:
            outputs += [run(tensors) for tensors in group]
        else:
            made = run([torch.stack(tensors) for tensors in zip(*group, strict=True)])
            outputs += [[tensor[k] for tensor in made] for k in range(len(group))]
    return [
        program.pack(tensors, request.get("output_type"))
        for tensors, request in zip(outputs, requests, strict=True)
    ]


def _groups(
    flat: Sequence[list[Tensor]], limits: tuple[int, int] | None
) -> list[list[list[Tensor]]]:
    """Cut requests into runs that are within the limits."""
    if not flat:
        return []
    low, high = limits or (1, 1)
    runs = -(-len(flat) // high)
    if runs * low > len(flat):
        raise DiffoptError(f"got {len(flat)} requests; it was built for {low} to {high} at once")
    bounds = [len(flat) * k // runs for k in range(runs + 1)]  # runs of about equal size
    return [list(flat[a:b]) for a, b in itertools.pairwise(bounds)]
