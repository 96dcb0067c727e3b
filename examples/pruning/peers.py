"""Prunes with torch-pruning, and compares which layers both packages couple.

torch-pruning works on modules: a model is pruned in place, and traced afterwards. As in its own
examples, it is told the number of heads, and the layers whose outputs are kept; sizes that modules
store are corrected here.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffopt import spec
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.pruning.coupling import couple
from examples.pruning.configurations import THEIRS, UNROLLED
from examples.study.models import load
from examples.study.study import Study

# The component, example arguments, and the layers whose outputs are kept: the last, and in the
# transformer the first, as torch-pruning does not follow the table of positions, no parameter,
# that is added to its residual stream.
_MODELS: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "fashion-sd": (
        "unet",
        {
            "sample": torch.zeros(2, 4, 8, 8),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": torch.zeros(2, 8, 96),
        },
        ("conv_out",),
    ),
    "fashion-dit": (
        "transformer",
        {
            "hidden_states": torch.zeros(2, 4, 8, 8),
            "timestep": torch.tensor([10, 10]),
            "class_labels": torch.tensor([1, 2]),
        },
        ("proj_out_2", "pos_embed.proj"),
    ),
}
ROOTS = (nn.Conv2d, nn.Linear)


def version() -> str | None:
    """Return the version of torch-pruning; None where it is not installed."""
    try:
        return importlib.metadata.version(THEIRS)
    except importlib.metadata.PackageNotFoundError:
        return None


def pruned(study: Study, call: str) -> Any:
    """Return the study's pipeline, pruned as a call such as `torch-pruning(ratio=0.3)` says."""
    ((argument,),) = ([*parsed.arguments] for parsed in spec.parse(call))
    pipe = load(study.name)
    pruner, model = _pruner(study.name, pipe, float(argument.value.text))
    pruner.step()
    for module in model.modules():
        if hasattr(module, "channels") and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.channels = module.conv.in_channels  # which it compares with its input
    return pipe


def _pruner(name: str, pipe: Any, ratio: float) -> tuple[Any, nn.Module]:
    import torch_pruning

    component, arguments, kept = _MODELS[name]
    model: nn.Module = getattr(pipe, component).requires_grad_(True)
    heads = {
        layer: module.heads
        for module in model.modules()
        if hasattr(module, "to_q")
        for layer in (module.to_q, module.to_k, module.to_v)
    }
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {**arguments, "return_dict": False},
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(layer) for layer in kept],
        num_heads=heads,
        root_module_types=[*ROOTS],
    )
    return pruner, model


# Groups

Weights = frozenset[tuple[str, int]]
"""Axes of weights of convolutions and linear layers."""


def groups(study: Study) -> tuple[dict[str, Weights], list[tuple[str, Weights]]]:
    """Return the coupled weights of the denoiser, by the layer whose outputs they are.

    Returns:
        Theirs, and ours, which may have several of one layer.
    """
    component = _MODELS[study.name][0]
    pruner, model = _pruner(study.name, load(study.name), 0.0)
    names = {module: name for name, module in model.named_modules()}
    layers = [name for module, name in names.items() if isinstance(module, ROOTS)]
    weights = {name.replace(".", "_") + "_weight": name for name in layers}
    return _theirs(pruner, names), _ours(study.program(UNROLLED), component, weights)


def _theirs(pruner: Any, names: Mapping[nn.Module, str]) -> dict[str, Weights]:
    import torch_pruning

    outputs = torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels
    groups = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, [*ROOTS]):
        members = [(dep.target.module, dep.handler) for dep, _ in group]
        groups[names[members[0][0]]] = frozenset(
            (names[module], 0 if handler in outputs else 1)
            for module, handler in members
            if isinstance(module, ROOTS)
        )
    return groups


def _ours(
    program: Program, component: str, weights: Mapping[str, str]
) -> list[tuple[str, Weights]]:
    tensors = {
        id(tensor): weights[name]
        for name, tensor in g.named_tensors(program.components[component])
        if name in weights
    }
    groups = []
    for group in couple(program).groups:
        axes = {axis for unit in group.units for axis in unit.members}
        members = frozenset((tensors[key], axis) for key, axis in axes if key in tensors)
        if members:
            groups.append((group.name.partition(".")[2], members))
    return groups


def compared(study: Study) -> list[dict[str, Any]]:
    """Return each of their groups, with ours that prune outputs of the same layers."""
    theirs, ours = groups(study)
    rows = []
    for name, weights in theirs.items():
        outputs = {(layer, axis) for layer, axis in weights if axis == 0}
        overlapping = [(other, axes) for other, axes in ours if axes & outputs]
        union = frozenset().union(*(axes for _, axes in overlapping))
        rows.append(
            {
                "layer": name,
                "ours": [other for other, _ in overlapping],
                "only theirs": sorted(f"{layer} {_SIDES[axis]}" for layer, axis in weights - union),
                "only ours": sorted(f"{layer} {_SIDES[axis]}" for layer, axis in union - weights),
            }
        )
    return rows


_SIDES = ("out", "in")
