"""The programs whose components are built."""

from pathlib import Path

import diffopt
from diffopt.core import Pipeline
from diffopt.ir.program import Program
from examples.study.models import ARGUMENTS, load
from tests.zoo import CASES

EXACT = "unroll,hoist,simplify,fuse"
CACHED = "unroll,hoist,cache(deepcache,interval=3),simplify,fuse"

CACHED_STEPS = "fp16, cached steps"
FORMATS = {
    "fp32": EXACT,
    "fp16": f"{EXACT},cast(fp16)",
    "bf16": f"{EXACT},cast(bf16)",
    "int8": f"{EXACT},cast(fp16),quantize(int8,ends=true)",
    "int8 weights": f"{EXACT},cast(fp16),quantize(int8,activations=none,ends=true)",
    "fp8": f"{EXACT},cast(fp16),quantize(fp8,ends=true)",
    "int4 weights": f"{EXACT},cast(fp16),quantize(int4,activations=none,ends=true)",
    CACHED_STEPS: f"{CACHED},cast(fp16)",
}
"""Passes by the format of the program."""

ARCHITECTURES = {
    "sd": "Stable Diffusion 1",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "pixart": "PixArt-Σ",
    "dit": "DiT",
    "sana": "Sana",
    "hunyuan-dit": "Hunyuan-DiT",
    "qwen-image": "Qwen-Image",
    "wan": "Wan",
    "ltx": "LTX-Video",
    "cogvideox": "CogVideoX",
    "svd": "Stable Video Diffusion",
}
"""Tiny models with random weights, by their name in tests/zoo."""

ALL_FORMATS = ("sdxl", "flux")
"""Of the tiny models, those in all formats; the others in fp16 alone."""

MODELS = (*ARGUMENTS, *ARCHITECTURES)


def formats(model: str) -> list[str]:
    """Return the formats that a model is built in."""
    if model in ARCHITECTURES and model not in ALL_FORMATS:
        return ["fp16"]
    return [number for number in FORMATS if number != CACHED_STEPS or model == "fashion-sd"]


def make(model: str, number: str, work: Path) -> Program:
    """Return a model's program in a format, from `work` if it is there."""
    captured = work / f"{model}.program"
    if not captured.exists():
        _capture(model).save(captured)
    program = Program.load(captured)
    return Pipeline.parse(FORMATS[number]).run(program, verify=False, enforce=False, seed=0)


def _capture(model: str) -> Program:
    if model in CASES:
        return diffopt.trace(CASES[model].build(), **CASES[model].inputs(0))
    what = {"prompt": "ankle boot"} if ARGUMENTS[model] == "prompt" else {"class_labels": [9]}
    return diffopt.trace(load(model), **what, num_inference_steps=6, output_type="pt")
