"""Runs ONNX models of an engine with ONNX Runtime on the CPU, on tensors and without copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
import torch
import torch.utils.dlpack
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.lowering.executor import lay_out
from diffopt.storage import container

_PROVIDERS = ["CPUExecutionProvider"]


def options(threads: int, pack: bool) -> ort.SessionOptions:
    """Return how sessions run."""
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 3  # errors
    # The models have their integer kernels already; its own search for some breaks opset 21.
    made.add_session_config_entry("session.disable_quant_qdq", "1")
    if not pack:
        made.add_session_config_entry("session.disable_prepacking", "1")
    return made


def run_setup(model: bytes, weights: Mapping[str, Tensor], threads: int) -> list[Tensor]:
    """Return the results of a model of weights alone.

    Args:
        model: The model.
        weights: The values of its constants, of whatever type the model says that they have.
        threads: To run on.
    """
    made = options(threads, pack=True)
    files = {name: container.raw(tensor) for name, tensor in weights.items()}
    buffers = [np.frombuffer(content, np.uint8) for content in files.values()]
    lengths = [len(buffer) for buffer in buffers]
    made.add_external_initializers_from_files_in_memory(list(files), buffers, lengths)
    session = ort.InferenceSession(model, made, providers=_PROVIDERS)
    return [_tensor(result) for result in session.run_with_ort_values(None, {})]


def _value(tensor: Tensor) -> ort.OrtValue:
    """Return a tensor as ONNX Runtime has it, in the same memory if it is contiguous."""
    dense = tensor.detach().contiguous()
    if dense.dtype == torch.bool:  # torch says so in a way that ONNX Runtime does not read
        return ort.OrtValue.ortvalue_from_numpy(dense.numpy())
    return ort.OrtValue.from_dlpack(dense)


def _tensor(value: ort.OrtValue) -> Tensor:
    """Return what ONNX Runtime has as a tensor in the same memory."""
    made: Tensor = torch.utils.dlpack.from_dlpack(value)
    return made.view(torch.bool) if value.data_type() == "tensor(bool)" else made


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
            constants: The values of its constants.
            strides: The memory layout that each result is to have; None: contiguous.
            threads: To run on.
            pack: Whether constants are copied into the form that kernels like best.
        """
        made = options(threads, pack)
        values = {name: _value(tensor) for name, tensor in constants.items()}
        made.add_external_initializers(list(values), list(values.values()))
        if not pack:
            # What is given this way is read where it is; the first way alone makes a copy.
            for name, constant in values.items():
                made.add_initializer(name, constant)
            self._constants = values
        try:
            self._session = ort.InferenceSession(model, made, providers=_PROVIDERS)
        except Exception as error:  # it has a class of its own for every kind
            reason = str(error).strip().partition("\n")[0]
            raise DiffoptError(f"ONNX Runtime {ort.__version__} refuses it: {reason}") from error
        self._inputs = [argument.name for argument in self._session.get_inputs()]
        self._strides = list(strides)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model."""
        given = dict(zip(self._inputs, map(_value, tensors), strict=True))
        results = map(_tensor, self._session.run_with_ort_values(None, given))
        pairs = zip(results, self._strides, strict=True)
        return [made if stride is None else lay_out(made, stride) for made, stride in pairs]
