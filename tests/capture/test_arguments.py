"""Every leaf of a call's arguments is an input, is bound, or is refused: nothing is dropped."""

import contextlib
import copy
import html
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import diffopt
from diffopt.capture.perturbation import separated
from diffopt.errors import CaptureError, DiffoptError
from diffopt.ir.program import Program
from tests.capture.random_samplers import Words, picture
from tests.zoo import generator
from tests.zoo.text import clip_tokenizer


def sampler(function, **components):
    """Return a pipeline with a signature, for defaults and for arguments by name."""

    class Sampler:
        def __init__(self):
            self.components = components

        def __call__(self, x=None, **arguments):
            given = {"x": x, **arguments} if x is not None else arguments
            return function(SimpleNamespace(**components), **given)

    return Sampler()


def embedding():
    torch.manual_seed(0)
    return nn.Embedding(160, 4).requires_grad_(False)


def texts(parts, prompt, negative=None):
    x = parts.embed(parts.words(prompt)["input_ids"]).sum(1)
    return x if negative is None else x - 2 * parts.embed(parts.words(negative)["input_ids"]).sum(1)


def text_sampler():
    return sampler(texts, words=Words(), embed=embedding())


def expect_equal(pipe, program, **arguments):
    torch.manual_seed(3)
    expected = pipe(**separated(arguments))
    torch.manual_seed(3)
    assert torch.equal(program(**separated(arguments)), expected)


def expect_equal_from_file(pipe, program, folder, **arguments):
    """Check a program, and what is loaded of its file."""
    program.save(folder / "a.program")
    for function in (program, Program.load(folder / "a.program")):
        expect_equal(pipe, function, **arguments)


