"""Pipelines that are stages of a cascade: Kandinsky, DeepFloyd IF and Stable Cascade."""

from typing import Any

import diffusers as d
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.zoo import text
from tests.zoo.case import case, generator
from tests.zoo.unet import SMALL, unet

STEPS = {"num_inference_steps": 3}


def vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)


def kandinsky_parts() -> dict[str, Any]:
    # Spatial norms have 32 groups.
    movq = d.VQModel(
        block_out_channels=(32,),
        down_block_types=("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",),
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    net = unet(
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
    )
    scheduler = d.DDPMScheduler(variance_type="learned_range", beta_schedule="linear")
    return {"unet": net, "scheduler": scheduler, "movq": movq}


def kandinsky_decoder() -> d.KandinskyV22Pipeline:
    return d.KandinskyV22Pipeline(**kandinsky_parts())


def kandinsky() -> d.KandinskyV22CombinedPipeline:
    prior = d.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=16,
        num_embeddings=text.LENGTH,
    )
    return d.KandinskyV22CombinedPipeline(
        **kandinsky_parts(),
        prior_prior=prior,
        prior_image_encoder=vision(),
        prior_text_encoder=text.clip_projected(),
        prior_tokenizer=text.clip_tokenizer(),
        prior_scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        prior_image_processor=image_processor(),
    )


def kandinsky_call(seed: int) -> dict[str, Any]:
    embeds = torch.randn(2, 1, 16, generator=generator(2000 + seed))
    return {**SMALL, "image_embeds": embeds[0], "negative_image_embeds": embeds[1]}


def deepfloyd() -> d.IFPipeline:
    net = unet(
        in_channels=3,
        out_channels=6,
        sample_size=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",  # of 32 groups
        cross_attention_dim=32,
        encoder_hid_dim=16,
        act_fn="gelu",
        attention_head_dim=4,
    )
    scheduler = d.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True
    )
    return d.IFPipeline(
        text.t5_tokenizer(),
        text.t5(),
        net,
        scheduler,
        None,
        None,
        None,
        requires_safety_checker=False,
    )


def cascade_prior() -> d.StableCascadePriorPipeline:
    net = d.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        switch_level=(False,),
        timestep_ratio_embedding_dim=8,
    )
    return d.StableCascadePriorPipeline(
        text.clip_tokenizer(),
        text.clip_projected(),
        net,
        d.DDPMWuerstchenScheduler(),
        resolution_multiple=4.0,
    )


CASES = [
    case("kandinsky", kandinsky, lambda seed: {**SMALL, "prior_num_inference_steps": 2}),
    case("kandinsky-decoder", kandinsky_decoder, kandinsky_call, text=False),
    case("deepfloyd-if", deepfloyd, lambda seed: {**STEPS, "clean_caption": False}),
    case("stable-cascade-prior", cascade_prior, lambda seed: SMALL),
]
