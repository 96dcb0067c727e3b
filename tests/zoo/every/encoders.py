"""Tiny encoders, tokenizers and processors of transformers, by the names of their classes."""

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as t
from diffusers.pipelines.deprecated.alt_diffusion import RobertaSeriesModelWithTransformation
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from tests.zoo import audio, cascade, text, transformer

LANGUAGE = text.language_model_sizes(16)
VISION = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}


def model(name: str, **config: Any) -> Callable[[], Any]:
    """Return what makes a model of transformers from the sizes of a language model."""

    def make(**changes: Any) -> Any:
        made = getattr(t, name)
        return made(made.config_class(**LANGUAGE | config | changes))

    return make


def vision_model(name: str, vision: dict[str, Any], **config: Any) -> Callable[[], Any]:
    """Return what makes a language model that sees pictures."""

    def make(**changes: Any) -> Any:
        made = getattr(t, name)
        words = {**LANGUAGE, **config.get("words", {}), "pad_token_id": 0}
        rest = {key: value for key, value in config.items() if key != "words"}
        return made(made.config_class(text_config=words, vision_config=vision, **rest | changes))

    return make


QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
QWEN_TOKENS = {
    "image_token_id": 55,
    "video_token_id": 56,
    "vision_start_token_id": 57,
    "vision_end_token_id": 58,
}


QWEN_WORDS = {
    **{key: value for key, value in LANGUAGE.items() if key != "head_dim"},
    "rope_scaling": ROPE,
    "bos_token_id": 3,
    "eos_token_id": 1,
}


def qwen_vl(name: str, vision: dict[str, Any]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        made = getattr(t, name)
        sizes = {"text_config": QWEN_WORDS, "vision_config": vision, "rope_scaling": ROPE}
        return made(made.config_class(**sizes, **QWEN_TOKENS | changes))

    return make


def qwen3_vl(name: str) -> Callable[..., Any]:
    return vision_model(
        name,
        QWEN_VISION,
        words={"rope_scaling": {**ROPE, "mrope_interleaved": True}},
        **QWEN_TOKENS,
    )


def bert(**changes: Any) -> t.BertModel:
    return t.BertModel(t.BertConfig(**LANGUAGE | changes))


def clip_vision(made: type) -> Any:
    return made(cascade.vision().config)


def siglip(**changes: Any) -> t.SiglipVisionModel:
    return t.SiglipVisionModel(t.SiglipVisionConfig(**VISION | changes))


def depth_estimator() -> Any:
    config = t.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=32,
        patch_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    return t.DPTForDepthEstimation(config)


def siglip_processor() -> Any:
    return t.SiglipImageProcessor(size={"height": 16, "width": 16})


def multilingual_clip() -> Any:
    return MultilingualCLIP(
        MCLIPConfig(transformerDimSize=16, imageDimSize=16, **LANGUAGE | {"pad_token_id": 0})
    )


def roberta_series() -> Any:
    config = RobertaSeriesConfig(**LANGUAGE | {"pad_token_id": 0, "project_dim": 16})
    return RobertaSeriesModelWithTransformation(config)


def chat_glm() -> Any:
    made = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=text.VOCABULARY,
            hidden_size=16,
            ffn_hidden_size=32,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=512,
            multi_query_attention=True,
            multi_query_group_num=1,
            add_qkv_bias=True,
            rmsnorm=True,
            original_rope=True,
        )
    )
    for weight in made.parameters():  # they have none
        torch.nn.init.normal_(weight, std=0.2)
    return made


def t5_gemma(name: str = "") -> Callable[[], Any]:
    def make() -> Any:
        words = {**LANGUAGE, "layer_types": ["full_attention"] * 2}
        config = t.T5GemmaConfig(encoder=words, decoder=words, is_encoder_decoder=False)
        return t.T5GemmaEncoderModel(config) if name else t.T5GemmaEncoderModel(config).encoder

    return make


def gemma3() -> Any:
    made = t.Gemma3ForConditionalGeneration
    return made(
        made.config_class(
            text_config={**LANGUAGE, "sliding_window": 64},
            vision_config={"vision_use_head": False, **VISION},
            mm_tokens_per_image=4,
            image_token_index=60,
        )
    )


PADS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>")


@functools.cache
def vision_tokenizer() -> Any:
    """Return the tokenizer of the language models that see pictures."""
    tokenizer = copy.deepcopy(text.chat_tokenizer())
    tokenizer.backend_tokenizer.post_processor = None  # no token before the texts
    tokenizer.add_special_tokens({"additional_special_tokens": list(PADS)})
    return tokenizer


def qwen_processor(name: str) -> Callable[[], Any]:
    def make() -> Any:
        made = getattr(t, name)
        processor = made.__new__(made)  # its `__init__` wants a video processor, of torchvision
        processor.tokenizer = vision_tokenizer()
        processor.image_processor = t.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 256}
        )
        processor.video_processor = None
        processor.chat_template = text.CHAT
        processor.image_token, processor.video_token = PADS[:2]
        processor.image_token_id, processor.video_token_id = 55, 56
        processor.vision_start_token, processor.vision_end_token = PADS[2:4]
        processor.vision_start_token_id, processor.vision_end_token_id = 57, 58
        return processor

    return make


