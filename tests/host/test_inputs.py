"""Host steps: how inputs are made of arguments, as plain data; and results as they were."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffopt.errors import DiffoptError
from diffopt.host.inputs import (
    Draw,
    Host,
    InputStep,
    Number,
    Picture,
    Processor,
    TensorArgument,
    Text,
)
from diffopt.host.outputs import Output, pack, to_images
from tests.zoo import generator


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, shape).astype("uint8"), mode
    )


TEXT = Text(("a photo of ", (("prompt", 0), "lower-strip"), "."))
ARGS = {"tuple": [{"tuple": [{"list": [{"text": TEXT.parts}]}, 3]}, {"dict": {}}]}
STEPS: list[InputStep] = [
    TensorArgument(("latents",), "float32"),
    Processor("words", "__call__", ARGS, ("ids",)),
    Draw("aten.randn", (2, 3), "float32", (), ("generator", 0)),
    Draw("aten.randint", (4,), "int64", (0.0, 9.0), ("generator", 0)),
    Picture(("image",), "RGB", (3, 2), 2, "signed", "nchw"),
    Number(("guidance",), ((">", 1.0, True, "here"),)),
]


class Words:
    def __call__(self, texts, count):
        return {"ids": torch.tensor([[len(text), count] for text in texts])}


def test_steps_run_in_order_and_are_plain_data():
    host = Host(STEPS, {"tensor": 0}, {"guidance": 2.0}, {}, {"words": Words()})
    arguments = {
        "latents": [1.0, 2.0],
        "prompt": ["  A Cat "],
        "generator": [generator(3)],
        "image": picture(0),
        "guidance": 3.0,
    }
    values = host.prepare(arguments)
    draws = generator(3)
    assert values[0].tolist() == [1, 2]
    assert values[1].tolist() == [[len("a photo of a cat."), 3]]
    assert torch.equal(values[2], torch.randn(2, 3, generator=draws))
    assert torch.equal(values[3], torch.randint(0, 9, (4,), generator=draws))
    assert values[4].shape == (1, 3, 2, 3)
    assert values[5].item() == 3.0

    again = Host.from_json(json.loads(json.dumps(host.to_json())), {})
    again.components = host.components
    arguments["generator"] = [generator(3)]
    for a, b in zip(values, again.prepare(arguments), strict=True):
        assert torch.equal(a, b)
    host.schema = again.schema  # of a file without one: that of the plain arguments
    assert json.dumps(again.to_json()) == json.dumps(host.to_json())


def test_a_text_is_normalized_and_put_into_its_template():
    assert TEXT.render({"prompt": [" Dog "]}) == "a photo of dog."
    with pytest.raises(DiffoptError) as caught:
        TEXT.render({"prompt": [3]})
    assert str(caught.value) == (
        "prompt[0] must be a text, got 3: the program was traced with one there"
    )


@pytest.mark.parametrize("scale", ["byte", "unit", "signed"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw", "hwc", "chw"])
def test_pictures(scale, layout):
    step = Picture(("image",), "RGB", (6, 4), 0, scale, layout)
    array = step.render([picture(1)])
    expected = np.array(picture(1))
    if scale != "byte":
        expected = expected.astype(np.float32) / 255.0
    if scale == "signed":
        expected = 2.0 * expected - 1.0
    if "chw" in layout:
        expected = expected.transpose(2, 0, 1)
    assert np.array_equal(array, expected[None] if layout.startswith("n") else expected)


def test_a_number_outside_its_guards():
    host = Host([STEPS[-1]], {"tensor": 0}, {})
    with pytest.raises(DiffoptError) as caught:
        host.prepare({"guidance": 0.5})
    assert str(caught.value) == (
        "guidance=0.5: the program was traced with guidance > 1 true (here); "
        "trace it again with this value"
    )


def test_a_seed_stands_for_generators():
    steps = [Draw("aten.randn", (2,), "float32", (), ("generator", i)) for i in (0, 1)]
    host = Host(list(steps), {"tensor": 0}, {})
    first, second = host.prepare({"seed": 5})
    assert torch.equal(first, torch.randn(2, generator=generator(5)))
    assert torch.equal(second, torch.randn(2, generator=generator(6)))


def test_a_seed_where_nothing_is_drawn():
    host = Host([STEPS[-1]], {"tensor": 0}, {})
    assert host.seeded({"guidance": 2.0}, 5) == {"guidance": 2.0}
    with pytest.raises(DiffoptError) as caught:
        host.prepare({"guidance": 2.0, "seed": 5})
    assert str(caught.value) == "seed=5: the program draws no random numbers; leave the seed out"


def test_a_generator_that_is_elsewhere():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda", 0)

    host = Host([STEPS[2]], {"tensor": 0}, {})
    with pytest.raises(DiffoptError) as caught:
        host.prepare({"generator": [Elsewhere()]})
    assert str(caught.value) == (
        "the generator is on cuda:0, and inputs are drawn on the CPU: give"
        ' torch.Generator("cpu").manual_seed(…), or seed='
    )


def test_a_wrong_kind_of_picture():
    host = Host([STEPS[4]], {"tensor": 0}, {})
    with pytest.raises(DiffoptError) as caught:
        host.prepare({"image": "a.png"})
    assert str(caught.value) == "image must be a PIL image, got str"


# Results


def test_packing():
    tensors = [torch.rand(2, 4, 5, 3), torch.ones(2)]
    data = {
        "class": [
            "nowhere:Result",
            {
                "images": {"list": [{"image": [0, 0]}, {"image": [0, 1]}]},
                "rest": {"dict": {"a": {"tensor": 1}, "b": {"value": [1, "x"]}}},
            },
        ]
    }
    result = pack(data, tensors)
    assert isinstance(result, Output)
    assert result.images == result["images"] == result[0]
    pixels = (tensors[0][1].numpy() * 255).round().astype("uint8")
    assert np.array_equal(np.asarray(result.images[1]), pixels)
    assert result.rest["b"] == [1, "x"]
    with pytest.raises(AttributeError, match="the output has no 'frames', only images, rest"):
        result.frames  # noqa: B018
    as_tensors = pack(data, tensors, "pt")
    assert torch.equal(as_tensors.images, tensors[0].movedim(-1, -3))
    assert np.array_equal(pack(data, tensors, "np").images, tensors[0].numpy())


def test_stacks_and_tuples():
    tensors = [torch.rand(2, 2, 2, 3)]
    data = {"tuple": [{"stack": [{"array": [0, 1]}, {"array": [0, 0]}]}]}
    (result,) = pack(data, tensors)
    assert np.array_equal(result, tensors[0].flip(0).numpy())


def test_images_of_one_channel():
    assert to_images(np.zeros((2, 4, 4, 1), dtype=np.float32), "pil")[0].mode == "L"
