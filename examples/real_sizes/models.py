"""Write a pipeline of a published size, with random weights, to a folder.

    python -m examples.real_sizes.models sd15 FOLDER

Sizes are those of the published configurations. Weights are normal, of the scale that keeps that of
values, with biases of 0 and norms of 1, in bfloat16: values stay finite, pictures are noise. A file
of weights is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
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

SHARD = 4_000_000_000
"""The most bytes of a file of weights; so much is in memory at a time."""

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


def sd3() -> Any:
    """Stable Diffusion 3 medium at 512 × 512: a transformer of 2.0 G parameters, without T5."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=64,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=clip_l(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
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


MODELS: dict[str, Callable[[], Any]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def write(name: str, folder: Path) -> None:
    """Write a pipeline with weights in bfloat16, in files of at most `SHARD` bytes."""
    with accelerate.init_empty_weights(include_buffers=False):
        pipe = MODELS[name]()
    pipe.save_config(folder)
    draw = torch.Generator().manual_seed(0)
    for part, component in pipe.components.items():
        if isinstance(component, nn.Module):
            config = component.config
            (folder / part).mkdir()
            if hasattr(component, "save_config"):
                component.save_config(folder / part)
            else:
                config.save_pretrained(folder / part)
            stem = "model" if hasattr(config, "architectures") else "diffusion_pytorch_model"
            write_weights(component, folder / part, stem, draw)
        elif component is not None:
            component.save_pretrained(folder / part)


def write_weights(module: nn.Module, folder: Path, stem: str, draw: torch.Generator) -> None:
    """Write shards of a module's weights, and their index where there are several."""
    tensors = {k: t for k, t in module.state_dict().items() if not _is_tied(module, k)}
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + 2 * tensor.numel() > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += 2 * tensor.numel()
    places = {}
    for number, keys in enumerate(shards, 1):
        many = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"{stem}{many}.safetensors"
        values = {key: value(key, tensors[key], draw) for key in keys}
        save_file(values, file, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, file.name)
    if len(shards) > 1:
        total = sum(2 * tensor.numel() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _is_tied(module: nn.Module, key: str) -> bool:
    return key in (getattr(module, "all_tied_weights_keys", None) or {})


def value(key: str, tensor: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return the value of a weight, or a buffer as it is."""
    if not tensor.is_meta:
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    if tensor.dim() < 2:
        fill = 0.0 if key.endswith("bias") else 1.0
        return torch.full(tensor.shape, fill, dtype=torch.bfloat16)
    inputs = tensor[0].numel()
    return torch.randn(tensor.shape, generator=draw).mul_(inputs**-0.5).to(torch.bfloat16)


def main() -> None:
    """Write the pipeline that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.name, arguments.folder)


if __name__ == "__main__":
    main()
