"""Video pipelines."""

from typing import Any

from tests.zoo import text
from tests.zoo.every.family import Family, frames, masks
from tests.zoo.every.models import recipe


def large_vision() -> Any:
    """Return an encoder of the size of picture that Stable Video Diffusion makes."""
    made = recipe("CLIPVisionModelWithProjection")()
    made.config.image_size, made.config.patch_size = 224, 56
    return type(made)(made.config)


def one_frame(seed: int, size: tuple[int, int]) -> Any:
    return frames(seed, size, 1)


def two_frames(seed: int, size: tuple[int, int]) -> Any:
    return frames(seed, size, 2)


FAMILIES = [
    Family(
        "^(Wan|Lucy|SkyReels|ChronoEdit|AnyFlow|Helios)",
        "wan",
        {},
        {"height": 16, "width": 16, "num_frames": 5},
    ),
    Family(
        "^Helios",
        arguments={"video": ..., "num_frames": 9},
        components={
            "scheduler": recipe("HeliosScheduler", stages=1, stage_range=[0, 1]),
            "transformer": recipe("HeliosTransformer3DModel", rope_dim=(4, 6, 6)),
        },
    ),
    Family("^WanImage", "wan-image"),
    Family("^Lucy", components={"transformer": {"in_channels": 8}}),
    Family(
        "^WanVACE",
        components={
            "transformer": recipe(
                "WanVACETransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
                vace_layers=[0],
                vace_in_channels=4 * 2 + 16,
            )
        },
        arguments={"mask": masks},
    ),
    Family(
        "^SkyReels",
        components={"transformer": recipe("SkyReelsV2Transformer3DModel", attention_head_dim=12)},
    ),
    Family(
        "^SkyReelsV2(Diff.*)?Image",
        components={"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessorPil"},
    ),
    Family(
        "^SkyReelsV2Image",
        components={"transformer": {"in_channels": 10, "image_dim": 16, "added_kv_proj_dim": 24}},
    ),
    Family(
        "^SkyReelsV2DiffusionForcingV",
        arguments={"overlap_history": 1, "base_num_frames": 5, "num_frames": 9},
    ),
    Family(
        "^WanAnimate",
        components={
            "vae": "AutoencoderKLWan",
            "transformer": recipe(
                "WanAnimateTransformer3DModel",
                attention_head_dim=12,
                in_channels=12,
                latent_channels=4,
                image_dim=16,
                added_kv_proj_dim=24,
                motion_encoder_channel_sizes={str(n): 8 for n in (4, 8, 16)},
                motion_encoder_size=16,
                motion_style_dim=8,
                motion_dim=4,
                motion_encoder_dim=16,
                face_encoder_num_heads=2,
                inject_face_latents_blocks=1,
            ),
            "image_encoder": "CLIPVisionModel",
            "image_processor": "CLIPImageProcessorPil",
        },
        arguments={"pose_video": frames, "face_video": frames, "segment_frame_length": 5},
    ),
    Family(
        "^ChronoEdit",
        components={
            "transformer": recipe(
                "ChronoEditTransformer3DModel",
                attention_head_dim=12,
                in_channels=10,
                rope_temporal_skip_len=2,
                image_dim=16,
                added_kv_proj_dim=24,
            )
        },
    ),
    Family(
        "^AnyFlow",
        components={
            "scheduler": recipe("FlowMapEulerDiscreteScheduler", shift=3.0),
            "transformer": recipe("AnyFlowTransformer3DModel", attention_head_dim=12),
        },
        arguments={"video": ...},
    ),
    Family(
        "^AnyFlowFAR",
        components={
            "transformer": recipe(
                "AnyFlowFARTransformer3DModel", attention_head_dim=12, chunk_partition=(1, 2)
            )
        },
    ),
    Family("^LTX(?!2)", "ltx", arguments={"height": 32, "width": 32}),
    Family("^LTXCondition", "ltx-condition", {}, {"video": ...}),
    Family(
        "^LTXI2VLong",
        components={"scheduler": recipe("FlowMatchEulerDiscreteScheduler", shift=3.0)},
        arguments={"temporal_tile_size": 9, "temporal_overlap": 1},
    ),
    Family("^CogVideoX", "cogvideox", {}, {"height": 32, "width": 32}),
    Family(
        "^CogVideoX(ImageTo|Fun)",
        components={"transformer": {"in_channels": 8}},
        arguments={"control_video": frames},
    ),
    Family("^HunyuanVideo(?!15)|^HunyuanSky", "hunyuan-video", {}, {"height": 16, "width": 16}),
    Family(
        "^HunyuanVideoFrame",
        components={
            "transformer": recipe(
                "HunyuanVideoFramepackTransformer3DModel",
                patch_size=2,
                attention_head_dim=12,
                rope_axes_dim=(4, 4, 4),
                has_image_proj=True,
                has_clean_x_embedder=True,
                image_proj_dim=16,
            )
        },
        arguments={"latent_window_size": 2, "height": 64, "width": 64},
    ),
    Family(
        "^HunyuanVideo15",
        "",
        {
            "transformer": {
                "in_channels": 9,
                "text_embed_2_dim": 16,
                "image_embed_dim": 16,
                "target_size": 32,
            }
        },
        {"num_frames": 5, "height": 32, "width": 32},
    ),
    Family("^HunyuanSky", components={"transformer": {"in_channels": 8}}),
    Family(
        "^StableVideo",
        "svd",
        {"feature_extractor": "CLIPImageProcessorPil", "image_encoder": large_vision},
    ),
    Family(
        "^AnimateDiff(?!SDXL)|PIA",
        "animatediff",
        {},
        {"conditioning_frames": two_frames, "video": two_frames},
    ),
    Family("^PIA", components={"unet": {"in_channels": 9}}),
    Family("^AnimateDiffSparse", components={"controlnet": "SparseControlNetModel"}),
    Family(
        "^(TextToVideoSD|VideoToVideoSD)",
        "",
        {
            "unet": recipe(
                "UNet3DConditionModel",
                block_out_channels=(8, 16),
                down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
                attention_head_dim=4,
                norm_num_groups=4,
            )
        },
        {"num_frames": 2, "video": two_frames},
    ),
    Family(
        "^Mochi",
        components={
            "vae": recipe(
                "AutoencoderKLMochi",
                latent_channels=12,
                in_channels=15,
                latents_mean=(0.1, -0.2, 0.3) * 4,
                latents_std=(0.5, 1.0, 1.5) * 4,
                encoder_block_out_channels=(32, 32, 32, 32),
                decoder_block_out_channels=(32, 32, 32, 32),
                layers_per_block=(1, 1, 1, 1, 1),
            ),
            "transformer": {"in_channels": 12},
        },
        arguments={"num_frames": 7},
    ),
    Family(
        "^Kandinsky[56]",
        components={
            "text_encoder_2": lambda: text.clip(length=77),
            "vae": "AutoencoderKLHunyuanVideo",
        },
        attributes={"prompt_template": "{}", "prompt_template_encode_start_idx": 0},
        arguments={
            "num_frames": 5,
            "height": 32,
            "width": 32,
            "sample_audio": False,
            "negative_prompt": "the house",
        },
    ),
    Family("^Kandinsky(5|6T)", components={"transformer": {"in_text_dim2": 16}}),
    Family(
        "^Kandinsky5.*2I",
        components={"vae": "AutoencoderKL"},
        attributes={"vae_scale_factor_spatial": 2, "resolutions": [(32, 32)]},
    ),
    Family("^Kandinsky5I2[IV]", components={"transformer": {"visual_cond": True}}),
    Family("^Kandinsky5I2V", arguments={"num_frames": 17}),
    Family(
        "^Kandinsky5I2I",
        attributes={"prompt_template": "{}<|vision_start|><|image_pad|><|vision_end|>"},
        arguments={"max_sequence_length": 64},
    ),
    Family(
        "^Kandinsky6T",
        components={
            "transformer": {
                "in_visual_dim": 4,
                "out_visual_dim": 4,
                "visual_token_type_num_embeddings": 2,
            }
        },
    ),
    Family("^EasyAnimate", arguments={"negative_prompt": "the house"}),
    Family(
        "^SanaWM",
        arguments={
            "action": "w-4",
            "intrinsics": [16.0, 16.0, 8.0, 8.0],
            "num_frames": 9,
            "height": 64,
            "width": 64,
        },
    ),
    Family(
        "^Latte",
        components={
            "transformer": recipe(
                "LatteTransformer3DModel",
                sample_size=8,
                num_layers=1,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_channels=16,
                in_channels=4,
                cross_attention_dim=16,
                out_channels=8,
                attention_bias=True,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                video_length=2,
            )
        },
        arguments={"video_length": 2},
    ),
    Family(
        "^Cosmos3",
        components={"safety_checker": "CosmosSafetyChecker"},
        arguments={"height": 32, "width": 32, "num_frames": 9, "video": ...},
    ),
    Family(
        "^SanaVideo|^SanaImage",
        "sana",
        {
            "vae": "AutoencoderKLWan",
            "transformer": recipe(
                "SanaVideoTransformer3DModel",
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                attention_head_dim=12,
                cross_attention_dim=24,
            ),
        },
        {"frames": 5, "height": 32, "width": 32},
    ),
    Family(
        "^EasyAnimate",
        components={
            "text_encoder": "Qwen2VLForConditionalGeneration",
            "transformer": recipe(
                "EasyAnimateTransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                patch_size=2,
                num_layers=1,
                mmdit_layers=1,
                time_embed_dim=16,
                text_embed_dim=16,
            ),
        },
        arguments={"num_frames": 5},
    ),
    Family(
        "^LTX2",
        "",
        {"text_encoder": "Gemma3ForConditionalGeneration"},
        {
            "num_frames": 9,
            "height": 128,
            "width": 128,
            "max_sequence_length": 16,
            "image_crf": 0,
            "spatio_temporal_guidance_blocks": [0],
        },
    ),
    Family(
        "^LTX2DFR",
        components={"transformer": {"use_keyframes_abs_pos_embedding": True}},
        arguments={"num_frames": 17},
    ),
    Family("^LTX2LatentUps", arguments={"num_frames": 5, "video": one_frame}),
    Family(
        "^MotifVideoI",
        components={
            "transformer": {"image_embed_dim": 16},
            "feature_extractor": "SiglipImageProcessorPil",
        },
    ),
    Family(
        "^Motif",
        "",
        {"transformer": {"in_channels": 9}, "scheduler": "FlowMatchEulerDiscreteScheduler"},
        {"num_frames": 5, "height": 32, "width": 32},
    ),
    Family("^LTXLatent", components={"latent_upsampler": {"in_channels": 8}}),
]
