"""Tiny models and schedulers of diffusers, by the names of their classes."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import diffusers as d

from tests.zoo import plain, text, unet
from tests.zoo.every.encoders import ENCODERS

# Sizes by the names of a configuration, for what has no entry in `CONFIGS`; none becomes larger.
SMALL: list[tuple[str, Any]] = [
    (r".*(attention_head_dim|head_dim|dim_heads|head_size)", 16),
    (r".*(num_key_value_heads|n_kv_heads|num_kv_heads)", 1),
    (r".*(num_(attention_)?heads|n_heads|nheads|dit_heads)", 2),
    (r"(axes_dims?(_rope)?|rope_axes_dim)", (4, 6, 6)),
    (r"(axes_lens|max_size)", (512, 64, 64)),
    (r"(num|n)_.*(layers|blocks)(_per_block)?|.*depth|n?layers|num_(hidden_)?layers", 1),
    (r".*layers_per_block|num_res_blocks", 1),
    (r".*block_out_channels", 8),
    (r"norm_num_groups", 4),
    (r"base_dim|base_channels", 4),
    (r"latents_mean", (0.1, -0.2, 0.3, -0.4)),
    (r"latents_std", (0.5, 1.0, 1.5, 2.0)),
    (r"(z_dim|latent_channels?|latent_dim|io_channels|in_channels|out_channels)", 4),
    (
        r".*(text|caption|cap|context|cond|cross_attention|joint_attention|pooled|joint).*"
        r"(dim|channels)",
        16,
    ),
    (r"(freq_dim|time_embed_dim|timestep_embed_dim|time_step_dim|condition_dim)", 16),
    (r"(hidden_size|dim|embed_dim|model_channels|dit_dim|token_dim)", 32),
    (r".*(ffn_dim|intermediate_size|ffn_hidden_size|hidden_dim)", 32),
    (r"(model_dim|ff_dim|time_dim|d_model)(_a)?", 32),
    (r"mid_channels", 32),
    (r"adaln_lora_dim", 4),
    (r"ff_mult|mlp_ratio", 2),
    (r"pos_embed_max_size", 32),
    (r"rope_max_seq_len", 64),
]

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
CONTROL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": DOWN,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "conditioning_embedding_out_channels": (4, 8),  # one halving, as the autoencoder
}
XL_CONTROL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}

VQ = {
    "latent_channels": 4,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ControlNetModel": CONTROL,
    "ControlNetUnionModel": {
        **CONTROL,
        **XL_CONTROL,
        "num_trans_channel": 8,
        "num_trans_head": 2,
        "num_trans_layer": 1,
        "num_proj_channel": 8,
    },
    "MotionAdapter": {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 4,
        "motion_max_seq_length": 8,
    },
    "T2IAdapter": {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2},
    "SparseControlNetModel": {
        **CONTROL,
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    },
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32,)},
    "PriorTransformer": {
        "embedding_dim": 16,
        "num_embeddings": text.LENGTH,
        "attention_head_dim": 8,
    },
    "FluxControlNetModel": {"in_channels": 16},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32),  # norms have 32 groups
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 32,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLLTX2Audio": {
        "latent_channels": 4,
        "base_channels": 8,  # as many as latent channels times a quarter of the bins
        "ch_mult": (1,),
        "mel_bins": 8,
        "sample_rate": 64,
        "mel_hop_length": 8,
    },
    "CLIPImageProjection": {"hidden_size": 16},
    "LTX2TextConnectors": {
        "text_proj_in_factor": 3,
        "video_connector_num_learnable_registers": None,
        "audio_connector_num_learnable_registers": None,
        "video_connector_attention_head_dim": 8,
        "audio_connector_attention_head_dim": 8,
        "video_hidden_dim": 16,
        "audio_hidden_dim": 16,
    },
    "LTX2Vocoder": {
        "in_channels": 16,
        "hidden_channels": 8,
        "upsample_kernel_sizes": [4],
        "upsample_factors": [2],
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]],
        "output_sampling_rate": 16,
    },
    "LTX2VideoTransformer3DModel": {
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_cross_attention_dim": 32,
    },
    "AutoencoderKLLTX2Video": {
        "block_out_channels": (8, 16, 32, 64),
        "decoder_block_out_channels": (16, 32, 64),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "PaellaVQModel": {"bottleneck_blocks": 1, "embed_dim": 8, "num_vq_embeddings": 16},
    "ReduxImageEncoder": {"redux_dim": 16, "txt_in_features": 16},
    "ShapERenderer": {
        "param_names": tuple(f"nerstf.mlp.{index}.weight" for index in range(4)),
        "param_shapes": ((8, 93), (8, 8), (8, 8), (8, 8)),
        "d_latent": 16,
        "d_hidden": 8,
        "n_output": 12,
        "n_hidden_layers": 6,
        "background": (255.0, 255.0, 255.0),
    },
    "StableUnCLIPImageNormalizer": {"embedding_dim": 16},
    "StableAudio3DurationEmbedder": {"output_dim": 16, "fourier_dim": 8},
    "UNetFlatConditionModel": {
        "down_block_types": ("DownBlockFlat", "CrossAttnDownBlockFlat"),
        "up_block_types": ("CrossAttnUpBlockFlat", "UpBlockFlat"),
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
    },
    "UniDiffuserModel": {
        "text_dim": 16,
        "clip_img_dim": 16,
        "num_text_tokens": text.LENGTH,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu",
        "num_embeds_ada_norm": 1000,
        "use_patch_pos_embed": True,
    },
    "UniDiffuserTextDecoder": {
        "prefix_length": text.LENGTH,
        "prefix_inner_dim": 16,
        "vocab_size": text.VOCABULARY,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
    },
    "UnCLIPTextProjModel": {
        "clip_embeddings_dim": 16,
        "time_embed_dim": 32,
        "cross_attention_dim": 16,
    },
    "WuerstchenPrior": {"c_in": 4, "c": 16, "c_cond": 16, "c_r": 8, "depth": 1, "nhead": 2},
    "WuerstchenDiffNeXt": {
        "c_cond": 16,
        "c_hidden": [16, 16],
        "nhead": [-1, 2],
        "blocks": [1, 1],
        "level_config": ["CT", "CTA"],
        "inject_effnet": [False, True],
        "effnet_embd": 4,
        "clip_embd": 16,
        "c_r": 8,
    },
}


def recipe(name: str, **config: Any) -> Callable[..., Any]:
    """Return what makes a component, by the name of its class; it takes changes."""
    made = MODELS.get(name) or ENCODERS.get(name) or functools.partial(make, getattr(d, name))
    return lambda **changes: made(**config | changes)


def make(made: type, **changes: Any) -> Any:
    """Make a model or scheduler of diffusers, tiny where nothing else is said."""
    return made(**tiny(made) | CONFIGS.get(made.__name__, {}) | changes)


def tiny(made: type) -> dict[str, Any]:
    """Return the defaults of a configuration made small, by their names."""
    config = {}
    for key, parameter in inspect.signature(made.__init__).parameters.items():
        value = parameter.default
        small = next((small for pattern, small in SMALL if re.fullmatch(pattern, key)), ...)
        if small is ... or not isinstance(value, int | float | tuple | list) or value is True:
            continue
        if isinstance(small, tuple):
            config[key] = type(value)(small)
        elif isinstance(value, tuple | list):
            config[key] = type(value)(min(small, item) for item in value)
        else:
            config[key] = type(value)(min(small, value))
    return config


class PassingChecker:
    """Stands in for the safety checker of Cosmos, whose package is not a dependency."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def nothing() -> None: ...


