"""Pipelines around a UNet that sees no text."""

from typing import Any

import diffusers as d

from tests.zoo.case import case, image
from tests.zoo.unet import STABLE

STEPS = {"num_inference_steps": 3}


def plain_unet(**kwargs: Any) -> d.UNet2DModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return d.UNet2DModel(**(config | kwargs))


def ddpm() -> d.DDPMPipeline:
    return d.DDPMPipeline(plain_unet(), d.DDPMScheduler())


def ddim() -> d.DDIMPipeline:
    return d.DDIMPipeline(plain_unet(), d.DDIMScheduler())


def consistency() -> d.ConsistencyModelPipeline:
    return d.ConsistencyModelPipeline(
        plain_unet(num_class_embeds=8), d.CMStochasticIterativeScheduler()
    )


def ldm_sr() -> d.LDMSuperResolutionPipeline:
    vq = d.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
    )
    return d.LDMSuperResolutionPipeline(
        vq, plain_unet(in_channels=6, out_channels=3), d.DDIMScheduler(**STABLE, clip_sample=False)
    )


def repaint() -> d.RePaintPipeline:
    # To go back, it draws noise for each training step between two steps.
    return d.RePaintPipeline(plain_unet(), d.RePaintScheduler(num_train_timesteps=100))


def score_sde() -> d.ScoreSdeVePipeline:
    return d.ScoreSdeVePipeline(plain_unet(), d.ScoreSdeVeScheduler(sigma_max=0.3, snr=0.05))


def karras_ve() -> d.KarrasVePipeline:
    return d.KarrasVePipeline(plain_unet(), d.KarrasVeScheduler(sigma_max=1.0))


def repaint_call(seed: int) -> dict[str, Any]:
    mask = (image(seed + 50, 8, 8, channels=1) > 0.5).float()
    picture = image(seed, 8, 8) * 2 - 1
    return {
        "num_inference_steps": 4,
        "jump_length": 1,
        "jump_n_sample": 2,
        "image": picture,
        "mask_image": mask,
        "output_type": "np",
    }


CASES = [
    case(
        "ldm-superresolution",
        ldm_sr,
        lambda seed: {**STEPS, "image": image(seed, 8, 8)},
        text=False,
    ),
    case("ddpm", ddpm, lambda seed: STEPS, text=False),
    case("ddim", ddim, lambda seed: {**STEPS, "eta": 0.5}, text=False),
    case(
        "consistency", consistency, lambda seed: {**STEPS, "class_labels": [seed % 8]}, text=False
    ),
    case("repaint", repaint, repaint_call, text=False),
    case("score-sde-ve", score_sde, lambda seed: {**STEPS, "output_type": "np"}, text=False),
    case("karras-ve", karras_ve, lambda seed: {**STEPS, "output_type": "np"}, text=False),
]
