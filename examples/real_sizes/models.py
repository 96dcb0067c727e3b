"""Write a pipeline of a published size, with random weights, to a folder.

    python -m examples.real_sizes.models sd15 FOLDER

Sizes are those of the published configurations. Weights are drawn as the modules draw them before
training, with biases of 0, and are stored in bfloat16: values stay finite, pictures are noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with a token for each letter."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((x, -1.0) for x in "▁" + LETTERS)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(pieces, unk_id=2)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def clip(make: Any, width: int, layers: int, heads: int, act: str) -> nn.Module:
    """Return a text encoder of CLIP's architecture."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    module: nn.Module = make(config)
    return module


def clip_l(make: Any = CLIPTextModel) -> nn.Module:
    """Return CLIP ViT-L/14's text encoder."""
    return clip(make, 768, 12, 12, "quick_gelu")


def t5_xxl() -> nn.Module:
    """Return T5 v1.1 XXL's encoder."""
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def vae(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        **changes,
    )


def sd15() -> Any:
    """Stable Diffusion 1.5: a UNet of 860 M parameters."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_l(),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Stable Diffusion XL: a UNet of 2.6 G parameters."""
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, sample_size=1024),
        text_encoder=clip_l(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )


def pixart() -> Any:
    """PixArt-alpha, 512²: a transformer of 611 M parameters, without its text encoder."""
    return PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=PixArtTransformer2DModel(sample_size=64),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def flux() -> Any:
    """FLUX.1: a transformer of 11.9 G parameters, with T5 XXL."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=clip_l(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_xxl(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True),
    )


MODELS: dict[str, Callable[[], Any]] = {"sd15": sd15, "sdxl": sdxl, "pixart": pixart, "flux": flux}


def write(name: str, folder: Path) -> None:
    """Write a pipeline with weights in bfloat16, a component at a time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        pipe = MODELS[name]()
    finally:
        torch.set_default_dtype(before)
    for module in (x for x in pipe.components.values() if isinstance(x, nn.Module)):
        for key, parameter in module.named_parameters():
            if key.endswith("bias"):
                nn.init.zeros_(parameter)
    pipe.save_pretrained(folder)


def main() -> None:
    """Write the pipeline that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.name, arguments.folder)


if __name__ == "__main__":
    main()
