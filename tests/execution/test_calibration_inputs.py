"""Inputs of calls to calibrate with: other texts and draws, what else there was as it was."""

import random

import numpy as np
import torch

import diffopt
from diffopt.execution.calibration_inputs import requests
from tests.capture.random_samplers import Words, picture
from tests.capture.test_arguments import clip_pixels, embedding, sampler, texts


def test_pictures_that_a_program_does_not_keep():
    def function(parts, image, prompt, generator):
        if np.array(image).max() > 100:
            prompt = prompt.strip()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        seen = parts.pixels(pixels * 0.5, return_tensors="pt", do_rescale=False)["pixel_values"]
        noise = torch.randn(1, 4, generator=generator)
        return texts(parts, prompt) * seen.mean() + pixels.mean() + noise

    pipe = sampler(function, pixels=clip_pixels(), words=Words(), embed=embedding())
    image, noise = picture(random.Random(1), (8, 6)), torch.Generator().manual_seed(5)
    program = diffopt.trace(pipe, image=image, prompt="a cat", generator=noise)
    assert program.host.computed
    assert program.host.array_reads
    first, second = requests(program, ["a dog"], 2)
    for step, *values in zip(program.host.steps, program.sample, first, second, strict=True):
        changed = [not torch.equal(values[0], value) for value in values[1:]]
        is_picture = ("image",) in step.places() or not step.places()
        assert changed == [not is_picture] * 2
    assert not torch.equal(program.run(first)[0], program.run(second)[0])
