"""Video pipelines."""

from typing import Any

import diffusers as d

from tests.zoo import text
from tests.zoo.cascade import image_processor, vision
from tests.zoo.case import case, image

WORDS = {"max_sequence_length": text.LENGTH}
STEPS = {"num_inference_steps": 3, "negative_prompt": "the red house"}


def wan_parts(in_channels: int = 4) -> dict[str, Any]:
    autoencoder = d.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.0, 1.5, 2.0],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    net = d.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return {
        "tokenizer": text.t5_tokenizer(),
        "text_encoder": text.t5(),
        "vae": autoencoder,
        "scheduler": d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": net,
    }


def wan() -> d.WanPipeline:
    return d.WanPipeline(**wan_parts())


def wan_image() -> d.WanImageToVideoPipeline:
    # Latents, the image's latents, and a mask for each of the frames in a latent frame.
    return d.WanImageToVideoPipeline(**wan_parts(in_channels=4 + 4 + 2))


def ltx_parts() -> dict[str, Any]:
    autoencoder = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    autoencoder.latents_mean.normal_(std=0.3)
    autoencoder.latents_std.uniform_(0.5, 1.5)
    net = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    return {
        "scheduler": d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": autoencoder,
        "text_encoder": text.t5(),
        "tokenizer": text.t5_tokenizer(),
        "transformer": net,
    }


def ltx() -> d.LTXPipeline:
    return d.LTXPipeline(**ltx_parts())


def ltx_condition() -> d.LTXConditionPipeline:
    components = ltx_parts() | {"scheduler": d.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return d.LTXConditionPipeline(**components)


def cogvideox() -> d.CogVideoXPipeline:
    autoencoder = d.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    net = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=text.LENGTH,
        use_rotary_positional_embeddings=True,
    )
    return d.CogVideoXPipeline(
        text.t5_tokenizer(), text.t5(), autoencoder, net, d.CogVideoXDDIMScheduler()
    )


def hunyuan_video() -> d.HunyuanVideoPipeline:
    autoencoder = d.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    net = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    return d.HunyuanVideoPipeline(
        text_encoder=text.llama(),
        tokenizer=text.chat_tokenizer(),
        transformer=net,
        vae=autoencoder,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text.clip(length=77),  # the pipeline pads to 77
        tokenizer_2=text.clip_tokenizer(),
    )


def svd() -> d.StableVideoDiffusionPipeline:
    autoencoder = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,),  # norms have 32 groups
    )
    net = d.UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        block_out_channels=(32,),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        num_frames=2,
    )
    return d.StableVideoDiffusionPipeline(
        vae=autoencoder,
        image_encoder=vision(),
        unet=net,
        scheduler=d.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            sigma_min=0.002,
            sigma_max=70.0,
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=image_processor(),
    )


WAN = {**STEPS, **WORDS, "height": 16, "width": 16, "num_frames": 5}
LTX = {**STEPS, **WORDS, "height": 32, "width": 32, "num_frames": 9, "frame_rate": 25}
SVD = {"num_inference_steps": 3, "height": 8, "width": 8, "decode_chunk_size": 2}
COGVIDEOX = {**STEPS, **WORDS, "height": 32, "width": 32, "num_frames": 5}
HUNYUAN = {
    "num_inference_steps": 3,
    **WORDS,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "prompt_template": {"template": "the user: {}", "crop_start": 5},
}
CASES = [
    case("wan", wan, lambda seed: WAN),
    case("wan-image", wan_image, lambda seed: {**WAN, "image": image(seed, 16, 16)}),
    case("ltx", ltx, lambda seed: LTX),
    case("ltx-condition", ltx_condition, lambda seed: {**LTX, "image": image(seed, 32, 32)}),
    case("svd", svd, lambda seed: {**SVD, "image": image(seed, 16, 16)}, text=False),
    case("cogvideox", cogvideox, lambda seed: COGVIDEOX),
    case("hunyuan-video", hunyuan_video, lambda seed: HUNYUAN),
]
