"""Tokenizers and text encoders with a vocabulary of letters and a few words."""

import functools
import string

from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("red", "blue", "green", "cat", "dogs", "tree", "house", "the")
CHARACTERS = string.ascii_lowercase + string.digits + ".,:'_-"
LENGTH = 16  # tokens in a prompt
VOCABULARY = 160  # rows of every embedding table
CHAT = (
    "{% for m in messages %}{{ m.role }}: "
    "{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"
)


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return a byte-pair tokenizer that merges the letters of the known words."""
    tokens = [*CHARACTERS, *(f"{letter}</w>" for letter in CHARACTERS)]
    merges = []
    for word in WORDS:
        left = word[0]
        for index, letter in enumerate(word[1:], start=2):
            right = f"{letter}</w>" if index == len(word) else letter
            if left + right not in tokens:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def pieces(special: list[str]) -> list[tuple[str, float]]:
    """Return the pieces of a Unigram model, after the special tokens."""
    words = [(f"▁{word}", -2.0) for word in WORDS]
    return [*((token, 0.0) for token in special), *words, *((c, -9.0) for c in "▁" + CHARACTERS)]


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(
        vocab=pieces(["<pad>", "</s>", "<unk>"]), extra_ids=0, model_max_length=LENGTH
    )


@functools.cache
def roberta_tokenizer() -> RobertaTokenizer:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=2 * LENGTH)


@functools.cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for the language models, with a chat template."""
    tokenizer = Tokenizer(Unigram(pieces(["<pad>", "<eos>", "<unk>", "<bos>"]), unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<bos>",
        padding_side="right",
        model_max_length=512,
        chat_template=CHAT,
    )


def clip_config(hidden: int, projection: int, act: str, length: int = LENGTH) -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip(hidden: int = 16, act: str = "quick_gelu", length: int = LENGTH) -> CLIPTextModel:
    return CLIPTextModel(clip_config(hidden, hidden, act, length))


def clip_projected(
    hidden: int = 16, projection: int = 16, act: str = "gelu"
) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(hidden, projection, act))


def t5(hidden: int = 16) -> T5EncoderModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=hidden,
        d_ff=2 * hidden,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def language_model_sizes(hidden: int) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }


def gemma(hidden: int = 16) -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**language_model_sizes(hidden)))


def llama(hidden: int = 16) -> LlamaModel:
    return LlamaModel(LlamaConfig(**language_model_sizes(hidden)))
