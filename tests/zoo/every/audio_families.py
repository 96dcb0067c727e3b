"""Audio pipelines."""

from tests.zoo.every.encoders import clap_text
from tests.zoo.every.family import Family, numbers
from tests.zoo.every.models import recipe

FAMILIES = [
    Family("^StableAudio(?!3)", "stable-audio"),
    Family("^AudioLDM2", "audioldm2"),
    Family(
        "^AudioLDMP",
        "",
        {
            "text_encoder": clap_text,
            "unet": {
                "cross_attention_dim": (8, 16),
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 16,
                "class_embeddings_concat": True,
            },
            "vae": {"in_channels": 1, "out_channels": 1},
        },
        {"audio_length_in_s": 0.004, "output_type": "pt"},
    ),
    Family("^StableAudio3Inp", components={"transformer": {"local_add_cond_dim": 5}}),
    Family(
        "^StableAudio3",
        "",
        {},
        {
            "duration": 0.01,
            "audio": numbers(1, 2, 1024),
            "mask": ...,
            "mask_start_seconds": 0.0,
            "mask_end_seconds": 0.005,
        },
    ),
    Family(
        "^AceStep",
        components={
            "text_encoder": "Qwen3Model",
            "transformer": {"in_channels": 40, "audio_acoustic_hidden_dim": 4},
            "vae": recipe(
                "AutoencoderOobleck",
                encoder_hidden_size=8,
                downsampling_ratios=[1, 2],
                decoder_channels=4,
                decoder_input_channels=4,
                audio_channels=2,
                channel_multiples=[2, 4],
                sampling_rate=50,
            ),
        },
        arguments={"audio_duration": 1.0},
    ),
]
