"""The flags of the commands: those of several once, and a dataclass for each command with many.

Nothing here imports torch, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

T = TypeVar("T")

MODEL_HELP = (
    "A local diffusers directory, a hub id, a .program file, or package.module:function"
    " (which returns a pipeline or a program)."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Another argument of the pipeline's call; repeatable. A Python literal, the name of"
        " an image (.png, .jpg) or tensor (.pt, .npy) file, or else a plain word.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and no table.")]
Stats = Annotated[
    bool, typer.Option("--stats", help="Show sizes, notes and reasons for rewrites not done.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Trace with this many sampling steps.")]
Batch = Annotated[int, typer.Option(min=1, help="How many images one call makes.")]
Batches = Annotated[
    str,
    typer.Option(
        metavar="N|N..M",
        help="How many images one call makes; or, as 1..8, how many requests, each with its own"
        " prompt and seed, one run of the engine may serve.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="fp32|bf16|fp16",
        help="The type to load a diffusers pipeline's weights in. Where they are stored in it they"
        " are mapped from their files; other weights are converted, into memory.",
    ),
]
Dynamic = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Numbers of the call that stay inputs, such as guidance_scale; auto: all that can.",
    ),
]

Check = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check",
        help="Run the pipeline once for real, and compare the captured program's result; by default"
        " where that takes less than two minutes.",
        show_default=False,
    ),
]


def with_flags(cls: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Turn a function of a dataclass into a command whose flags are the fields, in their order."""

    def decorate(function: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: object) -> None:
            function(cls(**values))

        command.__signature__ = inspect.signature(cls, eval_str=True)  # type: ignore[attr-defined]
        return command

    return decorate


@dataclass(frozen=True)
class TraceFlags:
    """The flags of `diffopt trace`."""

    model: Model
    output: Annotated[Path, typer.Option("--output", "-o", help="The .program file to write.")]
    settings: Settings = None
    steps: Steps = None
    batch: Batch = 1
    dynamic: Dynamic = ""
    dtype: Dtype = "fp32"
    check: Check = None


@dataclass(frozen=True)
class OptimizeFlags:
    """The flags of `diffopt optimize`."""

    model: Model
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .engine (or .program) file to write.")
    ]
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="PASSES", help="Pipeline of passes, in order.")
    ] = "unroll,hoist,simplify,fuse"
    target: Annotated[str, typer.Option("--target", "-t", help="What to build for.")] = "cpu"
    settings: Settings = None
    steps: Steps = None
    batch: Batches = "1"
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Serve prompts of any number of tokens up to this, where the pipeline does not"
            " fix it.",
        ),
    ] = None
    dynamic: Dynamic = ""
    dtype: Dtype = "fp32"
    check: Check = None
    compress: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=22,
            metavar="LEVEL",
            help="Compress what gets smaller: 1 is fast, 19 small. It then loads more slowly.",
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Largest relative error that one approximate pass may add."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of what passes do at random.")] = 0
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts (or class labels), one a line, for passes that measure values; by"
            " default that of the trace.",
        ),
    ] = None
    timing: Annotated[bool, typer.Option("--timing", help="Show each pass's time.")] = False
    stats: Stats = False
    print_after: Annotated[
        str, typer.Option(metavar="NAMES", help="Print the program after these passes, or 'all'.")
    ] = ""
    print_changed: Annotated[
        bool, typer.Option("--print-changed", help="Print what each pass changed, as a diff.")
    ] = False
    dump: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the program after each pass.")
    ] = None
    bisect: Annotated[
        float | None,
        typer.Option(
            metavar="BOUND",
            help="Only find the first pass after which the output is further than this relative"
            " error from the captured program's; exit code 1 if there is one.",
        ),
    ] = None
    verify_each: Annotated[bool, typer.Option(help="Verify the program after each pass.")] = True
    compare: Annotated[
        bool,
        typer.Option(
            help="Run the program before and after each pass, and say what error it adds; for a"
            " large model without a GPU that may take hours."
        ),
    ] = True
    as_json: Json = False


TrustedKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-key",
        metavar="PEM",
        help="A public key of which the file must be signed (see `diffopt sign`); repeatable.",
    ),
]


