"""Runs ONNX models with ONNX Runtime on the CPU, on torch tensors without copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
import torch
import torch.utils.dlpack
from torch import Tensor

from diffopt.errors import DiffoptError, first_line
from diffopt.ir.strides import with_strides
from diffopt.storage import container

_PROVIDERS = ["CPUExecutionProvider"]


def options(threads: int, pack: bool) -> ort.SessionOptions:
    """Return session options: threads inside an operator, and whether to prepack constants."""
    result = ort.SessionOptions()
    result.intra_op_num_threads = threads
    result.inter_op_num_threads = 1
    result.log_severity_level = 3  # errors
    # `ort_kernels` has chosen integer kernels; ONNX Runtime's own QDQ fusion breaks opset 21.
    result.add_session_config_entry("session.disable_quant_qdq", "1")
    # Without VNNI, products of uint8 and int8 saturate in 16 bits: there, take uint8 and uint8.
    result.add_session_config_entry("session.x64quantprecision", "1")
    if not pack:
        result.add_session_config_entry("session.disable_prepacking", "1")
    return result


def run_setup(model: bytes, weights: Mapping[str, Tensor], threads: int) -> list[Tensor]:
    """Return the outputs of a setup model, which has no inputs.

    Args:
        model: The model.
        weights: Values of its external initializers by location, read as the type that the model
            declares.
        threads: The number of threads to run on.
    """
    session_options = options(threads, pack=True)
    files = {name: container.raw_bytes(tensor) for name, tensor in weights.items()}
    buffers = [np.frombuffer(content, np.uint8) for content in files.values()]
    lengths = [len(buffer) for buffer in buffers]
    session_options.add_external_initializers_from_files_in_memory(list(files), buffers, lengths)
    session = ort.InferenceSession(model, session_options, providers=_PROVIDERS)
    return [_tensor(result) for result in session.run_with_ort_values(None, {})]


def _value(tensor: Tensor) -> ort.OrtValue:
    """Return a tensor as an `OrtValue`, in the same memory if it is contiguous."""
    dense = tensor.detach().contiguous()
    if dense.dtype == torch.bool:  # ONNX Runtime does not read torch's DLPack type for bool
        return ort.OrtValue.ortvalue_from_numpy(dense.numpy())
    return ort.OrtValue.from_dlpack(dense)


def _tensor(value: ort.OrtValue) -> Tensor:
    """Return an `OrtValue` as a tensor in the same memory."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(value)
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


class Session:
    """A loaded model, as a function of a component's flat arguments."""

    def __init__(
        self,
        model: bytes,
        constants: Mapping[str, Tensor],
        strides: Sequence[tuple[int, ...] | None],
        threads: int,
        pack: bool,
    ) -> None:
        """Load a model.

        Args:
            model: The model.
            constants: Values of its external initializers by name.
            strides: The strides that each output is to have; None: contiguous.
            threads: The number of threads to run on.
            pack: Whether to copy constants into the layout that kernels prefer.

        Raises:
            DiffoptError: ONNX Runtime refuses the model.
        """
        session_options = options(threads, pack)
        values = {name: _value(tensor) for name, tensor in constants.items()}
        session_options.add_external_initializers(list(values), list(values.values()))
        if not pack:
            # `add_initializer` shares memory; `add_external_initializers` alone copies.
            for name, constant in values.items():
                session_options.add_initializer(name, constant)
            self._constants = values
        try:
            self._session = ort.InferenceSession(model, session_options, providers=_PROVIDERS)
        except Exception as error:  # each kind of error is a class of its own, without a base
            reason = first_line(error)
            raise DiffoptError(f"ONNX Runtime {ort.__version__} refuses it: {reason}") from error
        self._inputs = [argument.name for argument in self._session.get_inputs()]
        self._strides = list(strides)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model."""
        feeds = dict(zip(self._inputs, map(_value, tensors), strict=True))
        outputs = map(_tensor, self._session.run_with_ort_values(None, feeds))
        pairs = zip(outputs, self._strides, strict=True)
        return [out if stride is None else with_strides(out, stride) for out, stride in pairs]
