"""Components as OpenVINO models: converted from ONNX without weights, and run on torch tensors.

A converted model has a parameter for each weight, so that its files hold none. On loading, each is
replaced by a constant in the memory of the engine's tensor; then OpenVINO compiles the model, which
folds what follows from constants and packs them for its kernels.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13
from torch import Tensor, fx

from diffopt.errors import DiffoptError, first_line
from diffopt.ir import graph as g
from diffopt.ir.strides import with_strides
from diffopt.storage import container

if TYPE_CHECKING:
    import onnx

_TYPES = {
    torch.float64: ov.Type.f64,
    torch.float32: ov.Type.f32,
    torch.bfloat16: ov.Type.bf16,
    torch.float16: ov.Type.f16,
    torch.int64: ov.Type.i64,
    torch.int32: ov.Type.i32,
    torch.int16: ov.Type.i16,
    torch.int8: ov.Type.i8,
    torch.uint8: ov.Type.u8,
    torch.bool: ov.Type.boolean,
}


def options(threads: int) -> dict[str, Any]:
    """Return OpenVINO's options for one request at a time, computed in the model's own types."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # By default it computes in bfloat16 where the CPU has it, whatever the model says,
        "INFERENCE_PRECISION_HINT": "f32",
        # and rounds inputs of layers with 8- and 4-bit weights to 8 bits.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


@cache
def _core() -> ov.Core:
    """Return OpenVINO's library, which looks for devices and plug-ins when it is made."""
    return ov.Core()


def devices() -> list[str]:
    """Return the devices that OpenVINO finds on this machine, as it names them: CPU, GPU, NPU."""
    return [str(name) for name in _core().available_devices]


def widened_types(model: onnx.ModelProto, device: str) -> set[str]:
    """Return the floating-point types of an ONNX model that a device computes in float32."""
    from diffopt.lowering.onnx import gs_tools

    capabilities = _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    names = {"BFLOAT16": "BF16", "FLOAT16": "FP16", "DOUBLE": "FP64"}
    used = gs_tools.types(model)
    return {
        kind.lower() for kind, name in names.items() if kind in used and name not in capabilities
    }


def interface(model: onnx.ModelProto) -> dict[str, Any]:
    """Return what `Session` gives a converted model, as JSON.

    Returns:
        Under "arguments" the names of its arguments, and under "weights" the component's attribute
        that each parameter is, by name.
    """
    from diffopt.lowering.onnx import gs_tools

    locations = gs_tools.external_locations(model, ())
    return {
        "arguments": [value.name for value in model.graph.input],
        "weights": {name: attribute for name, (attribute, _) in locations.items()},
    }


def wide_integers(gm: fx.GraphModule) -> str | None:
    """Return which weight has whole numbers that OpenVINO, which has 32 bits for them, lacks."""
    limits = torch.iinfo(torch.int32)
    for name, tensor in g.named_tensors(gm):
        if tensor.dtype == torch.int64 and tensor.numel():
            low, high = torch.aminmax(tensor)
            if low < limits.min or high > limits.max:
                return name
    return None