@dataclass(frozen=True)
class RunFlags:
    """The flags of `diffopt run`."""

    engine: Annotated[Path, typer.Argument(help="An .engine or .program file.")]
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A picture (a grid for several), or .pt, or .npy."),
    ]
    prompt: Annotated[str | None, typer.Option(help="What to make.")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What to stay away from.")] = None
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image, by default 0; the others count up."),
    ] = None
    number: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 1
    guidance_scale: Annotated[float | None, typer.Option(help="How much the prompt counts.")] = None
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Run it on eager instead of what it was built for."),
    ] = None
    trusted_key: TrustedKeys = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="A LoRA to add to the engine's weights, a .safetensors file or its folder;"
            " repeatable.",
        ),
    ] = None
    settings: Settings = None


@dataclass(frozen=True)
class BenchFlags:
    """The flags of `diffopt bench`."""

    engine: Annotated[Path, typer.Argument(help="An .engine file.")]
    against: Annotated[
        str,
        typer.Option(
            help="What to compare with: eager, compile, max-autotune (the original pipeline so"
            " run or compiled), or other .engine files. eager always runs: it is the reference."
        ),
    ] = "eager"
    model: Annotated[
        str, typer.Option(help="The original MODEL; by default what the engine was made from.")
    ] = ""
    dtype: Dtype = "fp32"
    prompt: Annotated[str | None, typer.Option(help="The prompt to time with.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the first round; the others count up.")] = 0
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 10
    warmup: Annotated[int, typer.Option(min=1, help="Calls of each before those.")] = 2
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of each call, of one prompt; by default as traced."),
    ] = None
    settings: Settings = None
    as_json: Json = False


@dataclass(frozen=True)
class CompareFlags:
    """The flags of `diffopt compare`."""

    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE FILE…", help="Two or more .engine or .program files."),
    ]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A picture: a column a file, a row an image.")
    ]
    prompt: Annotated[list[str] | None, typer.Option(help="What to make; repeatable.")] = None
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More prompts, one a line.")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of each prompt's first image, by default 0; the others count up."),
    ] = None
    number: Annotated[int, typer.Option("-n", min=1, help="How many images of each prompt.")] = 1
    settings: Settings = None
    as_json: Json = False


@dataclass(frozen=True)
class SensitivityFlags:
    """The flags of `diffopt sensitivity`."""

    model: Model
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            "-p",
            metavar="PASSES",
            help="Passes to run first; by default unroll,hoist,simplify, and none for a .program.",
        ),
    ] = None
    formats: Annotated[str, typer.Option(help="What to try weights in: int8, int4, fp8.")] = (
        "int8,int4"
    )
    activations: Annotated[
        str, typer.Option(help="Where inputs' scales come from: static, dynamic, rows, none.")
    ] = "static"
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Draw layers by steps, too."),
    ] = None
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts (or class labels) to measure on, one a line."),
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="How many requests to calibrate with.")] = 4
    seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 0
    settings: Settings = None
    steps: Steps = None
    as_json: Json = False


@dataclass(frozen=True)
class ServeFlags:
    """The flags of `diffopt serve`."""

    engines: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="The .engine files, which requests call by name."),
    ]
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the bearer token is that clients must have; or in DIFFOPT_TOKEN.",
        ),
    ] = None
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="The most images of one run; by default as the engine allows."),
    ] = None
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long an image waits for others to join its run.")
    ] = 10.0
    max_queue: Annotated[
        int, typer.Option(min=1, help="How many images may wait for an engine; then 503.")
    ] = 64
    max_images: Annotated[int, typer.Option(min=1, help="The largest n of a request.")] = 10
    max_prompt: Annotated[int, typer.Option(min=1, help="The most characters of a text.")] = 32_000
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="The largest request.")] = 1.0
    max_upload_mb: Annotated[
        float, typer.Option(min=0.001, help="The largest request with pictures.")
    ] = 16.0
    body_seconds: Annotated[
        float, typer.Option(min=0.1, help="How long a client may take to send a request.")
    ] = 30.0
    file_seconds: Annotated[
        float, typer.Option(min=1, help="How long a picture can be had by its URL.")
    ] = 3600.0
    max_files_mb: Annotated[
        float, typer.Option(min=1, help="The memory of the pictures that have URLs.")
    ] = 256.0
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, the time for what was accepted.")
    ] = 30.0
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Run on eager instead of what they were built for."),
    ] = None
    trusted_key: TrustedKeys = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load the engines, print the configuration, end.")
    ] = False
