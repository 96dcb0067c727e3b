"""Times engines against the pipelines that were traced, and writes docs/benchmarks.md.

    python examples/benchmarks.py            # all of it: `make bench`, about half an hour
    python examples/benchmarks.py --only fashion-sd --rounds 3 --out quick

Contenders take turns, round by round, so that a slow minute of the machine affects all of them. The
raw times are written beside the document as JSON; those of contenders that were not run are kept.
Run it on a machine that does nothing else.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import diffopt
from diffopt.cli import timing
from diffopt.core import Pipeline

ROOT = Path(__file__).parents[1]
FASHION = ROOT / "examples" / "models" / "fashion-sd"
PROMPT = "ankle boot"
PASSES = "unroll,hoist,simplify,fuse"
TARGETS = ("cpu", "cpu(freeze=true)", "cpu(freeze=true,max-autotune=true)")


def fashion() -> Any:
    """Load the pipeline of examples/models/fashion-sd."""
    pipe = StableDiffusionPipeline.from_pretrained(FASHION, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def larger(
    channels: tuple[int, int, int] = (64, 128, 256), heads: tuple[int, int, int] = (8, 8, 8)
) -> Any:
    """Make an SD-like pipeline around a UNet with random weights.

    Args:
        channels: The channels of each level; the default has 17.8 M parameters.
        heads: The heads of attention in each level.
    """
    pipe = fashion()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=pipe.tokenizer.model_max_length,
        bos_token_id=pipe.tokenizer.bos_token_id,
        eos_token_id=pipe.tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=heads,  # diffusers' name for how many there are
    )
    parts = {"text_encoder": CLIPTextModel(text).eval(), "unet": unet.eval()}
    pipe = StableDiffusionPipeline(**{**pipe.components, **parts}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trace(pipe: Any, steps: int) -> diffopt.Program:
    """Capture the pipeline's call."""
    generator = torch.Generator().manual_seed(0)
    return diffopt.trace(pipe, prompt=PROMPT, num_inference_steps=steps, generator=generator)