def refusal(program, **arguments):
    with pytest.raises(DiffoptError) as caught:
        program(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Inputs are told apart, whatever they were at capture


def test_equal_texts_at_capture():
    pipe = text_sampler()
    program = diffopt.trace(pipe, prompt=["a cat", "a cat"])
    expect_equal(pipe, program, prompt=["a dog", "two birds"])
    program = diffopt.trace(pipe, prompt="a cat", negative="a cat")
    expect_equal(pipe, program, prompt="a dog", negative="blurry")


def test_the_same_object_at_two_places():
    x = torch.ones(4)
    pipe = sampler(lambda parts, ts: ts[0] + 2 * ts[1])
    program = diffopt.trace(pipe, ts=[x, x])
    expect_equal(pipe, program, ts=[torch.rand(4), torch.rand(4)])

    def two_pictures(parts, image, control):
        first, second = (np.array(p).astype(np.float32) / 255.0 for p in (image, control))
        return torch.from_numpy(first) + 2 * torch.from_numpy(second)

    same = picture(random.Random(0))
    pipe = sampler(two_pictures)
    program = diffopt.trace(pipe, image=same, control=same)
    colours = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    expect_equal(pipe, program, image=colours[0], control=colours[1])
    assert refusal(program, image=colours[0].resize((8, 4)), control=colours[1]) == (
        "image=an RGB picture of 8x4: the program was traced with an RGB picture of 4x2 there; "
        "pass one like it, or trace it again with this"
    )


# Structures


def test_other_lengths_and_types():
    pipe = text_sampler()
    program = diffopt.trace(pipe, prompt=["a cat", "a dog"])
    for prompt in (["x"], ["x", "y", "z"], ("x", "y"), "x", [], None):
        message = refusal(program, prompt=prompt)
        assert "the program was traced with a list of 2 there; pass one like it" in message
    assert refusal(program, prompt=["x", 3]) == (
        "prompt[1] must be a text, got 3: the program was traced with one there"
    )


def test_a_value_beside_an_input_is_bound():
    pipe = sampler(lambda parts, x, options: x * options["scale"] + options["t"])
    options = {"scale": 0.5, "t": torch.ones(4)}
    program = diffopt.trace(pipe, x=torch.ones(4), options=options)
    expect_equal(pipe, program, x=torch.rand(4), options={"scale": 0.5, "t": torch.rand(4)})
    assert refusal(program, x=torch.rand(4), options={"scale": 0.9, "t": torch.rand(4)}) == (
        "options.scale=0.9: 'options.scale' was bound to 0.5 at capture; "
        "trace again with this value"
    )
    message = refusal(program, x=torch.rand(4), options={"t": torch.rand(4)})
    assert "the program was traced with a dict with scale, t there" in message


def test_lists_of_numbers():
    def inputs(parts, x, sigmas):
        for sigma in torch.tensor(sigmas):
            x = x * sigma
        return x

    pipe = sampler(inputs)
    program = diffopt.trace(pipe, x=torch.ones(4), sigmas=[1.0, 0.5])
    expect_equal(pipe, program, x=torch.ones(4), sigmas=[0.8, 0.3])
    assert refusal(program, x=torch.ones(4), sigmas=[1, 0]) == (
        "sigmas[0] must be a number, got 1: the program was traced with one there"
    )
    # Where Python reads them as well they are bound.
    pipe = sampler(lambda parts, x, sigmas: inputs(parts, x, sigmas) * sigmas[0])
    program = diffopt.trace(pipe, x=torch.ones(4), sigmas=[1.0, 0.5])
    expect_equal(pipe, program, x=torch.rand(4), sigmas=[1.0, 0.5])
    assert "'sigmas[0]' was bound to 1.0" in refusal(program, x=torch.ones(4), sigmas=[0.8, 0.5])


def test_tensors_that_only_their_shape_matters_of():
    pipe = sampler(lambda parts, x, like: x * like.shape[0])
    program = diffopt.trace(pipe, x=torch.ones(4), like=torch.ones(3))
    expect_equal(pipe, program, x=torch.rand(4), like=torch.rand(3))
    assert refusal(program, x=torch.ones(4), like=torch.ones(2)) == (
        "like=a float32 tensor of [2]: the program was traced with a float32 tensor of [3] there; "
        "leave it out, or trace it again with this"
    )
    assert "traced with a float32 tensor" in refusal(program, x=torch.ones(4).double())


def test_tensors_of_other_strides():
    pipe = sampler(lambda parts, x: x + torch.randn_like(x))
    program = diffopt.trace(pipe, x=torch.ones(2, 3))
    assert refusal(program, x=torch.ones(3, 2).t()) == (
        "x=a float32 tensor of [2, 3] with strides [1, 2]: the program was traced with a float32 "
        "tensor of [2, 3] there; pass one like it, or trace it again with this"
    )
    program = diffopt.trace(pipe, x=torch.ones(3, 2).t())
    expect_equal(pipe, program, x=torch.rand(3, 2).t())


def test_objects_are_bound_by_identity(tmp_path, caplog):
    calls = []
    pipe = sampler(lambda parts, x, callback: callback(x) * 2)
    callback = lambda x: calls.append(1) or x  # noqa: E731
    program = diffopt.trace(pipe, x=torch.ones(4), callback=callback)
    assert caplog.messages[-1] == (
        "callback is called by the capture alone, and what it computes is captured: the program "
        "does not call it"
    )
    assert program(x=torch.ones(4), callback=callback).tolist() == [2] * 4
    message = refusal(program, x=torch.ones(4), callback=print)
    assert "the program was traced with an object of class function there" in message
    program.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    assert loaded(x=torch.ones(4)).tolist() == [2] * 4
    assert "an object of class function" in refusal(loaded, x=torch.ones(4), callback=callback)


def test_arguments_left_out_at_capture():
    class Pipe:
        components = {}

        def __call__(self, x, strength=0.8, negative_prompt=None, seed=3):
            return x * strength

    program = diffopt.trace(Pipe(), x=torch.ones(2))
    assert torch.equal(program(x=torch.ones(2), negative_prompt=None), torch.full((2,), 0.8))
    assert refusal(program, x=torch.ones(2), strength=0.5) == (
        "strength=0.5: 'strength' was left out at capture, which means 0.8; "
        "trace again with this value"
    )
    assert refusal(program, x=torch.ones(2), seed=4).startswith("seed=4: 'seed' was left out")
    assert refusal(program, x=torch.ones(2), strenght=0.5) == (
        "strenght=0.5: the program was traced without 'strenght'; did you mean 'strength'?; trace "
        "it again with 'strenght' among the arguments (its inputs are: x)"
    )


# Random numbers


def test_generators_that_are_missing_or_of_another_type():
    pipe = sampler(
        lambda parts, generator: torch.stack([torch.rand(3, generator=g) for g in generator])
    )
    program = diffopt.trace(pipe, generator=[generator(0), generator(1)])
    expect_equal(pipe, program, generator=[generator(5), generator(6)])
    for wrong in ([generator(5)], [], (generator(5), generator(6)), 3, None):
        assert "the program was traced with a list of 2" in refusal(program, generator=wrong)
    assert refusal(program) == (
        "missing argument 'generator[0]': the program was traced with a torch.Generator there; "
        "pass one, or seed="
    )
    both = {"generator": [generator(5), generator(6)], "seed": 3}
    assert refusal(program, **both) == "seed=3 and generator[0]: give one of the two"
    assert refusal(program, seed=1.5) == (
        "seed=1.5: must be a whole number from -2**63 to 2**64 - 1"
    )


def own_seed(parts, x, seed):
    own = torch.Generator().manual_seed(seed)
    return x + torch.randn(4, generator=own) * torch.rand(4, generator=own)


def global_seed(parts, x, seed):
    torch.manual_seed(seed)
    return x + torch.randn(4) * torch.rand(4)


@pytest.mark.parametrize("function", [own_seed, global_seed])
def test_a_seed_of_the_pipelines_own_is_followed(function, tmp_path):
    pipe = sampler(function)
    program = diffopt.trace(pipe, x=torch.ones(4), seed=3)
    for seed in (3, 8):
        expect_equal(pipe, program, x=torch.rand(4), seed=seed)
    program.save(tmp_path / "a.program")
    expect_equal(pipe, Program.load(tmp_path / "a.program"), x=torch.rand(4), seed=9)


def test_a_generator_that_is_made_of_something_else_binds_the_seed():
    def function(parts, x, seed):
        return x + torch.randn(4, generator=torch.Generator().manual_seed(seed + 1))

    pipe = sampler(function)
    program = diffopt.trace(pipe, x=torch.ones(4), seed=3)
    expect_equal(pipe, program, x=torch.rand(4), seed=3)
    assert "'seed' was bound to 3" in refusal(program, x=torch.ones(4), seed=4)


def test_a_generator_that_is_set_inside():
    def function(parts, generator):
        generator.manual_seed(2)
        first = torch.rand(3, generator=generator)
        generator.set_state(generator.get_state().clone())
        return first + torch.rand(3, generator=generator)

    pipe = sampler(function)
    program = diffopt.trace(pipe, generator=generator(0))
    expect_equal(pipe, program, generator=generator(5))

    def rewinds(parts, generator):
        state = generator.get_state()
        first = torch.rand(3, generator=generator)
        generator.set_state(state)
        return first + torch.rand(3, generator=generator)

    advanced = generator(0)
    torch.rand(1, generator=advanced)
    with pytest.raises(CaptureError, match="the state of a generator is set"):
        diffopt.trace(sampler(rewinds), generator=advanced)


FILLS = {
    "normal_": (2.0, 3.0),
    "uniform_": (-1.0, 4.0),
    "exponential_": (2.0,),
    "cauchy_": (1.0, 2.0),
    "log_normal_": (0.5, 1.0),
    "geometric_": (0.3,),
    "random_": (3, 9),
    "bernoulli_": (0.4,),
}


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("strided", [False, True])
def test_distributions(name, strided, tmp_path):
    def function(parts, generator):
        empty = torch.zeros(5, 3).t() if strided else torch.zeros(3, 5)
        return getattr(empty, name)(*FILLS[name], generator=generator) + 0

    pipe = sampler(function)
    program = diffopt.trace(pipe, generator=generator(0))
    expect_equal(pipe, program, generator=generator(7))
    program.save(tmp_path / "a.program")
    expect_equal(pipe, Program.load(tmp_path / "a.program"), generator=generator(8))


def test_samplers_of_values():
    def function(parts, x, generator):
        noise = torch.normal(x, x.abs(), generator=generator)
        noise = noise + torch.normal(0.5, x.abs(), generator=generator)
        noise = noise + torch.normal(x, 2.0, generator=generator)
        noise = noise * torch.bernoulli(x.sigmoid(), generator=generator)
        index = torch.multinomial(x.softmax(-1), 3, generator=generator)
        one = torch.multinomial(x.softmax(-1), 1, generator=generator)
        order = torch.randperm(4, generator=generator)
        return noise[order] + index.sum() + one + torch.randint(3, 9, (4,), generator=generator)

    pipe = sampler(function)
    program = diffopt.trace(pipe, x=torch.ones(4), generator=generator(0))
    for seed in range(4):
        expect_equal(pipe, program, x=torch.randn(4), generator=generator(seed))


def test_what_cannot_be_drawn_again():
    pipe = sampler(lambda parts, generator: torch.poisson(torch.ones(3), generator=generator))
    with pytest.raises(CaptureError, match="poisson draws random numbers in a way"):
        diffopt.trace(pipe, generator=generator(0))
    pipe = sampler(lambda parts, x, generator: torch.multinomial(x, 3, True, generator=generator))
    with pytest.raises(CaptureError, match="multinomial with replacement draws"):
        diffopt.trace(pipe, x=torch.ones(4), generator=generator(0))


# Results


def images(parts, x, output_type="pt"):
    if output_type == "latent":
        return x
    x = x.clamp(0, 1)
    return x if output_type == "pt" else x.movedim(1, -1).numpy()


def test_the_output_type():
    pipe = sampler(images)
    x = torch.rand(1, 3, 2, 2)
    program = diffopt.trace(pipe, x=x, output_type="pt")
    assert np.array_equal(program(x=x, output_type="np"), pipe(x=x, output_type="np"))
    assert refusal(program, x=x, output_type="latent") == (
        "output_type='latent': the program was traced with 'pt'; it may be 'pil', 'np', 'pt'; "
        "trace it again for another"
    )
    assert "output_type='xyz'" in refusal(program, x=x, output_type="xyz")
    program = diffopt.trace(pipe, x=x, output_type="latent")
    assert torch.equal(program(x=x, output_type="latent"), x)
    assert refusal(program, x=x, output_type="pt") == (
        "output_type='pt': the program was traced with 'latent'; trace it again with this one"
    )
    program = diffopt.trace(sampler(lambda parts, x: x), x=torch.ones(3))
    assert refusal(program, x=torch.ones(3), output_type="np") == (
        "output_type='np': the program was traced without one; what it returns is no image, and "
        "is not converted"
    )


# Texts that Python reads


def tokens(parts, prompt):
    length = {"padding": "max_length", "max_length": 16, "truncation": True}
    return parts.embed(parts.words(prompt, return_tensors="pt", **length).input_ids).sum(1)


def styled(parts, prompt):
    x = tokens(parts, prompt)
    return x * 2 if "cat" in prompt.lower() else x


@pytest.mark.parametrize("first", ["a cat", "a dog"])
def test_a_branch_on_a_text(first, tmp_path):
    pipe = sampler(styled, words=clip_tokenizer(), embed=embedding())
    program = diffopt.trace(pipe, prompt=first)
    other = {"a cat": "a bird", "a dog": "the CAT"}[first]
    expect_equal(pipe, program, prompt=first + " in a house")
    expect_equal(pipe, program, prompt=other)  # is captured when it comes
    program.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    expect_equal(pipe, loaded, prompt=first + " here")
    message = refusal(loaded, prompt=other)
    assert "if \"cat\" in prompt.lower() else x: prompt.lower().__contains__('cat') is" in message


def test_texts_that_are_compared_counted_and_looked_up():
    def compared(parts, prompt, negative):
        x = texts(parts, prompt, negative)
        return x * 3 if prompt == negative else x

    pipe = sampler(compared, words=Words(), embed=embedding())
    program = diffopt.trace(pipe, prompt="a cat", negative="a dog")
    program.retrace = None
    expect_equal(pipe, program, prompt="a bird", negative="a fish")
    assert "prompt.__eq__(negative) is True" in refusal(program, prompt="x", negative="x")

    def looked_up(parts, prompt):
        return texts(parts, prompt) * {"CAT": 2.0}.get(prompt, 1.0)

    pipe = sampler(looked_up, words=Words(), embed=embedding())
    program = diffopt.trace(pipe, prompt="a cat")
    program.retrace = None
    assert "prompt is 'CAT'" in refusal(program, prompt="CAT")


def test_how_texts_are_normalized():
    def cleaned(parts, prompt):
        return texts(
            parts, re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()
        )

    pipe = sampler(cleaned, words=Words(), embed=embedding())
    program = diffopt.trace(pipe, prompt="a cat")
    for prompt in ("a  red\tcat ", "salt &amp; pepper", "&amp;lt; x"):
        expect_equal(pipe, program, prompt=prompt)

    def digits(parts, prompt):
        return texts(parts, re.sub(r"\d", "", prompt))

    pipe = sampler(digits, words=Words(), embed=embedding())
    program = diffopt.trace(pipe, prompt="a cat")
    for prompt in ("1 dog", "3 dogs of 12"):
        expect_equal(pipe, program, prompt=prompt)


def test_a_name_that_occurs_in_the_calls_of_tokenizers_is_no_text():
    class Tokenizer(Words):
        def __call__(self, prompt, kind):
            return super().__call__(prompt)

    def function(parts, prompt, form):
        if form not in ("pt", "np"):
            raise ValueError(f"the form must be 'pt' or 'np', got {form}")
        return parts.embed(parts.words(prompt, "pt")["input_ids"]).sum(1)

    pipe = sampler(function, words=Tokenizer(), embed=embedding())
    program = diffopt.trace(pipe, prompt="a cat", form="pt")
    expect_equal(pipe, program, prompt="a dog", form="pt")
    assert "'form' was bound to 'pt'" in refusal(program, prompt="a dog", form="np")


# Pictures


def resized(picture, size, gap=None):
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=gap)


