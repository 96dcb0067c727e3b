"""The models that are timed: built from their sizes, with random weights.

They have no text encoders and no VAE: embeddings are the input and latents the output, so that only
the sampling loop is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import numpy as np
import torch
from torch import Tensor, nn

from diffopt.errors import DiffoptError

DTYPE = torch.bfloat16
# Random numbers of which all weights are slices; no layer's size is a multiple of their number.
POOL = (1 << 24) + 43
FEW = 4096

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A pipeline with random weights, and the arguments of its calls.

    Attributes:
        title: Its name in tables.
        about: A description of the full size.
        denoiser: The name of the component that is called in every step.
        steps: The number of steps.
        cache: A fixed cache schedule.
        products: A pattern of the layers that are quantized to fp8: matrix products.
        sizes: The arguments of the denoiser's class.
        tiny: The same for a small denoiser, to try everything on a CPU.
        network: The denoiser's class.
        pipeline: Returns the pipeline of a denoiser.
        inputs: Returns the shapes of a call's tensors, and its other arguments.
    """

    title: str
    about: str
    denoiser: str
    steps: int
    cache: str
    products: str
    sizes: Sizes
    tiny: Sizes
    network: Callable[..., Any]
    pipeline: Callable[[nn.Module], Any]
    inputs: Callable[[Sizes], tuple[dict[str, tuple[int, ...]], dict[str, Any]]]

    def build(self, tiny: bool, device: str, sparse: bool = False) -> Any:
        """Return the pipeline on a device, always with the same weights.

        Args:
            tiny: Whether to build the small denoiser.
            device: The device of its weights.
            sparse: Leave all but the first values of each weight zero, in pages that are not
                allocated before they are written.
        """
        with torch.device("meta"):
            net = self.network(**(self.tiny if tiny else self.sizes))
        if any(True for _ in net.buffers()):
            raise DiffoptError(f"{self.title} has buffers, which random weights cannot stand for")
        fill(net, device, sparse)
        pipe = self.pipeline(net.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, tiny: bool, steps: int, seed: int) -> dict[str, Any]:
        """Return the arguments of one call with a seed, tensors in the type of the weights."""
        shapes, others = self.inputs(self.tiny if tiny else self.sizes)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.randn(shape, generator=generator).to(DTYPE)
            for name, shape in shapes.items()
        }
        return {**tensors, **others, "num_inference_steps": steps, "output_type": "latent"}


def fill(net: nn.Module, device: str, sparse: bool = False) -> None:
    """Fill a module on the meta device with random weights, the same on every device.

    Matrices preserve the scale of their inputs, so that values are finite in all steps.
    """
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(DTYPE).to(device)
    start = 0
    for module in net.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            scale = 1 / math.sqrt(old[0].numel()) if old.dim() > 1 else 0.1
            if sparse:
                new = torch.from_numpy(np.zeros(old.shape, np.int16)).view(DTYPE)
                start = _cut(pool, start, scale, new.view(-1)[:FEW])
            else:
                new = torch.empty(old.shape, dtype=DTYPE, device=device)
                start = _cut(pool, start, scale, new.view(-1))
            if old.dim() == 1 and name == "weight":
                new += 1  # the scale of a norm
            module.register_parameter(name, nn.Parameter(new, requires_grad=False))


def _cut(pool: Tensor, start: int, scale: float, target: Tensor) -> int:
    """Fill a tensor with scaled numbers of the pool, cyclically; return the next start."""
    done = 0
    while done < target.numel():
        count = min(target.numel() - done, len(pool) - start)
        torch.mul(pool[start : start + count], scale, out=target[done : done + count])
        done, start = done + count, (start + count) % len(pool)
    return start


def _xl(unet: nn.Module) -> d.StableDiffusionXLPipeline:
    return d.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=d.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def _xl_inputs(sizes: Sizes) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    side = sizes["sample_size"]
    text = (1, 77, sizes["cross_attention_dim"])
    times = 6 * sizes["addition_time_embed_dim"]  # the sizes of the picture, beside the text
    pooled = (1, sizes["projection_class_embeddings_input_dim"] - times)
    shapes = {
        "prompt_embeds": text,
        "negative_prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled,
        "latents": (1, sizes["in_channels"], side, side),
    }
    return shapes, {"height": 8 * side, "width": 8 * side, "guidance_scale": 5.0}


def _flux(transformer: nn.Module) -> d.FluxPipeline:
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def _flux_inputs(sizes: Sizes) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    full = sizes["num_layers"] > 4
    side, tokens = (64, 512) if full else (4, 8)
    shapes = {
        "prompt_embeds": (1, tokens, sizes["joint_attention_dim"]),
        "pooled_prompt_embeds": (1, sizes["pooled_projection_dim"]),
        "latents": (1, side * side, sizes["in_channels"]),
    }
    return shapes, {"height": 16 * side, "width": 16 * side, "guidance_scale": 3.5}


MODELS = {
    "sdxl": Model(
        title="SDXL",
        about="1024², guidance 5, Euler",
        denoiser="unet",
        steps=30,
        cache="deepcache,interval=3",
        products="*transformer_blocks*",
        sizes={
            "sample_size": 128,
            "in_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        tiny={
            "sample_size": 8,
            "in_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1),
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
        network=d.UNet2DConditionModel,
        pipeline=_xl,
        inputs=_xl_inputs,
    ),
    "flux": Model(
        title="FLUX.1-dev",
        about="1024²",
        denoiser="transformer",
        steps=28,
        cache="fora,interval=3",
        products="*transformer_blocks*",
        sizes={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        tiny={
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
        network=d.FluxTransformer2DModel,
        pipeline=_flux,
        inputs=_flux_inputs,
    ),
}
