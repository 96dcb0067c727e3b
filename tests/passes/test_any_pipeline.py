"""Random pipelines of all passes: each gives a program that runs, or one line that says why not.

    COUNT=3000 SEED=7 pytest tests/passes/test_any_pipeline.py

The seed moves with the day, and is in the message of a failure.
"""

import datetime
import functools
import logging
import os
import random
from pathlib import Path

import pytest
import torch

from diffopt.core import Pipeline, pass_names
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from tests import loops, sampler
from tests.zoo import traced

COUNT = int(os.environ.get("COUNT", "300"))
SEED = int(os.environ.get("SEED", str(datetime.date.today().toordinal())))

OPTIONS: dict[str, tuple[str, ...]] = {
    "batch": ("", "max=2", "min=2,max=3"),
    "cache": (
        "fora,interval=2",
        "deepcache",
        "taylorseer",
        "delta-dit",
        "fora",
        "auto,speedup=1.3,calls=1",
    ),
    "cast": ("", "fp16", "bf16,islands=norms", "fp16,islands=none", "bf16,islands=(norms,softmax)"),
    "fuse": ("", "linears=false", "steps=false"),
    "hoist": ("",),
    "lengths": ("", "max=8"),
    "low-rank": ("rank=2,multiple=1", "energy=0.9,multiple=1", "rank=0.5,ends=true", "data=true"),
    "merge-tokens": ("", "ratio=0.25,merge=keys", "choice=regular"),
    "prune": ("mlp", "channels", "heads", "all,ratio=0.5", "2:4", "blocks", "dims,round-to=1"),
    "quantize": (
        *("", "int4", "fp8", "int8,activations=dynamic", "int8,activations=rows", "smooth=true"),
        *("int4,activations=none,group=4", "fp8,ends=true", "rank=2", "components=all"),
    ),
    "recover": ("steps=1,samples=2,batch=1",),
    "simplify": ("",),
    "unroll": ("",),
}
OFTEN = {"recover": 0.1, "cache": 0.7, "quantize": 1.5, "lengths": 0.2, "batch": 0.1}
"""How often a pass is taken, next to the others: some take long, `batch` has to be the last."""


@functools.cache
def model(name: str) -> Program:
    if name == "loop":
        return loops.program()
    return sampler.program() if name == "sampler" else traced(name)


def pipeline(numbers: random.Random) -> str:
    """Return the text of a pipeline of one to four passes."""
    names = sorted(OPTIONS)
    weights = [OFTEN.get(name, 1.0) for name in names]
    chosen = numbers.choices(names, weights, k=numbers.choice((1, 2, 2, 3, 3, 4)))
    if numbers.random() < 0.4:
        chosen.insert(0, "unroll")
    if numbers.random() < 0.1:
        chosen.append("batch")
    texts = []
    for name in chosen:
        options = numbers.choice(OPTIONS[name])
        if name == "quantize":
            options = f"{options},samples=1".lstrip(",")
        texts.append(f"{name}({options})" if options else name)
    return ",".join(texts)


def outcome(text: str, program: Program) -> str:
    """Run a pipeline; return the error's message, or "" for a program that runs."""
    try:
        result = Pipeline.parse(text).run(program, seed=0)
    except DiffoptError as error:
        return str(error) or "an error without a message"
    result.to_members()  # every operator may be in files
    outputs = result.run(result.sample_inputs())
    assert len(outputs) == len(program.run(program.sample))
    assert all(isinstance(output, torch.Tensor) for output in outputs)
    return ""


def test_all_passes_are_tried() -> None:
    assert set(OPTIONS) == set(pass_names())


@pytest.mark.filterwarnings("ignore")
def test_random_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR, "diffopt")
    numbers = random.Random(SEED)
    refused = 0
    for number in range(COUNT):
        name = numbers.choices(("loop", "sampler", "dit", "sd"), (4, 4, 1, 1))[0]
        text = pipeline(numbers)
        try:
            refused += bool(outcome(text, model(name)))
        except Exception as error:
            raise AssertionError(f"pipeline {number} of seed {SEED}: {text} on {name}") from error
    assert refused < COUNT * 2 / 3
