"""Pipelines that are stages of a cascade."""

from tests.zoo import text
from tests.zoo.every.family import Family, noise, numbers, picture
from tests.zoo.every.models import recipe
from tests.zoo.schedulers import CASES

EMBEDS = {"image_embeds": noise(1, 16), "negative_image_embeds": noise(1, 16, start=9)}

FAMILIES = [
    Family("^Kandinsky(?!3|5|6)", "kandinsky", {}, EMBEDS),
    Family("^KandinskyV22(?!.*(Combined|Prior))", "kandinsky-decoder", {}, EMBEDS),
    Family("^Kandinsky(V22)?Inpaint", components={"unet": {"in_channels": 9}}),
    Family(
        "^KandinskyV22Control",
        components={"unet": {"addition_embed_type": "image_hint", "in_channels": 8}},
        arguments={"hint": numbers(1, 3, 128, 128)},
    ),
    Family(
        "^Kandinsky(?!V22|3|5|6)",
        components={
            "unet": {
                "addition_embed_type": "text_image",
                "encoder_hid_dim_type": "text_image_proj",
                "encoder_hid_dim": 16,
                "cross_attention_dim": 16,
            },
            "tokenizer": text.chat_tokenizer,
            "text_encoder": "MultilingualCLIP",
        },
    ),
    Family(
        "^Kandinsky(V22)?Prior",
        "",
        {
            "prior": "PriorTransformer",
            "image_encoder": "CLIPVisionModelWithProjection",
            "text_encoder": text.clip_projected,
            "tokenizer": text.clip_tokenizer,
            "scheduler": recipe(
                "UnCLIPScheduler",
                variance_type="fixed_small_log",
                prediction_type="sample",
                clip_sample_range=5.0,
            ),
        },
    ),
    Family(
        "^Kandinsky3",
        components={
            "movq": {"latent_channels": 4},
            "unet": {
                "encoder_hid_dim": 16,
                "attention_head_dim": 4,
                "groups": 4,
                "time_embedding_dim": 16,
                "in_channels": 4,
                "layers_per_block": 3,
            },
        },
    ),
    Family("^IF", "deepfloyd-if"),
    Family(
        "^IF.*SuperRes",
        components={"unet": {"in_channels": 6}, "image_noising_scheduler": "DDPMScheduler"},
        arguments={"original_image": picture},
    ),
    Family("^StableCascadePrior", "stable-cascade-prior"),
    Family(
        "^ShapE",
        "",
        {
            "prior": {
                "embedding_dim": 16,
                "num_embeddings": 32,
                "added_emb_type": None,
                "embedding_proj_dim": 16,
                "time_embed_act_fn": "gelu",
                "norm_in_type": "layer",
                "encoder_hid_proj_type": None,
                "additional_embeddings": 0,
                "embedding_proj_norm_type": None,
                "clip_embed_dim": 32,
                "time_embed_dim": 32,
            },
            "image_encoder": "CLIPVisionModel",
        },
        {"num_inference_steps": 2, "output_type": "latent"},
    ),
    Family(
        "^(StableCascade(?!Prior)|Wuerstchen)",
        "",
        {"decoder": {}, "prior_prior": {}},
        {
            "image_embeddings": noise(1, 4, 3, 3),
            "prior_num_inference_steps": 2,
            "height": 128,
            "width": 128,
        },
    ),
    Family(
        "^StableCascade(?!Prior)",
        "",
        {
            "decoder": {
                "in_channels": 4,
                "out_channels": 4,
                "conditioning_dim": 16,
                "patch_size": 2,
                "block_out_channels": (16, 16),
                "num_attention_heads": (2, 2),
                "down_num_layers_per_block": (1, 1),
                "up_num_layers_per_block": (1, 1),
                "clip_text_pooled_in_channels": 16,
                "effnet_in_channels": 4,
                "switch_level": None,
                "timestep_ratio_embedding_dim": 8,
                "timestep_conditioning_type": ("sca",),
            },
            "prior_prior": lambda: CASES["stable-cascade-prior"].build().prior,
            "text_encoder": text.clip_projected,
            "prior_text_encoder": text.clip_projected,
        },
    ),
    Family(
        "^UnCLIP",
        "",
        {
            "prior": {"num_embeddings": text.LENGTH},
            "decoder": {
                "in_channels": 3,
                "out_channels": 6,
                "class_embed_type": "identity",
                "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "resnet_time_scale_shift": "scale_shift",
                "attention_head_dim": 4,
            },
            "super_res_first": {"in_channels": 6, "out_channels": 3},
            "super_res_last": {"in_channels": 6, "out_channels": 3},
            "prior_scheduler": recipe(
                "UnCLIPScheduler",
                variance_type="fixed_small_log",
                prediction_type="sample",
                clip_sample_range=5.0,
            ),
            "decoder_scheduler": recipe(
                "UnCLIPScheduler", variance_type="learned_range", prediction_type="epsilon"
            ),
            "super_res_scheduler": recipe(
                "UnCLIPScheduler", variance_type="fixed_small_log", prediction_type="epsilon"
            ),
            "text_encoder": text.clip_projected,
        },
        {
            "prior_num_inference_steps": 2,
            "decoder_num_inference_steps": 2,
            "super_res_num_inference_steps": 2,
        },
    ),
    Family(
        "^StableUnCLIP",
        "",
        {
            "prior": {"num_embeddings": text.LENGTH},
            "prior_text_encoder": text.clip_projected,
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32},
            "image_noising_scheduler": "DDPMScheduler",
            "prior_scheduler": recipe(
                "UnCLIPScheduler",
                variance_type="fixed_small_log",
                prediction_type="sample",
                clip_sample_range=5.0,
            ),
        },
        {"prior_num_inference_steps": 2},
    ),
]
