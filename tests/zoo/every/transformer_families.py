"""Image pipelines around a transformer."""

from tests.zoo import text, transformer
from tests.zoo.every.family import Family, phrase, picture, prompt
from tests.zoo.every.models import VQ, recipe

FAMILIES = [
    # Stable Diffusion 3
    Family("^StableDiffusion3", "sd3"),
    Family(
        "^StableDiffusion3Inpaint",
        components={
            "transformer": {"in_channels": 16, "out_channels": 16},
            "vae": {"latent_channels": 16},
        },
    ),
    Family(
        "^StableDiffusion3ControlNet",
        components={
            "controlnet": recipe(
                "SD3ControlNetModel",
                patch_size=1,
                attention_head_dim=8,
                joint_attention_dim=32,
                caption_projection_dim=16,
                pooled_projection_dim=32,
                sample_size=8,
            )
        },
    ),
    Family(
        "^StableDiffusion3ControlNetInp",
        components={"controlnet": {"extra_conditioning_channels": 1}},
    ),
    # Flux
    Family("^(Flux(?!2)|VisualCloze)", "flux"),
    Family(
        "^FluxControl(?!Net)", components={"transformer": {"in_channels": 32, "out_channels": 16}}
    ),
    Family(
        "^FluxFill", components={"transformer": {"in_channels": 16 + 16 + 16, "out_channels": 16}}
    ),
    Family("^FluxControlNet", arguments={"control_mode": ...}),
    Family("^FluxKontext", arguments={"max_area": 256, "_auto_resize": False}),
    Family(
        "^VisualCloze",
        components={
            "resolution": 16,
            "transformer": {"in_channels": 16 + 16 + 16, "out_channels": 16},
        },
        arguments={
            "task_prompt": prompt,
            "content_prompt": phrase,
            "image": lambda seed, size: [
                [picture(seed, size), picture(seed + 10, size)],
                [picture(seed + 20, size), None],
            ],
            "upsampling_height": 16,
            "upsampling_width": 16,
        },
    ),
    Family(
        "^Flux2",
        "flux2",
        {},
        {"image": picture, "height": 64, "width": 64, "max_sequence_length": 64},
    ),
    Family(
        "^Flux2Klein",
        components={"text_encoder": "Qwen3ForCausalLM"},
        arguments={"text_encoder_out_layers": (1, 2), "strength": 0.7},
    ),
    # Other image transformers
    Family("^PixArt", "pixart"),
    Family("^DiT", "dit"),
    Family("^Sana(?!V|W|I)", "sana", arguments={"height": 32, "width": 32}),
    Family("^SanaSprint", "sana-sprint", arguments={"height": 32, "width": 32}),
    Family(
        "^SanaControl",
        components={
            "controlnet": {
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8,
                "attention_head_dim": 8,
                "sample_size": 16,
            }
        },
    ),
    Family("^Aura", "aura-flow"),
    Family("^Lumina2", "lumina2", arguments={"height": 32, "width": 32}),
    Family(
        "^LuminaP",
        components={
            "transformer": recipe(
                "LuminaNextDiT2DModel",
                sample_size=8,
                hidden_size=16,
                num_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                cross_attention_dim=16,
            )
        },
    ),
    Family("^HunyuanDiT", "hunyuan-dit"),
    Family(
        "^HunyuanDiTControl",
        components={
            "controlnet": recipe(
                "HunyuanDiT2DControlNetModel",
                sample_size=8,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                in_channels=4,
                hidden_size=16,
                cross_attention_dim=16,
                cross_attention_dim_t5=16,
                pooled_projection_dim=16,
                transformer_num_layers=2,
            )
        },
    ),
    Family("^Chroma", "chroma"),
    Family(
        "^QwenImage(?!2)",
        "qwen-image",
        {"text_encoder": "Qwen2_5_VLForConditionalGeneration", "tokenizer": "Qwen2Tokenizer"},
        {"max_sequence_length": 256, "height": 32, "width": 32},
    ),
    Family(
        "^QwenImageControl",
        components={"controlnet": {"in_channels": 16, "axes_dims_rope": (4, 6, 6)}},
    ),
    Family("^QwenImageControlNetInp", components={"controlnet": {"extra_condition_channels": 4}}),
    Family(
        "^CogView",
        components={
            "text_encoder": "GlmModel",
            "transformer": {"sample_size": 8, "pos_embed_max_size": 8},
        },
    ),
    Family("^CogView4", components={"transformer": {"rope_axes_dim": (8, 8)}}),
    Family("^CogView4Control", components={"transformer": {"in_channels": 8}}),
    Family("^CogView3", components={"text_encoder": text.t5}),
    Family(
        "^HiDream",
        components={
            "text_encoder_4": "LlamaForCausalLM",
            "transformer": recipe(
                "HiDreamImageTransformer2DModel",
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_channels=[16, 16],
                text_emb_dim=32,
                num_routed_experts=2,
                num_activated_experts=1,
                axes_dims_rope=(8, 4, 4),
                max_resolution=(16, 16),
                llama_layers=(0, 1),
            ),
        },
        arguments={"max_sequence_length": 16},
    ),
    Family(
        "^ZImage",
        components={
            "vae": transformer.flow_vae,
            "text_encoder": "Qwen3Model",
            "transformer": {"n_kv_heads": 2, "cap_feat_dim": 16},
        },
    ),
    Family("^(Ovis|HiDream|LongCatImage)", components={"vae": transformer.flow_vae}),
    Family(
        "^Nucleus",
        arguments={"return_index": -1},
        components={
            "transformer": {
                "num_experts": 2,
                "capacity_factors": 1.0,
                "num_layers": 1,
                "moe_intermediate_dim": 16,
                "in_channels": 16,
                "out_channels": 4,
                "mlp_ratio": 4.0,
                "dense_moe_strategy": "all_moe",
            }
        },
    ),
    Family(
        "^QwenImage21", arguments={"image": ..., "output_resolution": 32, "height": 32, "width": 32}
    ),
    Family("^Cosmos3", components={"transformer": {"patch_latent_dim": 16}}),
    Family(
        "^ZImageControl",
        components={
            "controlnet": {
                "control_layers_places": [0],
                "control_refiner_layers_places": [0],
                "control_in_dim": 4,
                "n_kv_heads": 2,
                "add_control_noise_refiner": "control_noise_refiner",
            }
        },
    ),
    Family("^ZImageControlNetInp", components={"controlnet": {"control_in_dim": 4 * 2 + 1}}),
    Family("^Ovis", components={"transformer": {"in_channels": 16, "out_channels": 16}}),
    Family(
        "^LongCatImage",
        components={
            "vae": lambda: transformer.flow_vae(latent_channels=16),
            "transformer": {"in_channels": 64},
        },
        arguments={"enable_prompt_rewrite": False},
    ),
    Family("^Bria", components={"transformer": {"in_channels": 16}, "text_encoder": text.t5}),
    Family(
        "^BriaFibo",
        components={
            "text_encoder": recipe("SmolLM3ForCausalLM", pad_token_id=0, vocab_size=128002),
            "transformer": {"in_channels": 4, "text_encoder_dim": 16, "joint_attention_dim": 32},
            "vae": "AutoencoderKLWan",
        },
    ),
    Family(
        "^BriaFiboEdit",
        arguments={"prompt": lambda seed, size: f'{{"edit_instruction": "{prompt(seed, size)}"}}'},
    ),
    Family(
        "^PRX",
        components={
            "transformer": {"axes_dim": (8, 8), "in_channels": 4},
            "text_encoder": "T5GemmaEncoder",
            "tokenizer": text.chat_tokenizer,
        },
    ),
    Family(
        "^Krea2",
        components={
            "text_encoder": "Qwen3VLModel",
            "transformer": {"in_channels": 16, "num_text_layers": 2, "text_hidden_dim": 16},
            "text_encoder_select_layers": (1, 2),
        },
    ),
    Family(
        "^Ernie",
        components={
            "text_encoder": "Mistral3Model",
            "transformer": {"in_channels": 16, "out_channels": 16, "text_in_dim": 16},
        },
    ),
    Family(
        "^Amused",
        components={
            "scheduler": recipe("AmusedScheduler", mask_token_id=32),
            "vqvae": {
                **VQ,
                "num_vq_embeddings": 32,
                "lookup_from_codebook": True,
                "in_channels": 3,
                "out_channels": 3,
            },
            "transformer": {
                "codebook_size": 32,
                "vocab_size": 33,
                "hidden_size": 16,
                "block_out_channels": 16,
                "in_channels": 16,
                "cond_embed_dim": 16,
                "encoder_hidden_size": 16,
                "micro_cond_encode_dim": 8,
                "micro_cond_embed_dim": 40,
                "block_num_heads": 2,
                "num_attention_heads": 2,
            },
        },
    ),
    Family("^DreamLite", "", {"unet": {"attention_head_dim": 2, "block_out_channels": (8, 8, 8)}}),
    Family("^JoyImage", "", {"transformer": {"rope_dim_list": (4, 6, 6)}}),
    Family("^HunyuanImage", "", {"transformer": {"rope_axes_dim": (8, 8), "text_embed_2_dim": 16}}),
    Family(
        "^HunyuanImageRef",
        "",
        {
            "vae": recipe(
                "AutoencoderKLHunyuanImageRefiner", latent_channels=32, block_out_channels=(64,) * 5
            ),
            "transformer": {
                "patch_size": (1, 1, 1),
                "in_channels": 128,
                "out_channels": 64,
                "rope_axes_dim": (4, 6, 6),
            },
        },
        {"height": 32, "width": 32},
    ),
]
