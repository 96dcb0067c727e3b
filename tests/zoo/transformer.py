"""Image pipelines around a transformer."""

from typing import Any

import diffusers as d
from transformers import (
    BertConfig,
    BertModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.zoo import text
from tests.zoo.case import case
from tests.zoo.unet import vae

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
STEPS = {"num_inference_steps": 3}
SMALL = {**STEPS, "height": 16, "width": 16}
WORDS = {"max_sequence_length": text.LENGTH}


def flow_vae(**kwargs: Any) -> d.AutoencoderKL:
    return vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, **kwargs)


def sd3() -> d.StableDiffusion3Pipeline:
    net = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    return d.StableDiffusion3Pipeline(
        transformer=net,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=text.clip_projected(),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.clip_projected(),
        tokenizer_2=text.clip_tokenizer(),
        text_encoder_3=text.t5(32),
        tokenizer_3=text.t5_tokenizer(),
    )


def flux() -> d.FluxPipeline:
    net = d.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_vae(),
        text_encoder=text.clip(),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.t5(),
        tokenizer_2=text.t5_tokenizer(),
        transformer=net,
    )


def flux2() -> d.Flux2Pipeline:
    autoencoder = d.AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    autoencoder.bn.running_mean.normal_(std=0.3)
    autoencoder.bn.running_var.uniform_(0.5, 1.5)
    net = d.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,  # two layers of the text encoder
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 16,
        "patch_size": 8,
    }
    words = {"model_type": "mistral", **text.language_model_sizes(16)}
    config = Mistral3Config(text_config=words, vision_config=vision, spatial_merge_size=1)
    pipe = d.Flux2Pipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=text.chat_tokenizer(),
        transformer=net,
    )
    pipe.system_message = "the user asks"  # the real one is longer than all else
    return pipe


def pixart() -> d.PixArtSigmaPipeline:
    net = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return d.PixArtSigmaPipeline(
        text.t5_tokenizer(), text.t5(), vae(), net, d.DPMSolverMultistepScheduler(**LINEAR)
    )


def dit() -> d.DiTPipeline:
    net = d.DiTTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=8
    )
    return d.DiTPipeline(net, vae(), d.DDIMScheduler(**LINEAR, clip_sample=False))


def sana_parts(**kwargs: Any) -> dict[str, Any]:
    autoencoder = d.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    net = d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        **kwargs,
    )
    return {
        "tokenizer": text.chat_tokenizer(),
        "text_encoder": text.gemma(),
        "vae": autoencoder,
        "transformer": net,
    }


def sana() -> d.SanaPipeline:
    return d.SanaPipeline(**sana_parts(), scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0))


def sana_sprint() -> d.SanaSprintPipeline:
    components = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return d.SanaSprintPipeline(**components, scheduler=d.SCMScheduler())


def aura_flow() -> d.AuraFlowPipeline:
    net = d.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return d.AuraFlowPipeline(
        text.t5_tokenizer(), text.t5(), vae(), net, d.FlowMatchEulerDiscreteScheduler(shift=1.73)
    )


def lumina2() -> d.Lumina2Pipeline:
    net = d.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 16, 16),
        cap_feat_dim=16,
    )
    return d.Lumina2Pipeline(
        transformer=net,
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_vae(),
        text_encoder=text.gemma(),
        tokenizer=text.chat_tokenizer(),
    )


def hunyuan_dit() -> d.HunyuanDiTPipeline:
    net = d.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        hidden_size=16,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
    )
    bert = BertConfig(
        vocab_size=text.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return d.HunyuanDiTPipeline(
        vae=vae(),
        text_encoder=BertModel(bert),
        tokenizer=text.chat_tokenizer(),
        transformer=net,
        scheduler=d.DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text.t5(),
        tokenizer_2=text.t5_tokenizer(),
    )


def chroma() -> d.ChromaPipeline:
    net = d.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return d.ChromaPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_vae(),
        text_encoder=text.t5(),
        tokenizer=text.t5_tokenizer(),
        transformer=net,
    )


def qwen_image() -> d.QwenImagePipeline:
    autoencoder = d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.0, 1.5, 2.0],
    )
    net = d.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    words = text.language_model_sizes(16)
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    del words["head_dim"]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config={**words, "rope_scaling": rope, "bos_token_id": 3, "eos_token_id": 1},
        vision_config=vision,
        rope_scaling=rope,
    )
    return d.QwenImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=text.chat_tokenizer(),
        transformer=net,
    )


PLAIN = {"use_resolution_binning": False}
CASES = [
    case("sd3", sd3, lambda seed: {**SMALL, **WORDS}),
    case("flux", flux, lambda seed: {**SMALL, **WORDS}),
    case(
        "flux2",
        flux2,
        lambda seed: {**SMALL, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2)},
    ),
    case("pixart", pixart, lambda seed: {**SMALL, **WORDS, **PLAIN, "clean_caption": False}),
    case(
        "dit",
        dit,
        lambda seed: {**STEPS, "class_labels": [seed, 7], "output_type": "np"},
        text=False,
    ),
    case(
        "sana",
        sana,
        lambda seed: {
            **STEPS,
            **WORDS,
            **PLAIN,
            "height": 32,
            "width": 32,
            "complex_human_instruction": ["user:"],
        },
    ),
    case(
        "sana-sprint",
        sana_sprint,
        lambda seed: {
            "num_inference_steps": 2,
            **WORDS,
            **PLAIN,
            "height": 32,
            "width": 32,
            "complex_human_instruction": ["user:"],
        },
    ),
    case("aura-flow", aura_flow, lambda seed: {**SMALL, **WORDS}),
    case(
        "lumina2",
        lumina2,
        lambda seed: {
            **STEPS,
            "height": 32,
            "width": 32,
            "max_sequence_length": 48,
            "system_prompt": "the old cat",
        },
    ),
    case("hunyuan-dit", hunyuan_dit, lambda seed: {**SMALL, **PLAIN}),
    case("chroma", chroma, lambda seed: {**SMALL, **WORDS, "negative_prompt": "the red house"}),
    case(
        "qwen-image",
        qwen_image,
        lambda seed: {**SMALL, "max_sequence_length": 256, "negative_prompt": "the red house"},
    ),
]