def stable(name: str) -> Callable[..., Any]:
    """Return what makes a scheduler of Stable Diffusion."""
    return lambda: getattr(d, name)(**unet.STABLE, clip_sample=False)


MODELS: dict[str, Callable[..., Any]] = {
    "AutoencoderKL": unet.vae,
    "UNet2DConditionModel": unet.unet,
    "UNet2DModel": plain.plain_unet,
    "CosmosSafetyChecker": PassingChecker,
    **dict.fromkeys(
        (
            "StableDiffusionSafetyChecker",
            "IFSafetyChecker",
            "IFWatermarker",
            "BlipForConditionalGeneration",
            "BlipProcessor",
        ),
        nothing,
    ),
    **dict.fromkeys(
        ("KarrasDiffusionSchedulers", "DDIMScheduler", "SchedulerMixin"), stable("DDIMScheduler")
    ),
    "DDIMInverseScheduler": stable("DDIMInverseScheduler"),
    "FlowMatchEulerDiscreteScheduler": functools.partial(
        d.FlowMatchEulerDiscreteScheduler, shift=3.0
    ),
    "ClassifierFreeGuidance": lambda: d.ClassifierFreeGuidance(guidance_scale=3.0),
    "BaseGuidance": lambda: d.ClassifierFreeGuidance(guidance_scale=3.0),
}
