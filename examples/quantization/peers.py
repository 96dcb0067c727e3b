"""Measures OpenVINO, with NNCF's quantization, on the denoisers whose engines are timed.

Both sides run the same graph, a call of the sampling loop, in turn in one process. NNCF calibrates
with the calls that `quantize` calibrates with. Compared are the errors of other calls against fp32,
and the time of one call.
"""

import argparse
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.execution import trajectories
from diffopt.execution.calibration_inputs import requests
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.ir.sampling_loop import Loop, find_loop
from diffopt.lowering.executor import ComponentFunction
from diffopt.lowering.target import EngineContents, parse_target
from examples.benchmarks import report
from examples.quantization.configurations import BF16, INT8
from examples.study.large import base, rewritten
from examples.study.results import Results
from examples.study.study import REFERENCE

PACKAGES = ("openvino", "nncf")
SAMPLES = 8  # requests that are calibrated with, as `quantize` has by default
HELD_OUT = 1_000_000  # the seed of the request whose calls are compared
OURS = {"fp32": REFERENCE, "bf16": BF16, "int8": INT8}
THEIRS = "OpenVINO"

Run = Callable[[], list[Tensor]]
"""Computes one call again."""


def versions() -> dict[str, str] | None:
    """Return the versions of the packages; None where one is not installed."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(name: str, options: argparse.Namespace, results: Results) -> None:
    """Compare one model's denoiser on both sides, if that has not been done."""
    steps = options.large_steps
    keys = "peers", f"{name}, {steps} steps"
    if results.get(*keys) is not None and not options.again:
        return
    # Without the scheduler's arithmetic: only what the denoiser returns is compared.
    program, parameters = base(name, steps, "unroll,hoist,simplify,fuse(steps=false)")
    loop = find_loop(program)
    (inputs,) = requests(program, [], 1, HELD_OUT)
    visits = list(trajectories.steps(program, loop.calls, inputs))
    makers = _ours(program, loop, inputs, options.large_targets)
    makers |= _theirs(program, loop, options.threads)
    with torch.no_grad():
        truth = [list(loop.body(*visit.arguments)) for visit in visits]
    errors = {}
    for key, make in makers.items():
        report(f"{name}, {key}: errors")
        outputs = [make(index, visit.arguments)() for index, visit in enumerate(visits)]
        errors[key] = statistics.mean(map(error, outputs, truth))
    index = len(visits) // 2
    seconds = take_turns(
        {key: make(index, visits[index].arguments) for key, make in makers.items()},
        options.rounds,
    )
    contenders = {key: {"error": errors[key], "seconds": seconds[key]} for key in makers}
    shape = list(visits[0].arguments[0].shape)
    about = {"parameters": parameters, "shape": shape, "packages": versions()}
    results.put({**about, "contenders": contenders}, *keys)


Make = Callable[[int, Sequence[Tensor]], Run]
"""Prepares a call of the loop, given its number and its arguments in fp32."""


def _ours(
    program: Program, loop: Loop, inputs: Sequence[Tensor], targets: Sequence[str]
) -> dict[str, Make]:
    makers = {}
    for number, config in OURS.items():
        final = rewritten(program, config)
        for target in targets:
            report(f"building {config} for {target}")
            makers[f"{number}, {target}"] = calls_of(final, loop, inputs, target)
    return makers


def calls_of(program: Program, plain: Loop, inputs: Sequence[Tensor], target: str) -> Make:
    """Prepare calls of a program's compiled loop.

    Args:
        program: The program of a configuration.
        plain: The loop before the configuration's passes.
        inputs: The inputs of the request whose calls are prepared. Arguments that the passes have
            added, such as scales, are those of the program's own calls.
        target: What to compile for.
    """
    loop = find_loop(program)
    added = [list(visit.arguments) for visit in trajectories.steps(program, loop.calls, inputs)]
    names = {node.name: i for i, node in enumerate(g.placeholders(plain.body))}
    places = [names.get(node.name) for node in g.placeholders(loop.body)]
    body = compiled(program, loop.name, target)

    def make(index: int, arguments: Sequence[Tensor]) -> Run:
        tensors = [
            tensor if place is None else arguments[place].to(tensor.dtype)
            for tensor, place in zip(added[index], places, strict=True)
        ]
        return lambda: list(body(tensors))

    return make


def compiled(program: Program, name: str, target: str) -> ComponentFunction:
    """Return one component of a program as a function, as an engine has it."""
    chosen = parse_target(target)
    alone = program.clone()
    for other in program.components:
        if other != name:
            del alone.root._modules[other]
    lowered = chosen.compile(alone, report)
    data, tensors, _ = program.to_members()
    contents = EngineContents(
        members={member: memoryview(content) for member, content in lowered.members.items()},
        graphs={name: data["graphs"][name]},
        tensors=tensors,
        program=lambda: program,
    )
    return chosen.load(contents)[name]


def _theirs(program: Program, loop: Loop, threads: int) -> dict[str, Make]:
    import nncf
    import openvino

    calls = [
        visit.arguments
        for inputs in requests(program, [], SAMPLES, 0)
        for visit in trajectories.steps(program, loop.calls, inputs)
    ]
    report("OpenVINO: converting")
    model = openvino.convert_model(torch.export.export(loop.body, tuple(calls[0])))
    model.reshape(dict(enumerate([list(tensor.shape) for tensor in calls[0]])))
    report("NNCF: quantizing")
    has_attention = any("attention" in str(node.target) for node in loop.body.graph.nodes)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([[tensor.numpy() for tensor in call] for call in calls]),
        subset_size=len(calls),
        model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
    )
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    makers = {}
    for number, network, precision in (
        ("fp32", model, "f32"),
        ("bf16", model, "bf16"),
        ("int8", quantized, "bf16"),
    ):
        hint = {"INFERENCE_PRECISION_HINT": precision}
        ready = openvino.Core().compile_model(network, "CPU", settings | hint)
        makers[f"{number}, {THEIRS}"] = _request(ready.create_infer_request())
    return makers


def _request(request: Any) -> Make:
    def make(index: int, arguments: Sequence[Tensor]) -> Run:
        arrays = [tensor.numpy() for tensor in arguments]

        def run() -> list[Tensor]:
            outputs = request.infer(arrays, share_inputs=True, share_outputs=True)
            return [torch.from_numpy(array).clone() for array in outputs.values()]

        return run

    return make


def error(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the relative error (in the L2 norm) of all outputs of a call together."""
    pairs = list(zip(outputs, truth, strict=True))
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return float((wrong / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5)


def take_turns(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each, which take turns; the first two rounds do not count."""
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for number, (key, run) in itertools.product(range(rounds + 2), runs.items()):
        started = time.perf_counter()
        run()
        if number >= 2:
            seconds[key].append(time.perf_counter() - started)
    return seconds
