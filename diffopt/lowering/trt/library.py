"""Which TensorRT to use: the full one, or TensorRT for RTX; both have the same Python API.

The full one times kernels, so it builds for the GPU at hand and for no other. The one for RTX needs
no GPU to build, and leaves choosing kernels to the first run; it knows some compute capabilities.
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
"""The module of each builder; the names are those of the packages, too."""


@dataclass(frozen=True)
class Library:
    """A TensorRT that is installed here.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        trt: Its module.
        capability: What to build for; None: the GPU at hand.
    """

    name: str
    trt: Any
    capability: Any = None

    @property
    def version(self) -> str:
        """The version of the module, as the manifest says it."""
        return str(self.trt.__version__)

    def lacks(self, number: str) -> str | None:
        """Say why it has no matrix products in a format that the GPU has; None: it has."""
        if self.name == "tensorrt-rtx" and number == "fp32" and "SM75" in str(self.capability):
            return f"{self.name} has no matrix products in fp32 for SM75; add the pass cast(fp16)"
        return None


def find_library(builder: str, device: str, capability: Capability) -> Library:
    """Return the TensorRT that builds for a device.

    Args:
        builder: "tensorrt", "tensorrt-rtx", or "auto" for the first of these that can.
        device: The device's name, for messages.
        capability: Its compute capability.
    """
    reasons = []
    for name in MODULES if builder == "auto" else [builder]:
        found = _choose(name, device, capability)
        if isinstance(found, Library):
            return found
        reasons.append(found)
    raise DiffoptError("; ".join(reasons))


def _choose(name: str, device: str, capability: Capability) -> Library | str:
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
    """Return the library that runs the plans of a builder."""
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
    """Return a logger that keeps what TensorRT says: `lines` of (severity, text)."""

    class Lines(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity.name, text))

    return Lines()


def complaints(lines: list[tuple[str, str]], *severities: str) -> Iterator[str]:
    """Yield what was said with one of these severities, each once, without the name of the call."""
    told = set()
    for severity, text in lines:
        text = " ".join(text.split())
        if severity in severities and text not in told:
            told.add(text)
            yield text