def images_of(pipe: Any, steps: int) -> timing.Sampler:
    """Return the pipeline as a function from a seed to images."""
    return lambda seed: (
        pipe(
            PROMPT,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
    )


def compiled(pipe: Any, mode: str | None) -> Any:
    """Compile the pipeline's denoiser and decoder as its users do."""
    timing.compile_pipeline(pipe, mode)
    return pipe


def speed(make: Callable[[], Any], options: argparse.Namespace, folder: Path) -> Any:
    """Time the pipeline, compiled and not, against its engines."""
    passes, steps, rounds = options.passes, options.steps, options.rounds
    load = os.getloadavg()[0]
    program = trace(make(), steps)
    rewritten = Pipeline.parse(passes).run(program)
    contenders = {
        "diffusers, eager": images_of(make(), steps),
        "diffusers, torch.compile": images_of(compiled(make(), None), steps),
        "diffusers, torch.compile max-autotune": images_of(compiled(make(), "max-autotune"), steps),
        "engine without passes, cpu": engine(program, "cpu", folder),
    }
    contenders |= {f"engine, {t}": engine(rewritten, t, folder) for t in options.targets}
    results = timing.measure(contenders, "diffusers, eager", rounds=rounds, progress=report)
    return {
        "load before": load,
        "rounds": rounds,
        "steps": steps,
        "passes": passes,
        "records": [
            {"pass": r["text"], "max_abs": r["max_abs"], "seconds": r["seconds"]}
            for r in rewritten.history
        ],
        "contenders": {
            name: {
                "seconds": result.seconds,
                "first": result.first,
                "max_abs": result.max_abs,
                "median": result.median,
                "spread": result.spread,
            }
            for name, result in results.items()
        },
    }


def engine(program: diffopt.Program, target: str, folder: Path) -> timing.Sampler:
    """Build and load an engine; return it as a function from a seed to images."""
    report(f"building for {target}")
    path = folder / f"{len(list(folder.iterdir()))}.engine"
    built = diffopt.build(program, target, path)
    return lambda seed: built(prompt=PROMPT, seed=seed, output_type="pt").images


def build_cost(passes: str, folder: Path) -> Any:
    """Time tracing, passes and building for few and many steps, with an empty cache."""
    rows = {}
    for steps in (10, 50):
        report(f"building an engine of {steps} steps")
        pipe = fashion()
        with tempfile.TemporaryDirectory() as cache:
            os.environ["DIFFOPT_CACHE"] = cache
            times = [time.perf_counter()]
            program = trace(pipe, steps)
            times.append(time.perf_counter())
            program = Pipeline.parse(passes).run(program)
            times.append(time.perf_counter())
            built = diffopt.build(program, "cpu", folder / f"steps-{steps}.engine")
            times.append(time.perf_counter())
            del os.environ["DIFFOPT_CACHE"]
        seconds = [after - before for before, after in itertools.pairwise(times)]
        rows[str(steps)] = {
            **dict(zip(("trace", "passes", "target"), seconds, strict=True)),
            "seconds": times[-1] - times[0],
            "bytes": built.path.stat().st_size,
            "bodies": len(program.components),
        }
    return rows


def machine(threads: int) -> dict[str, Any]:
    """Describe where the numbers come from."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
    }


def known(parser: argparse.ArgumentParser, path: Path, threads: int) -> dict[str, Any]:
    """Return the results in a file, if there is one; they have to be of this machine."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    now = machine(threads)
    if data.setdefault("machine", now) != now:
        parser.error(f"{path} has numbers of another machine or version: give another --out")
    return data


def report(what: str, fraction: float | None = None) -> None:
    """Print progress to stderr."""
    done = "" if fraction is None else f" ({fraction:.0%})"
    print(f"{what}{done}", file=sys.stderr, flush=True)


def document(data: Mapping[str, Any]) -> str:
    """Return the numbers as a document."""
    at = data["machine"]
    lines = [
        "# Benchmarks",
        "",
        "`make bench` writes this file; the raw times are in benchmarks.json beside it.",
        "",
        f"{at['cpu']} ({at['capability']}), {at['cores']} cores, {at['threads']} threads, torch"
        f" {at['torch']}, fp32, batch 1 with guidance (the denoiser sees batch 2). Contenders take"
        " turns.",
    ]
    for name, title in (
        ("fashion-sd", "fashion-sd, 2.8 M UNet, 8×8 latents"),
        ("larger", "SD-like UNet of 17.8 M parameters, random weights, 32×32 latents"),
    ):
        if name in data:
            row = data[name]
            about = (
                f"{row['steps']} steps, medians of {row['rounds']} rounds. The engines' passes are"
                f" `{row['passes']}`."
            )
            lines += ["", f"## {title}", "", about, "", *speed_table(row["contenders"])]
    if "build" in data:
        lines += ["", "## What more steps cost the build", "", *build_table(data["build"])]
    return "\n".join(lines) + "\n"


def speed_table(rows: Mapping[str, Any]) -> list[str]:
    """Return a table of times, with ratios to eager and to compile."""
    eager = rows["diffusers, eager"]["median"]
    compiled_ = rows["diffusers, torch.compile"]["median"]
    lines = [
        "| | ms an image | interquartile | against eager | against compile | first call, s"
        " | largest pixel difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        lines.append(
            f"| {name} | {median * 1e3:.1f} | {row['spread'] * 1e3:.1f} | {eager / median:.2f}×"
            f" | {compiled_ / median:.2f}× | {row['first']:.1f} | {row['max_abs']:.1e} |"
        )
    return lines


def build_table(rows: Mapping[str, Any]) -> list[str]:
    """Return a table of build times and file sizes."""
    lines = [
        "From the pipeline to the engine, with an empty cache of kernels.",
        "",
        "| steps | trace, s | passes, s | target, s | all, s | file, MB | bodies |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for steps, row in rows.items():
        parts = " | ".join(f"{row[key]:.1f}" for key in ("trace", "passes", "target", "seconds"))
        lines.append(f"| {steps} | {parts} | {row['bytes'] / 1e6:.2f} | {row['bodies']} |")
    few, many = rows["10"], rows["50"]
    lines += [
        "",
        f"50 steps against 10: {many['seconds'] / few['seconds']:.2f}× the time,"
        f" {many['bytes'] / few['bytes']:.2f}× the size.",
    ]
    return lines


def main() -> None:
    """Run what was asked for and write the document."""
    sections = ("fashion-sd", "larger", "build")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=sections, nargs="+", default=sections)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", default=PASSES)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    raw = options.out.with_suffix(".json")
    data = known(parser, raw, options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for section, make in (("fashion-sd", fashion), ("larger", larger)):
            if section in options.only:
                report(f"== {section}")
                torch.compiler.reset()
                data[section] = speed(make, options, folder)
        if "build" in options.only:
            report("== build")
            data["build"] = build_cost(options.passes, folder)
    raw.write_text(json.dumps(data, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(document(data), encoding="utf-8")
    report(f"wrote {options.out}.md and {options.out}.json")


if __name__ == "__main__":
    main()