PICTURES = {
    "centered": lambda p: np.array(resized(p, (3, 2), 1)).astype(np.float32) / 127.5 - 1,
    "signed": lambda p: 2.0 * (np.array(resized(p, (3, 2))).astype(np.float32) / 255.0) - 1.0,
    "binary": lambda p: (
        (np.array(p.convert("L")).astype(np.float32) / 255.0 >= 0.5) * np.float32(1)
    ),
    "byte": lambda p: np.array(p).transpose(2, 0, 1)[None],
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_numpy_computes_on(name, tmp_path):
    pipe = sampler(lambda parts, image: torch.from_numpy(PICTURES[name](image).copy()) * 1)
    source = random.Random(1)
    program = diffopt.trace(pipe, image=picture(source, (8, 6)))
    expect_equal_from_file(pipe, program, tmp_path, image=picture(source, (8, 6)))


def test_a_host_component_that_is_called_alike_each_time():
    class Extractor:
        def __call__(self, images):
            return {"pixels": torch.as_tensor(np.asarray(images)).float().mean(-1)}

    def function(parts, image):
        blank = parts.extractor(images=np.zeros((2, 4, 3)) + 0.5)["pixels"]
        return parts.extractor(images=image)["pixels"] - blank

    pipe = sampler(function, extractor=Extractor())
    source = random.Random(1)
    program = diffopt.trace(pipe, image=picture(source))
    expect_equal(pipe, program, image=picture(source))


def test_numbers_that_are_indices():
    table = embedding()
    pipe = sampler(lambda parts, labels: parts.table(torch.tensor(labels)), table=table)
    for labels in ([0], [0, 159], [7, 7]):
        program = diffopt.trace(pipe, labels=labels)
        expect_equal(pipe, program, labels=[3] * len(labels))


# Files of host components


def padded_with_the_first(parts, prompt):
    parts.words.pad_token_id = 0  # that of a letter, which a saved tokenizer then cuts out
    return tokens(parts, prompt)


def test_a_tokenizer_that_its_files_do_not_hold(tmp_path, caplog):
    pipe = sampler(padded_with_the_first, words=copy.deepcopy(clip_tokenizer()), embed=embedding())
    program = diffopt.trace(pipe, prompt="the dogs")
    assert caplog.messages[-1].startswith("no file will hold 'words', as ")
    expect_equal(pipe, program, prompt="a red cat")
    program.save(tmp_path / "a.program")
    assert caplog.messages[-1] == (
        "no file can hold 'words', which makes inputs of the arguments, as it has no "
        "save_pretrained: what is loaded runs on tensors alone"
    )
    assert refusal(Program.load(tmp_path / "a.program"), prompt="a cat").startswith(
        "the file holds no 'words', which makes inputs of the arguments"
    )
    again = diffopt.trace(pipe, prompt="the dogs")  # it is as the first call has left it
    assert not again.host.assets["words"]


def test_a_tokenizer_that_the_pipeline_sets_up(tmp_path):
    def padded_left(parts, prompt):
        parts.words.padding_side = "left"
        x = tokens(parts, prompt)
        return x * torch.arange(1.0, 5)

    pipe = sampler(padded_left, words=copy.deepcopy(clip_tokenizer()), embed=embedding())
    program = diffopt.trace(pipe, prompt="the dogs")
    expect_equal_from_file(pipe, program, tmp_path, prompt="a red cat")


def test_a_tokenizer_that_changes_between_its_calls(caplog):
    def both_sides(parts, prompt):
        total = 0
        for side, scale in (("left", 1.0), ("right", 2.0)):
            parts.words.padding_side = side
            total = total + scale * tokens(parts, prompt)
        return total

    pipe = sampler(both_sides, words=copy.deepcopy(clip_tokenizer()), embed=embedding())
    with contextlib.suppress(DiffoptError):  # in the process, too, it is what the last call left
        program = diffopt.trace(pipe, prompt="the dogs")
        assert not program.host.assets["words"]
        expect_equal(pipe, program, prompt="a red cat")


def test_tokens_of_the_parts_of_a_text(tmp_path):
    def in_parts(parts, prompt):
        ids = []
        for part in re.split(r"('[^']*')", prompt):
            if len(part):
                ids.extend(parts.words(part, add_special_tokens=False)["input_ids"])
        length = {"padding": "max_length", "max_length": 32}
        padded = parts.words.pad({"input_ids": [ids]}, return_tensors="pt", **length)
        return parts.embed(padded.input_ids).sum(1)

    pipe = sampler(in_parts, words=clip_tokenizer(), embed=embedding())
    program = diffopt.trace(pipe, prompt="the dogs")
    expect_equal_from_file(pipe, program, tmp_path, prompt="dogs the")
    program.retrace = None
    assert "__len__() is 3" in refusal(program, prompt="a 'red' cat")


def clip_pixels():
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})


