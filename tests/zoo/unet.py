"""Stable Diffusion with a UNet, and what is built on it."""

from typing import Any

import diffusers as d
from peft import LoraConfig

from tests.zoo import text
from tests.zoo.case import case, image

SIZE = 16  # pixels; the autoencoder halves them
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 3}


def vae(**kwargs: Any) -> d.AutoencoderKL:
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIZE,
    }
    return d.AutoencoderKL(**(config | kwargs))


def unet(**kwargs: Any) -> d.UNet2DConditionModel:
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": SIZE // 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return d.UNet2DConditionModel(**(config | kwargs))


def parts(**kwargs: Any) -> dict[str, Any]:
    """Return the components of Stable Diffusion 1, with some replaced."""
    components = {
        "vae": vae(),
        "text_encoder": text.clip(),
        "tokenizer": text.clip_tokenizer(),
        "unet": unet(),
        "scheduler": d.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return components | kwargs


def sd(**kwargs: Any) -> d.StableDiffusionPipeline:
    return d.StableDiffusionPipeline(**parts(**kwargs), requires_safety_checker=False)


def sd2() -> d.StableDiffusionPipeline:
    return sd(
        text_encoder=text.clip(act="gelu"),
        unet=unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=d.DDIMScheduler(
            **STABLE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
        ),
    )


def xl_unet() -> d.UNet2DConditionModel:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=16 + 6 * 4,
        cross_attention_dim=32,
        use_linear_projection=True,
    )


def sdxl() -> d.StableDiffusionXLPipeline:
    return d.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text.clip(),
        text_encoder_2=text.clip_projected(),
        tokenizer=text.clip_tokenizer(),
        tokenizer_2=text.clip_tokenizer(),
        unet=xl_unet(),
        scheduler=d.EulerDiscreteScheduler(**STABLE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def sd_lora() -> d.StableDiffusionPipeline:
    pipe = sd()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    return pipe


def sd_controlnet() -> d.StableDiffusionControlNetPipeline:
    net = d.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),  # one halving, as the autoencoder
    )
    components = parts(controlnet=net)
    return d.StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)


def sd_adapter() -> d.StableDiffusionAdapterPipeline:
    # Features of 8 and 4 pixels: a level without attention adds them after its halving.
    adapter = d.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    net = unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    components = parts(adapter=adapter, unet=net)
    return d.StableDiffusionAdapterPipeline(**components, requires_safety_checker=False)


def sd_img2img() -> d.StableDiffusionImg2ImgPipeline:
    return d.StableDiffusionImg2ImgPipeline(**parts(), requires_safety_checker=False)


def sd_inpaint() -> d.StableDiffusionInpaintPipeline:
    components = parts(unet=unet(in_channels=9))
    return d.StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)


def sd_inpaint_blend() -> d.StableDiffusionInpaintPipeline:
    return d.StableDiffusionInpaintPipeline(**parts(), requires_safety_checker=False)


def sd_pag() -> d.StableDiffusionPAGPipeline:
    return d.StableDiffusionPAGPipeline(
        **parts(), requires_safety_checker=False, pag_applied_layers=["mid", "up"]
    )


def sd_upscale() -> d.StableDiffusionUpscalePipeline:
    return d.StableDiffusionUpscalePipeline(
        **parts(
            vae=vae(
                block_out_channels=(8, 8, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            ),
            unet=unet(in_channels=7, num_class_embeds=1000, use_linear_projection=True),
        ),
        low_res_scheduler=d.DDPMScheduler(),
        max_noise_level=350,
    )


def lcm() -> d.LatentConsistencyModelPipeline:
    components = parts(unet=unet(time_cond_proj_dim=8), scheduler=d.LCMScheduler(**STABLE))
    return d.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)


def animatediff() -> d.AnimateDiffPipeline:
    components = parts(scheduler=d.DDIMScheduler(beta_schedule="linear", clip_sample=False))
    del components["safety_checker"]
    adapter = d.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=4,
    )
    return d.AnimateDiffPipeline(**components, motion_adapter=adapter)


def inpaint_call(seed: int) -> dict[str, Any]:
    mask = (image(seed + 50, SIZE, SIZE, channels=1) > 0.5).float()
    return {**SMALL, "image": image(seed, SIZE, SIZE), "mask_image": mask}


STEPS = {"num_inference_steps": 3}
CASES = [
    case("sd", sd, lambda seed: SMALL),
    case("sd2", sd2, lambda seed: SMALL),
    case("sdxl", sdxl, lambda seed: SMALL),
    case("sd-lora", sd_lora, lambda seed: SMALL),
    case("sd-controlnet", sd_controlnet, lambda seed: {**SMALL, "image": image(seed, SIZE, SIZE)}),
    case(
        "sd-t2i-adapter",
        sd_adapter,
        lambda seed: {**SMALL, "image": image(seed, SIZE, SIZE), "output_type": "np"},
    ),
    case(
        "sd-img2img",
        sd_img2img,
        lambda seed: {"num_inference_steps": 4, "strength": 0.75, "image": image(seed, SIZE, SIZE)},
    ),
    case("sd-inpaint", sd_inpaint, inpaint_call),
    case("sd-inpaint-blend", sd_inpaint_blend, inpaint_call),
    case("sd-pag", sd_pag, lambda seed: {**SMALL, "pag_scale": 2.0}),
    case("sd-upscale", sd_upscale, lambda seed: {**STEPS, "image": image(seed, 8, 8)}),
    case("lcm", lcm, lambda seed: SMALL),
    case("animatediff", animatediff, lambda seed: {**SMALL, "num_frames": 2}),
]
