"""Audio pipelines."""

import diffusers as d
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from tests.zoo import text
from tests.zoo.case import case
from tests.zoo.unet import STABLE, vae

STEPS = {"num_inference_steps": 3, "negative_prompt": "the red house"}


def stable_audio() -> d.StableAudioPipeline:
    autoencoder = d.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=8,
    )
    net = d.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    solver = d.EDMDPMSolverMultistepScheduler(
        sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
    )
    return d.StableAudioPipeline(
        vae=autoencoder,
        text_encoder=text.t5(),
        projection_model=d.StableAudioProjectionModel(16, 16, 0, 32),
        tokenizer=text.t5_tokenizer(),
        transformer=net,
        scheduler=solver,
    )


def clap() -> ClapModel:
    words = {
        "vocab_size": text.VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "projection_dim": 16,
        "pad_token_id": 1,
    }
    # The audio tower only ranks several waveforms.
    sounds = {
        "spec_size": 8,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "num_mel_bins": 8,
        "window_size": 2,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "projection_dim": 16,
        "patch_embeds_hidden_size": 8,
    }
    return ClapModel(ClapConfig(text_config=words, audio_config=sounds, projection_dim=16))


def audioldm2() -> d.AudioLDM2Pipeline:
    language_model = GPT2Config(
        vocab_size=text.VOCABULARY,
        n_embd=16,
        n_head=2,
        n_layer=1,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=2,
    )
    language_model.max_new_tokens = 2
    net = d.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(None, 16, 16),
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
        initializer_range=0.3,  # with the usual 0.01 the sound does not depend on the input
    )
    return d.AudioLDM2Pipeline(
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clap(),
        text_encoder_2=text.t5(),
        projection_model=d.AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=16, langauge_model_dim=16
        ),
        language_model=GPT2LMHeadModel(language_model),
        tokenizer=text.roberta_tokenizer(),
        tokenizer_2=text.t5_tokenizer(),
        feature_extractor=ClapFeatureExtractor(),
        unet=net,
        scheduler=d.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False),
        vocoder=SpeechT5HifiGan(vocoder),
    )


CASES = [
    case("stable-audio", stable_audio, lambda seed: {**STEPS, "audio_end_in_s": 1.5}),
    case(
        "audioldm2",
        audioldm2,
        lambda seed: {**STEPS, "audio_length_in_s": 0.004, "output_type": "pt"},
    ),
]
