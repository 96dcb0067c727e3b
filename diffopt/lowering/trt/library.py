"""TensorRT and TensorRT for RTX, which have the same Python API.

TensorRT times kernels, so it builds only for the GPU of this machine. TensorRT for RTX builds
without a GPU, for some compute capabilities, and chooses kernels in the first run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.lowering import cuda_runtime
from diffopt.lowering.cuda_runtime import Capability

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The module of each builder, by the name of its package."""


@dataclass(frozen=True)
class Library:
    """A TensorRT that is installed here.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        trt: Its module.
        capability: The compute capability to build for; None: that of this machine's GPU.
    """

    name: str
    trt: Any
    capability: Any = None

    @property
    def version(self) -> str:
        """The version of the module, as in the manifest."""
        return str(self.trt.__version__)

    def lacks(self, number: str) -> str | None:
        """Return why it has no matrix products in a format that the GPU has; None if it has."""
        if self.name == "tensorrt-rtx" and number == "fp32" and "SM75" in str(self.capability):
            return f"{self.name} has no matrix products in fp32 for SM75; add the pass cast(fp16)"
        return None


def find_library(builder: str, device: str, capability: Capability) -> Library:
    """Return the TensorRT that builds for a device.

    Args:
        builder: "tensorrt", "tensorrt-rtx", or "auto" for the first of these that can.
        device: The device's name, for messages.
        capability: The device's compute capability.

    Raises:
        DiffoptError: No such TensorRT is installed, or none builds for the device.
    """
    reasons = []
    for name in MODULES if builder == "auto" else [builder]:
        library = _library_or_reason(name, device, capability)
        if isinstance(library, Library):
            return library
        reasons.append(library)
    raise DiffoptError("; ".join(reasons))


def _library_or_reason(name: str, device: str, capability: Capability) -> Library | str:
    """Return the library if it can build for the device, or why it cannot."""
    if not is_installed(name):
        return f"{name} is not installed (pip install {name})"
    at_hand = cuda_runtime.capability()
    if name == "tensorrt":
        if at_hand == capability:
            return Library(name, load(name))
        here = "there is none here" if at_hand is None else f"the one here has {_dotted(at_hand)}"
        return (
            f"{name} builds on the GPU that it builds for, of compute capability"
            f" {_dotted(capability)} ({device}), and {here}"
        )
    trt = load(name)
    known = trt.ComputeCapability.__members__
    wanted = f"SM{capability[0]}{capability[1]}"
    if wanted in known:
        return Library(name, trt, known[wanted])
    if at_hand == capability:
        return Library(name, trt, known["CURRENT"])
    names = ", ".join(other for other in known if other.startswith("SM"))
    return f"{name} builds for {names}, and {device} is {wanted}"


def load_library(name: str) -> Library:
    """Return the library that runs a builder's plans; it has to be installed."""
    if not is_installed(name):
        raise DiffoptError(f"its plans need the package {name}: pip install {name}")
    return Library(name, load(name))


def is_installed(name: str) -> bool:
    """Tell whether the module of a builder is there, without importing it."""
    return optional.is_installed(MODULES[name])


def load(name: str) -> Any:
    """Import the module of a builder; one that is broken is a `DiffoptError`."""
    library = optional.module_or_reason(MODULES[name])
    if isinstance(library, str):
        raise DiffoptError(f"the package {name} {library}")
    return library


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def logger(trt: Any) -> Any:
    """Return a logger that collects TensorRT's messages: `lines` of (severity, text)."""

    class Lines(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity.name, text))

    return Lines()


def complaints(lines: list[tuple[str, str]], *severities: str) -> Iterator[str]:
    """Yield the messages of some severities, each once."""
    unique = dict.fromkeys(" ".join(t.split()) for severity, t in lines if severity in severities)
    yield from unique
