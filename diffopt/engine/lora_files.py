"""Reads low-rank adapters (LoRA) from safetensors files, by whichever convention they name layers.

    unet.mid_block.attentions.0.proj_in.lora_A.weight           diffusers, PEFT
    base_model.model.mid_block.attentions.0.proj_in.lora_A.…    PEFT, with adapter_config.json
    unet.….to_q.lora.down.weight, ….processor.to_q_lora.down.…  earlier versions of diffusers
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   kohya, with ….alpha

A layer's change is s B A, where A is called "down" here and B "up". What a file has besides such
pairs is refused by name: an adapter is taken as a whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, first_line, printable

_PART = re.compile(
    r"(?P<layer>.+)\.(lora(?:\.|_linear_layer\.|_))(?P<part>A|B|down|up)(?:\.[^.]+)?\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
# Of attention processors in earlier versions of diffusers.
_PROCESSOR = re.compile(r"\.processor\.(to_[a-z]+(?:_proj)?)_lora\.")
_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a LoRA of three factors",
    "lora_embedding_": "a LoRA of an embedding",
    ".diff": "whole weights",
    ".bias": "a LoRA with biases",
}
_METADATA = "lora_adapter_metadata"  # in which diffusers writes the configuration of PEFT
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True, eq=False)
class Layer:
    """The adapter of one layer.

    Attributes:
        key: The layer's name in the file.
        down: A [rank, inputs, …]; a convolution's has pixels.
        up: B [outputs, rank, …], of single pixels.
        alpha: What the change is multiplied by, and divided by the rank, or by its root.
        is_root: Whether it is the root.
    """

    key: str
    down: Tensor
    up: Tensor
    alpha: float | None = None
    is_root: bool = False

    @property
    def scale(self) -> float:
        """What the product of the two is multiplied by."""
        rank = len(self.down)
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.is_root else rank)

    def change(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        """Return the change of a weight of this shape at a scale."""
        up, down = self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1)
        return (up * (self.scale * scale) @ down).reshape(shape)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Say why it is no adapter of a weight of this shape, None if it is one."""
        down, up = list(self.down.shape), list(self.up.shape)
        rows = math.prod(shape[1:])
        if (
            min(len(down), len(up), len(shape)) < 2
            or math.prod(up[2:]) != 1
            or up[1] != down[0]
            or up[0] != shape[0]
            or math.prod(down[1:]) != rows
        ):
            return f"{self.key}: factors of the shapes {up} and {down} for a weight {list(shape)}"
        return None


def read(path: str | os.PathLike[str]) -> list[Layer]:
    """Return the layers of an adapter.

    Args:
        path: A safetensors file, or a folder with one, in which diffusers or PEFT has saved it.

    Raises:
        DiffoptError: There is no such file, or it has something else than pairs of factors.
    """
    file, config = _find(Path(path))
    try:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            about = opened.metadata() or {}
    except OSError as error:
        raise DiffoptError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # safetensors has a type of error of its own
        raise DiffoptError(f"{file}: is no safetensors file ({first_line(error)})") from None
    try:
        config |= json.loads(about.get(_METADATA, "{}"))
        return _layers(file, tensors, _Settings(config))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise DiffoptError(f"{file}: its configuration is malformed: {first_line(error)}") from None


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the tensors, and the configuration beside it."""
    if not path.is_dir():
        if not path.exists():
            raise DiffoptError(f"{path}: no such file")
        if path.suffix != ".safetensors":
            raise DiffoptError(
                f"{path}: a LoRA is read of a .safetensors file alone; others may run code"
            )
        return path, {}
    found = [path / name for name in _FILES if (path / name).is_file()]
    found = found or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise DiffoptError(f"{path}: has {len(found)} safetensors files; name the one to load")
    settings = path / "adapter_config.json"
    if not settings.is_file():
        return found[0], {}
    try:
        config = json.loads(settings.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DiffoptError(f"{settings}: cannot be read: {first_line(error)}") from None
    return found[0], config if isinstance(config, dict) else {}


class _Settings:
    """The configuration of PEFT, or those of several components, with their names in front."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def get(self, layer: str, name: str) -> Any:
        """Return a setting for a layer: its component's, else that of all; None if there is none.

        `NAME_pattern` has those of single layers, by the end of their names.
        """
        component, _, rest = layer.partition(".")
        for prefix, path in ((f"{component}.", rest), ("", layer)):
            patterns = self.config.get(f"{prefix}{name}_pattern") or {}
            for pattern, value in patterns.items():
                if re.fullmatch(rf"(.*\.)?({pattern})", path):
                    return value
            value = self.config.get(f"{prefix}lora_{name}", self.config.get(f"{prefix}{name}"))
            if value is not None:
                return value
        return None


def _layers(file: Path, tensors: Mapping[str, Tensor], settings: _Settings) -> list[Layer]:
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name = _PROCESSOR.sub(lambda m: f".{m[1]}{'.0' * (m[1] == 'to_out')}.lora.", key)
        name = name.removeprefix("base_model.model.")
        if match := _PART.fullmatch(name):
            part = {"A": "down", "B": "up"}.get(match["part"], match["part"])
            factors.setdefault(match["layer"], {})[part] = tensor
        elif (match := _ALPHA.fullmatch(name)) and tensor.numel() == 1:
            alphas[match["layer"]] = float(tensor)
        else:
            kind = next((kind for part, kind in _KINDS.items() if part in key), None)
            what = f"is of {kind}, which" if kind else "is of no LoRA that"
            raise DiffoptError(
                f"{file}: {printable(key)} {what} an engine cannot load: fuse it into the pipeline"
                " and build the engine again"
            )
    layers = []
    for key, pair in factors.items():
        if pair.keys() != {"down", "up"} or not all(t.is_floating_point() for t in pair.values()):
            raise DiffoptError(f"{file}: {printable(key)} is not a pair of two factors")
        if settings.get(key, "use_dora"):
            raise DiffoptError(f"{file}: is of DoRA, which an engine cannot load")
        alpha = alphas.get(key, settings.get(key, "alpha"))
        is_root = key not in alphas and bool(settings.get(key, "use_rslora"))
        layers.append(Layer(printable(key), **pair, alpha=alpha, is_root=is_root))
    if not layers:
        raise DiffoptError(f"{file}: has no LoRA")
    return layers
