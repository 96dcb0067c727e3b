"""Components as ONNX: exported, named, with quantized values as QuantizeLinear/DequantizeLinear."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import fx

from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.lowering.compile_inputs import dynamic_shapes, example_tensor
from diffopt.lowering.onnx import prepare

if TYPE_CHECKING:
    import onnx

NEEDS = ("onnx", "onnxscript", "onnx_graphsurgeon")


def export(
    gm: fx.GraphModule,
    name: str,
    *,
    opset: int = 21,
    sizes: Bounds | None = None,
    weights: bool = True,
) -> onnx.ModelProto:
    """Return a component as an ONNX model.

    Inputs are named like the component's arguments, outputs y0, y1, …, and initializers like the
    component's tensors, except small ones that were folded. Quantized values use QuantizeLinear
    and DequantizeLinear; 4-bit weights are INT4.

    Args:
        gm: The component.
        name: The name of the model's graph.
        opset: The version of ONNX's operators.
        sizes: Dynamic sizes, with their bounds.
        weights: Whether the model holds the tensors. If not, each is external data whose location
            is its name, and 4-bit weights are UINT4 with a zero point of 8, which is how the
            component stores them.

    Raises:
        DiffoptError: An operator has no ONNX form, or a package is missing.
    """
    optional.check(*NEEDS, extra="onnx")
    from diffopt.lowering.onnx import cleanup

    prepared = prepare.prepare(gm)
    try:
        model = _translate(prepared.gm, opset, sizes)
    except torch.onnx.OnnxExporterError as error:
        raise DiffoptError(f"{name}: {_unsupported(error)}; use another target") from error
    proto = _serialize(model, prepared, weights)
    proto.graph.name = name
    return cleanup.clean_up(cleanup.pack_int4(proto, prepared.packed, signed=weights))


def _unsupported(error: BaseException | None) -> str:
    """Return which operator has no ONNX form, from the exporter's chain of errors."""
    while error is not None:
        if match := re.search(r"target=torch\.ops\.([\w.]+?)(\.default)?\]", str(error)):
            return f"{match[1]} has no form in ONNX"
        text, error = str(error), error.__cause__
    return f"it has no form in ONNX ({text.partition(chr(10))[0]})"


def _translate(gm: fx.GraphModule, opset: int, sizes: Bounds | None) -> Any:
    """Return a prepared component as an `onnx_ir.Model`, with constants but no weights folded."""
    from diffopt.lowering.onnx import translations

    arguments = tuple(example_tensor(n.meta["val"]) for n in g.placeholders(gm))
    shapes = dynamic_shapes(len(arguments), sizes) if sizes else None
    with _quiet(), _operators_read_once(), torch.no_grad():
        exported = torch.export.export(gm, arguments, dynamic_shapes=shapes, strict=False)
        onnx_program: Any = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=opset,
            custom_translation_table=translations.table(),
        )
        model = onnx_program.model
        weights = list(model.graph.initializers.values())
        count = len(model.graph.inputs)
        # Weights are inputs meanwhile: initializers would be folded.
        model.graph.initializers.clear()
        model.graph.inputs.extend(weights)
        _simplify(model)
    del model.graph.inputs[count:]
    for weight in weights:
        model.graph.initializers[weight.name] = weight
    modules = _node_modules(gm, exported.graph)
    _rename(model, weights, [n.name for n in g.placeholders(gm)], modules)
    return model


def _simplify(model: Any) -> None:
    """Inline functions, fold constants, and eliminate common subexpressions."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.OutputFixPass(),
    )(model)


def _node_modules(gm: fx.GraphModule, exported: fx.Graph) -> dict[str, str]:
    """Return the path of the module that each node of the exported graph comes from.

    Nodes are matched by the order of each operator's calls: exporting preserves nothing else.
    """
    calls: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        calls.setdefault(node.target, []).append(node)
    modules = {}
    for node in exported.nodes:
        if node.op == "call_function" and calls.get(node.target):
            modules[node.name] = str(calls[node.target].pop(0).meta.get("module", ""))
    return modules


def _rename(model: Any, weights: list[Any], inputs: list[str], modules: Mapping[str, str]) -> None:
    """Name inputs and outputs as `export` says, and nodes by module, operator and index."""
    for index, node in enumerate(model.graph):
        origin = node.metadata_props.get("pkg.torch.onnx.fx_node", "").partition(" ")[0]
        node.name = f"{modules.get(origin.removeprefix('%'), '')}/{node.op_type}_{index}"
        for position, value in enumerate(node.outputs):
            value.name = f"{node.name}_{position}"
    weight_ids = {id(weight) for weight in weights}
    folded = [v for v in model.graph.initializers.values() if id(v) not in weight_ids]
    for index, value in enumerate(folded):
        value.name = f"/folded_{index}"
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for index, value in enumerate(model.graph.outputs):
        value.name = f"y{index}"


def _serialize(model: Any, prepared: prepare.Prepared, weights: bool) -> onnx.ModelProto:
    """Return the model as a proto, without metadata about the source of its nodes."""
    import onnx_ir as ir

    tensor_names = {name for name, _ in g.named_tensors(prepared.gm)}
    for name, value in model.graph.initializers.items():
        if not weights and name in tensor_names:
            tensor = value.const_value
            value.const_value = ir.ExternalTensor(
                name, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
    values = [value for node in model.graph for value in node.outputs]
    ends = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for part in (model, model.graph, *model.graph, *values, *ends):
        part.metadata_props.clear()
        part.doc_string = None
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Keep the exporter from reading the sources of all operators' forms for each component.

    That takes longer than to export a small one.
    """
    from torch.onnx._internal.exporter import _registration

    forms: Any = getattr(_registration, "onnxscript_apis", None)
    if not hasattr(forms, "get_torchlib_ops"):  # each torch version has its own names
        yield
        return
    with mock.patch.object(forms, "get_torchlib_ops", _once(forms.get_torchlib_ops)):
        yield


@cache
def _once(function: Callable[[], Any]) -> Callable[[], Any]:
    return cache(function)