@functools.cache
def pieces_file() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """Return a file of sentencepiece, in a folder that lasts as long as the process."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.WORDS * 4),
        model_writer=model,
        vocab_size=text.VOCABULARY // 2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "tokenizer.model")
    path.write_bytes(model.getvalue())
    return path, folder


def chat_glm_tokenizer() -> Any:
    """Return the tokenizer of ChatGLM, which is diffusers' own."""
    return ChatGLMTokenizer(str(pieces_file()[0]))


def language_bert() -> Any:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=text.VOCABULARY,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            d_model=16,
            head_dim=8,
            pad_token_id=0,
        )
    )


def clap_text() -> Any:
    return t.ClapTextModelWithProjection(audio.clap().config.text_config)


def t5_gemma2() -> Any:
    words = {**LANGUAGE, "layer_types": ["full_attention"] * 2, "sliding_window": 64}
    vision = {"vision_use_head": False, **VISION}
    made = t.T5Gemma2Encoder
    config = made.config_class(text_config=words, vision_config=vision, mm_tokens_per_image=4)
    config.text_config.dropout_rate = 0.0
    return made(config)


ENCODERS: dict[str, Callable[..., Any]] = {
    "CLIPTextModel": text.clip,
    "CLIPTextModelWithProjection": text.clip_projected,
    "CLIPTokenizer": text.clip_tokenizer,
    "CLIPVisionModelWithProjection": cascade.vision,
    "CLIPVisionModel": partial(clip_vision, t.CLIPVisionModel),
    "PaintByExampleImageEncoder": partial(clip_vision, PaintByExampleImageEncoder),
    "CLIPImageProcessorPil": cascade.image_processor,
    "CLIPProcessor": lambda: t.CLIPProcessor(cascade.image_processor(), text.clip_tokenizer()),
    "DPTForDepthEstimation": depth_estimator,
    "DPTImageProcessorPil": lambda: t.DPTImageProcessor(size={"height": 32, "width": 32}),
    "SiglipVisionModel": siglip,
    "SiglipImageProcessorPil": siglip_processor,
    "T5EncoderModel": text.t5,
    "UMT5EncoderModel": lambda: t.UMT5EncoderModel(t.UMT5Config(**text.t5().config.to_diff_dict())),
    "T5Tokenizer": text.t5_tokenizer,
    "ByT5Tokenizer": lambda: t.ByT5Tokenizer(extra_ids=0),
    "RobertaTokenizer": text.roberta_tokenizer,
    "SpeechT5HifiGan": lambda: audio.audioldm2().vocoder,
    "ClapModel": audio.clap,
    "Gemma2PreTrainedModel": text.gemma,
    "GemmaPreTrainedModel": model("GemmaModel"),
    "LlamaModel": text.llama,
    "GlmModel": model("GlmModel", pad_token_id=0),
    "LlamaForCausalLM": model("LlamaForCausalLM"),
    "Qwen3ForCausalLM": model("Qwen3ForCausalLM"),
    "Qwen3Model": model("Qwen3Model"),
    "SmolLM3ForCausalLM": model("SmolLM3ForCausalLM", pad_token_id=0),
    "BertModel": bert,
    "ChatGLMModel": chat_glm,
    "MultilingualCLIP": multilingual_clip,
    "RobertaSeriesModelWithTransformation": roberta_series,
    "Qwen2VLForConditionalGeneration": qwen_vl(
        "Qwen2VLForConditionalGeneration",
        {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    ),
    "Qwen2_5_VLForConditionalGeneration": qwen_vl(
        "Qwen2_5_VLForConditionalGeneration", QWEN_VISION
    ),
    "Qwen2_5_VLTextModel": lambda: (
        qwen_vl("Qwen2_5_VLForConditionalGeneration", QWEN_VISION)().model.language_model
    ),
    "Qwen3VLForConditionalGeneration": qwen3_vl("Qwen3VLForConditionalGeneration"),
    "Qwen3VLModel": qwen3_vl("Qwen3VLModel"),
    "Qwen2VLProcessor": qwen_processor("Qwen2VLProcessor"),
    "Qwen2_5_VLProcessor": qwen_processor("Qwen2_5_VLProcessor"),
    "Qwen3VLProcessor": qwen_processor("Qwen3VLProcessor"),
    "Gemma3ForConditionalGeneration": gemma3,
    "Mistral3ForConditionalGeneration": lambda: transformer.flux2().text_encoder,
    "Mistral3Model": lambda: transformer.flux2().text_encoder.model,
    "T5GemmaEncoder": t5_gemma(),
    "T5GemmaEncoderModel": t5_gemma("T5GemmaEncoderModel"),
    **dict.fromkeys(
        (
            "AutoTokenizer",
            "AutoProcessor",
            "BertTokenizer",
            "GemmaTokenizer",
            "LlamaTokenizer",
            "PreTrainedTokenizerBase",
            "TokenizersBackend",
            "PythonBackend",
            "XLMRobertaTokenizer",
        ),
        text.chat_tokenizer,
    ),
    "Qwen2Tokenizer": vision_tokenizer,
    "ChatGLMTokenizer": chat_glm_tokenizer,
    "ClapTextModelWithProjection": clap_text,
    "ClapFeatureExtractor": t.ClapFeatureExtractor,
    "GPT2Tokenizer": text.chat_tokenizer,
    "LDMBertModel": language_bert,
    "T5Gemma2Encoder": t5_gemma2,
}