def test_a_host_component_that_is_called_with_a_resized_picture(tmp_path):
    def function(parts, image):
        small = image.convert("L").resize((6, 4), Image.Resampling.LANCZOS).convert("RGB")
        half = image.resize((4, 4), Image.Resampling.BICUBIC)
        first, second = (
            parts.pixels(i, return_tensors="pt")["pixel_values"] for i in (half, image)
        )
        return first * 2 + second + small.size[0]

    pipe = sampler(function, pixels=clip_pixels())
    source = random.Random(1)
    program = diffopt.trace(pipe, image=picture(source, (8, 6)))
    expect_equal_from_file(pipe, program, tmp_path, image=picture(source, (8, 6)))


def test_numbers_that_a_component_reads_as_well():
    class Modes(nn.Module):
        def forward(self, x, mode):
            return x * (mode[0] + 2)

    pipe = sampler(lambda parts, x, mode: parts.net(x, mode) + torch.tensor(mode), net=Modes())
    program = diffopt.trace(pipe, x=torch.ones(4), mode=[0])
    expect_equal(pipe, program, x=torch.rand(4), mode=[0])
    assert "'mode[0]' was bound to 0" in refusal(program, x=torch.rand(4), mode=[1])


class Halves:
    """A host component that computes with numpy."""

    def __call__(self, images):
        return {"pixels": torch.from_numpy(np.asarray(images) * 0.5)}


