"""Pipelines around a UNet."""

from typing import Any

import diffusers as d

from tests.zoo import text, unet
from tests.zoo.every.family import (
    Family,
    noise,
    numbers,
    phrase,
    picture,
    prompt,
)
from tests.zoo.every.models import DOWN, VQ, XL_CONTROL, recipe

SD = "^(StableDiffusion(?!XL|3|Onnx)|Alt|Cycle|Semantic|LatentC|TextToVideoZeroP|Marigold)"
ADAPTED = {"down_block_types": DOWN[::-1], "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
XS = {"layers_per_block": 2, "norm_num_groups": 2}  # what ControlNet-XS counts on


def control_xs(**config: Any) -> Any:
    net = recipe("UNet2DConditionModel")(**XS, **config)
    halvings = {"conditioning_embedding_out_channels": (4, 8)}
    return d.ControlNetXSAdapter.from_unet(net, 0.5, **halvings)


FAMILIES = [
    # Stable Diffusion 1 and what has its parts
    Family(SD, "sd"),
    Family("^LatentConsistency", "lcm"),
    Family(
        "DiffEdit",
        components={"inverse_scheduler": "DDIMInverseScheduler"},
        arguments={
            "image_latents": noise(1, 2, 4, 8, 8),
            "mask_image": numbers(1, 8, 8),
            "strength": ...,
            "inpaint_strength": 0.7,
        },
    ),
    Family("(n|XL)Adapter", components={"unet": ADAPTED}),
    Family(
        "^StableDiffusionUpscale",
        "sd-upscale",
        {"low_res_scheduler": "DDPMScheduler"},
        {"height": 8, "width": 8},
    ),
    Family(
        "InstructPix2Pix|XLInstruct",
        components={"unet": {"in_channels": 8, "out_channels": 4}},
    ),
    Family("^Alt", components={"text_encoder": "RobertaSeriesModelWithTransformation"}),
    Family("^Cycle", arguments={"source_prompt": phrase}),
    Family("AttendAndExcite", arguments={"token_indices": [1, 2], "attn_res": (4, 4)}),
    Family(
        "GLIGEN",
        components={"unet": {"attention_type": "gated", "attention_head_dim": 2}},
        arguments={
            "gligen_phrases": lambda seed, size: [prompt(seed, size)],
            "gligen_boxes": [[0.1, 0.2, 0.6, 0.8]],
            "gligen_images": lambda seed, size: [picture(seed, size)],
        },
    ),
    Family("GLIGENText", components={"unet": {"attention_type": "gated-text-image"}}),
    Family(
        "Pix2PixZero",
        arguments={"source_embeds": noise(1, 16, 16), "target_embeds": noise(1, 16, 16, start=9)},
    ),
    Family(
        "LDM3D",
        components={"vae": {"in_channels": 6, "out_channels": 6}},
        arguments={"output_type": "np"},
    ),
    Family("Paradigms", components={"scheduler": recipe("DDIMParallelScheduler", **unet.STABLE)}),
    Family("Panorama", arguments={"height": 16, "width": 32}),
    Family("Semantic", arguments={"editing_prompt": phrase, "edit_warmup_steps": 0}),
    Family(
        "^TextToVideoZero",
        arguments={
            "t0": 1,
            "t1": 2,
            "video_length": 2,
            "num_inference_steps": 4,
            "output_type": "np",
        },
    ),
    Family("ControlNetXS", components={"controlnet": control_xs, "unet": XS}),
    Family(
        "LatentUpscale",
        components={
            "unet": {
                "in_channels": 8,
                "out_channels": 5,
                "time_cond_proj_dim": 144,
                "timestep_post_act": None,
                "time_embedding_act_fn": None,
            },
            "scheduler": "EulerDiscreteScheduler",
        },
    ),
    Family(
        "Depth2Img",
        components={"unet": {"in_channels": 5}},
        arguments={"depth_map": numbers(1, 16, 16)},
    ),
    Family(
        "^Paint",
        components={"unet": {"in_channels": 9}, "safety_checker": None},
        arguments={"example_image": picture},
    ),
    Family(
        "^Marigold",
        components={"unet": {"in_channels": 8}},
        arguments={"processing_resolution": 0, "num_inference_steps": 2},
    ),
    Family("^MarigoldIntr", components={"unet": {"in_channels": 12, "out_channels": 8}}),
    Family("^UniDiffuser", "", {"text_encoder": text.clip, "vae": "AutoencoderKL"}, {"image": ...}),
    Family(
        "^VQDiff",
        "",
        {
            "vqvae": {
                **VQ,
                "num_vq_embeddings": 12,
                "vq_embed_dim": 4,
                "in_channels": 3,
                "out_channels": 3,
            },
            "transformer": recipe(
                "Transformer2DModel",
                num_attention_heads=2,
                attention_head_dim=8,
                num_vector_embeds=13,
                num_embeds_ada_norm=12,
                norm_type="ada_norm",
                sample_size=8,
                cross_attention_dim=16,
                activation_fn="geglu-approximate",
                attention_bias=True,
                norm_num_groups=4,
            ),
            "scheduler": recipe("VQDiffusionScheduler", num_vec_classes=13, num_train_timesteps=12),
            "learned_classifier_free_sampling_embeddings": {
                "learnable": True,
                "hidden_size": 16,
                "length": text.LENGTH,
            },
        },
    ),
    # XL
    Family("^(StableDiffusionXL|AnimateDiffSDXL|TextToVideoZeroSDXL)", "sdxl"),
    Family("^StableDiffusionXL", components={"controlnet": XL_CONTROL}),
    Family("XLControlNetUnion", arguments={"control_mode": [0]}),
    Family("XLControlNetXS", components={"controlnet": lambda: control_xs(**XL_CONTROL)}),
    Family(
        "XLAdapter",
        components={
            "adapter": {
                "adapter_type": "full_adapter",
            }
        },
    ),
    Family(
        "^AnimateDiffSDXL",
        components={"motion_adapter": {"use_motion_mid_block": False}},
        arguments={"num_frames": 2},
    ),
    Family(
        "^Kolors",
        "sdxl",
        {
            "text_encoder": "ChatGLMModel",
            "vae": "AutoencoderKL",
            "tokenizer": "ChatGLMTokenizer",
            "unet": {
                "encoder_hid_dim": 16,
                "encoder_hid_dim_type": "text_proj",
                "addition_embed_type": "text_time",
            },
        },
    ),
    # Unconditional and class-conditional
    Family("^(DDPM|PNDM|LDMPipe)", "ddpm"),
    Family(
        "^PNDM", components={"scheduler": "PNDMScheduler"}, arguments={"num_inference_steps": 8}
    ),
    Family(
        "^LDMPipe",
        components={
            "unet": {"in_channels": 3, "out_channels": 3},
            "vqvae": {**VQ, "latent_channels": 3},
        },
    ),
    Family("^DDIM", "ddim"),
    Family("^ConsistencyModel", "consistency"),
    Family("^RePaint", "repaint", {}, {"height": 32, "width": 32}),
    Family("^ScoreSde", "score-sde-ve"),
    Family("^KarrasVe", "karras-ve"),
    Family("^LDMSuper", "ldm-superresolution", {}, {"height": 32, "width": 32}),
    Family(
        "^Dance",
        "",
        {
            "unet": {
                "block_out_channels": (32, 32, 64),
                "extra_in_channels": 64,
                "sample_size": 512,
                "sample_rate": 64,
            },
            "scheduler": "IPNDMScheduler",
        },
        {"audio_length_in_s": 4.0},
    ),
    Family(
        "^LDMText",
        "",
        {"bert": "LDMBertModel", "unet": "UNet2DConditionModel", "vqvae": "AutoencoderKL"},
    ),
]