def convert(model: onnx.ModelProto) -> dict[str, bytes]:
    """Return an ONNX model in OpenVINO's own form, as the contents of its two files.

    Args:
        model: The model. Its initializers with external data become parameters of their names.

    Raises:
        DiffoptError: OpenVINO lacks an operator.
    """
    from diffopt.lowering.onnx import gs_tools

    try:
        converted = _core().read_model(gs_tools.with_weights_as_inputs(model).SerializeToString())
    except RuntimeError as error:
        raise _refusal(error) from error
    _name_nodes(converted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        ov.serialize(converted, path, path.with_suffix(".bin"))
        return {file.suffix[1:]: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _refusal(error: RuntimeError) -> DiffoptError:
    """Return OpenVINO's error as one line, with the operators that it lacks where that is why."""
    version, text = ov.get_version().partition("-")[0], str(error)
    if match := re.search(r"No conversion rule found for operations: (.*)", text):
        return DiffoptError(f"OpenVINO {version} lacks {match[1].strip()}")
    # Lines that begin so say where in OpenVINO it was found.
    lines = [x for x in text.splitlines() if x.strip() and not x.startswith(("Exception", "Check"))]
    return DiffoptError(
        f"OpenVINO {version} refuses it: {lines[0] if lines else first_line(error)}"
    )


def _name_nodes(model: ov.Model) -> None:
    """Name nodes by their order: by default names count all nodes that a process has made."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")


class Session:
    """A compiled model, as a function of a component's flat arguments."""

    def __init__(
        self,
        files: Mapping[str, Any],
        arguments: Sequence[str],
        weights: Mapping[str, Tensor],
        strides: Sequence[tuple[int, ...] | None],
        device: str,
        options: Mapping[str, Any],
    ) -> None:
        """Compile a model for a device.

        Args:
            files: What `convert` returned.
            arguments: The names of the component's arguments; the model may lack unread ones.
            weights: Values of the parameters of these names.
            strides: The strides that each output is to have; None: contiguous.
            device: As OpenVINO names it.
            options: Of OpenVINO.

        Raises:
            DiffoptError: The device cannot take the model.
        """
        try:
            small = np.frombuffer(files["bin"] or b"\0", np.uint8)
            model = _core().read_model(
                bytes(files["xml"]), ov.Tensor(small, [len(small)], ov.Type.u8)
            )
            # OpenVINO holds no references to the memory of constants.
            self._constants = files["bin"], {k: _dense(tensor) for k, tensor in weights.items()}
            _set_weights(model, self._constants[1])
            self._request = (
                _core().compile_model(model, device, dict(options)).create_infer_request()
            )
        except RuntimeError as error:
            raise _refusal(error) from error
        names = [node.get_friendly_name() for node in model.get_parameters()]
        self._inputs = [names.index(name) if name in names else None for name in arguments]
        self._strides = list(strides)
        ports = self._request.model_outputs
        shapes = [port.get_partial_shape() for port in ports]
        self._outputs = [
            None if shape.is_dynamic else (list(shape.to_shape()), _dtype(port.get_element_type()))
            for shape, port in zip(shapes, ports, strict=True)
        ]

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model."""
        tensors = [_dense(tensor) for tensor in tensors]  # which have to live until it has run
        for index, tensor in zip(self._inputs, tensors, strict=True):
            if index is not None:
                self._request.set_input_tensor(index, _shared(tensor, _TYPES[tensor.dtype]))
        outputs = [out and torch.empty(out[0], dtype=out[1]) for out in self._outputs]
        for index, output in enumerate(outputs):
            if output is not None:  # results live on, as inputs of later steps
                self._request.set_output_tensor(index, _shared(output, _TYPES[output.dtype]))
        self._request.infer()
        results = [
            _copy(self._request.get_output_tensor(index)) if output is None else output
            for index, output in enumerate(outputs)
        ]
        pairs = zip(results, self._strides, strict=True)
        return [out if stride is None else with_strides(out, stride) for out, stride in pairs]


def _set_weights(model: ov.Model, weights: Mapping[str, Tensor]) -> None:
    """Replace parameters by constants in the memory of tensors."""
    for parameter in list(model.get_parameters()):
        tensor = weights.get(parameter.get_friendly_name())
        if tensor is not None:
            shape = parameter.get_partial_shape().to_shape()
            value = _shared(tensor, parameter.get_element_type(), list(shape))
            constant = opset13.constant(value, shared_memory=True)
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _dense(tensor: Tensor) -> Tensor:
    """Return a tensor in row-major order, itself if it is."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def _shared(tensor: Tensor, kind: ov.Type, shape: Sequence[int] | None = None) -> ov.Tensor:
    """Return a dense tensor for OpenVINO, in its memory, to which this holds no reference."""
    shape = list(tensor.shape) if shape is None else shape
    if not tensor.numel():
        return ov.Tensor(kind, shape)
    raw = np.frombuffer(container.raw_bytes(tensor), np.uint8)
    if -(-math.prod(shape) * kind.bitwidth // 8) != len(raw):  # it would be read past its end
        raise DiffoptError(f"a tensor of {len(raw)} bytes is no {kind.to_string()}{shape}")
    return ov.Tensor(raw, shape, kind)


def _dtype(kind: ov.Type) -> torch.dtype:
    return next(dtype for dtype, each in _TYPES.items() if each == kind)


def _copy(tensor: ov.Tensor) -> Tensor:
    """Return a copy of an output, which the next run overwrites."""
    result = torch.empty(list(tensor.shape), dtype=_dtype(tensor.element_type))
    if result.numel():
        tensor.copy_to(_shared(result, tensor.element_type))
    return result
