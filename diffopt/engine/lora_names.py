"""Finds which of a pipeline's weights an adapter's layer stands for, by its name in the file.

Dots and underscores are one: `lora_unet_mid_block_attentions_0_proj_in` is `proj_in` of the first
attention in the middle of the UNet, as in `unet.mid_block.attentions.0.proj_in`. Files for Stable
Diffusion XL often have the names of Stability's own code, `lora_unet_middle_block_1_proj_in`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_KOHYA = re.compile(r"lora_(?P<network>unet|transformer|te[1-9]?)_(?P<rest>.+)")
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SINGLE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_BLOCK = re.compile(r"(?P<where>input|output)_blocks_(?P<i>\d+)_(?P<j>\d)_(?P<rest>.+)")
_MIDDLE_BLOCK = re.compile(r"middle_block_(?P<j>[012])_(?P<rest>.+)")


class Names:
    """The weights of a pipeline, by the names that adapters have for their layers.

    Args:
        weights: Names of components, a dot, and the weight's own.
    """

    def __init__(self, weights: Collection[str]) -> None:
        self._components = {name.partition(".")[0] for name in weights}
        self._weights = {}
        for name in weights:
            component, _, rest = name.partition(".")
            # PEFT keeps a layer that has an adapter inside of the adapter.
            layer = rest.removesuffix(".weight").removesuffix(".base_layer")
            if rest.endswith(".weight"):
                self._weights[component, layer.replace(".", "_")] = name
        resnets = re.compile(r"unet\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight")
        self._resnets = sum(bool(resnets.fullmatch(name)) for name in weights)

    def find(self, layer: str) -> str | None:
        """Return the one weight that an adapter's layer stands for; None for none or several."""
        components, rest = self._split(layer)
        flat = rest.replace(".", "_")
        # transformers had a text encoder's layers within a `text_model`, and has not any more.
        inner = flat.removeprefix("text_model_")
        for text in (flat, inner, f"text_model_{inner}"):
            found = [self._weights.get((component, text)) for component in sorted(components)]
            names = [name for name in found if name is not None]
            if names:
                return names[0] if len(names) == 1 else None
        return None

    def _split(self, layer: str) -> tuple[Collection[str], str]:
        """Return the components that a layer may be of, and its name there."""
        if match := _KOHYA.fullmatch(layer):
            network = match["network"]
            number = network.removeprefix("te").strip("1")
            text = f"text_encoder_{number}" if number else "text_encoder"
            if network.startswith("te"):
                return self._components.intersection((text,)), match["rest"]
            rest = _from_stability(match["rest"], self._resnets)
            return self._components.intersection(("unet", "transformer")), rest
        component, _, rest = layer.partition(".")
        if component in self._components:
            return (component,), rest
        return self._components, layer


def _from_stability(name: str, resnets: int) -> str:
    """Return diffusers' name of a UNet's layer; `resnets` is their number in a block going down."""
    if name in _SINGLE:
        return _SINGLE[name]
    if match := _MIDDLE_BLOCK.fullmatch(name):
        return f"mid_block_{_MIDDLE[int(match['j'])]}_{_RESNET.get(match['rest'], match['rest'])}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    is_down, is_resnet = match["where"] == "input", match["j"] == "0"
    block, place = divmod(int(match["i"]) - is_down, resnets + 1)
    side, rest = "down" if is_down else "up", match["rest"]
    if rest in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    if is_resnet:
        return f"{side}_blocks_{block}_resnets_{place}_{_RESNET.get(rest, rest)}"
    return f"{side}_blocks_{block}_attentions_{place}_{rest}"
