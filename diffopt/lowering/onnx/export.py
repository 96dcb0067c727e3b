"""Components as ONNX: exported, named, with quantized values as QuantizeLinear/DequantizeLinear."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Bounds
from diffopt.lowering.compile_inputs import dynamic_shapes, example
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
    """Return a component as ONNX.

    Inputs are called like the component's arguments, outputs y0, y1, …, and initializers like the
    component's tensors, but for small ones from which something was computed. Quantized values go
    through QuantizeLinear and DequantizeLinear; weights of 4 bits are INT4.

    Args:
        gm: The component.
        name: What the model is called.
        opset: Of ONNX.
        sizes: The sizes that may change.
        weights: Whether the model holds the tensors. If not, each is external data whose location
            is its name; those of 4 bits are UINT4 then, with 8 as the zero point, which is how the
            component stores them.
    """
    optional.check(*NEEDS, extra="onnx")
    from diffopt.lowering.onnx import gs_tools

    prepared = prepare.prepare(gm)
    try:
        model = _translate(prepared.gm, opset, sizes)
    except torch.onnx.OnnxExporterError as error:
        raise DiffoptError(f"{name}: {_lacking(error)}; use another target") from error
    proto = _serialize(model, prepared, weights)
    proto.graph.name = name
    return gs_tools.tidy(gs_tools.pack_int4(proto, prepared.packed, signed=weights))


def _lacking(error: BaseException | None) -> str:
    """Say what of a component has no form in ONNX, from the exporter's chain of errors."""
    while error is not None:
        if found := re.search(r"target=torch\.ops\.([\w.]+?)(\.default)?\]", str(error)):
            return f"{found[1]} has no form in ONNX"
        text, error = str(error), error.__cause__
    return f"it has no form in ONNX ({text.partition(chr(10))[0]})"


def _translate(gm: fx.GraphModule, opset: int, sizes: Bounds | None) -> Any:
    """Return a prepared component in ONNX's IR, constants folded and weights untouched."""
    from diffopt.lowering.onnx import translations

    arguments = tuple(example(n.meta["val"]) for n in g.placeholders(gm))
    shapes = dynamic_shapes(len(arguments), sizes) if sizes else None
    with _quiet(), torch.no_grad():
        exported = torch.export.export(gm, arguments, dynamic_shapes=shapes, strict=False)
        made: Any = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=opset,
            custom_translation_table=translations.table(),
        )
        model = made.model
        weights = list(model.graph.initializers.values())
        count = len(model.graph.inputs)
        # As inputs, weights are no constants, so that nothing is computed from them here.
        model.graph.initializers.clear()
        model.graph.inputs.extend(weights)
        _simplify(model)
    del model.graph.inputs[count:]
    for weight in weights:
        model.graph.initializers[weight.name] = weight
    _name(model, weights, [n.name for n in g.placeholders(gm)], _modules(gm, exported.graph))
    return model


def _simplify(model: Any) -> None:
    """Compute what is constant, and each value once."""
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


def _modules(gm: fx.GraphModule, exported: fx.Graph) -> dict[str, str]:
    """Return the model's module that a node of the exported graph comes from, by the node's name.

    Exporting keeps the order of an operator's calls, and no other trace of where they were.
    """
    calls: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        calls.setdefault(node.target, []).append(node)
    found = {}
    for node in exported.nodes:
        if node.op == "call_function" and calls.get(node.target):
            found[node.name] = str(calls[node.target].pop(0).meta.get("module", ""))
    return found


def _name(model: Any, weights: list[Any], inputs: list[str], modules: Mapping[str, str]) -> None:
    """Give inputs and outputs their names, and others what their module and their order give."""
    for index, node in enumerate(model.graph):
        origin = node.metadata_props.get("pkg.torch.onnx.fx_node", "").partition(" ")[0]
        node.name = f"{modules.get(origin.removeprefix('%'), '')}/{node.op_type}_{index}"
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}_{place}"
    own = {id(weight) for weight in weights}
    others = [v for v in model.graph.initializers.values() if id(v) not in own]
    for index, value in enumerate(others):
        value.name = f"/folded_{index}"
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for index, value in enumerate(model.graph.outputs):
        value.name = f"y{index}"


def _serialize(model: Any, prepared: prepare.Prepared, weights: bool) -> onnx.ModelProto:
    """Return the model as a proto without what says where its nodes come from."""
    import onnx_ir as ir

    own = dict(g.named_tensors(prepared.gm))
    for name, value in model.graph.initializers.items():
        if not weights and name in own:
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
    """Keep from the terminal what the exporter says of packages that it misses."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
