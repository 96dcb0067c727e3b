"""Tokenizers and image processors come back from files as they were."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image

from diffopt.errors import DiffoptError
from diffopt.host.processors import load_component, save_component
from tests.zoo.every.encoders import chat_glm_tokenizer, qwen_processor

TEXTS = ["the red house", "one<|image_pad|>two"]


@pytest.mark.parametrize("name", ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"])
def test_a_processor_without_the_parts_that_are_not_called(name):
    processor = qwen_processor(name)()
    loaded = load_component("processor", save_component(processor))
    assert type(loaded) is getattr(transformers, name)
    assert loaded.video_processor is None
    picture = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    for inputs in ({"text": TEXTS[:1]}, {"text": TEXTS[1:], "images": [picture]}):
        results = [p(**inputs, return_tensors="pt") for p in (processor, loaded)]
        assert results[0].keys() == results[1].keys()
        assert all((results[0][key] == results[1][key]).all() for key in results[0])


def test_a_tokenizer_of_diffusers():
    tokenizer = chat_glm_tokenizer()
    loaded = load_component("tokenizer", save_component(tokenizer))
    assert type(loaded) is type(tokenizer)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "name", ["subprocess:Popen", "transformers:pipeline", "diffusers:DiffusionPipeline", "os", 3]
)
def test_only_classes_of_tokenizers_and_processors_are_loaded(name):
    files = {"component.json": json.dumps({"class": name}).encode()}
    with pytest.raises(DiffoptError, match="which is not known here"):
        load_component("tokenizer", files)