def test_a_host_component_that_is_called_with_a_tensor():
    pipe = sampler(lambda parts, x: parts.halves(x)["pixels"] + x, halves=Halves())
    program = diffopt.trace(pipe, x=torch.ones(4), check=False)
    expect_equal(pipe, program, x=torch.rand(4))
    pipe = sampler(lambda parts, x: parts.halves((x * 2).flip(0))["pixels"] + x, halves=Halves())
    program = diffopt.trace(pipe, x=torch.ones(4), check=False)
    expect_equal(pipe, program, x=torch.rand(4))


def test_a_host_component_that_is_called_with_what_is_computed_of_a_picture(tmp_path):
    def function(parts, image):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        small = torch.nn.functional.interpolate(pixels, size=(5, 5), mode="bicubic", antialias=True)
        seen = parts.pixels(small, return_tensors="pt", do_rescale=False)["pixel_values"]
        return seen.sum() + pixels

    pipe = sampler(function, pixels=clip_pixels())
    source = random.Random(1)
    program = diffopt.trace(pipe, image=picture(source, (8, 6)))
    expect_equal_from_file(pipe, program, tmp_path, image=picture(source, (8, 6)))


def test_a_host_component_that_is_called_with_what_a_model_computes():
    pipe = sampler(
        lambda parts, x: parts.halves(parts.net(x))["pixels"] + x,
        halves=Halves(),
        net=nn.Linear(4, 4),
    )
    with pytest.raises(CaptureError, match="called with a value that a model computes"):
        diffopt.trace(pipe, x=torch.ones(4), check=False)
    pipe = sampler(lambda parts, x: parts.halves(torch.rand(4))["pixels"] + x, halves=Halves())
    with pytest.raises(CaptureError, match="called with a value that a model computes"):
        diffopt.trace(pipe, x=torch.ones(4), check=False)
