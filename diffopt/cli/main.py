"""The command line."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffopt.errors import DiffoptError, ToleranceError

# Everything that imports torch is imported by the command that needs it: `--help` is instant.
if TYPE_CHECKING:
    from diffopt.ir.program import Program

app = typer.Typer(
    name="diffopt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "From a model to a picture:\n\n"
        '  diffopt optimize MODEL --passes "unroll(steps=25),hoist,simplify,fuse" -o out.engine\n\n'
        '  diffopt run out.engine --prompt "ankle boot" -o boot.png\n\n'
        "Exit codes: 0 done, 1 a check did not hold, 2 wrong usage or input."
    ),
)

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
Dynamic = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="Numbers of the call that stay inputs, such as guidance_scale."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("diffopt")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"diffopt {version}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Compile a diffusion pipeline to one engine file, and run it."""


@app.command(
    epilog="diffopt trace examples/models/fashion-sd --steps 10 -o fashion.program\n\n"
    "diffopt trace mypackage.pipelines:make --set height=256 --dynamic guidance_scale -o a.program"
)
def trace(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .program file to write.")],
    settings: Settings = None,
    steps: Steps = None,
    batch: Batch = 1,
    dynamic: Dynamic = "",
) -> None:
    """Capture a pipeline's whole call as a program file."""
    from diffopt.cli import output as show

    _expect(output, ".program")
    with show.progress(f"tracing {model}"):
        program = _trace(model, settings, steps, batch, dynamic)
        program.save(output)
    calls = len(program.calls())
    show.stderr().print(f"wrote {output}: {len(program.components)} components, {calls} calls")


@app.command(
    epilog='diffopt optimize MODEL -p "unroll(steps=25),hoist,simplify,fuse" -o out.engine\n\n'
    'diffopt optimize in.program --passes "cache(auto,budget=0.02)" --stats -o out.program\n\n'
    "diffopt passes  lists the passes; an output named .program is not lowered to a target."
)
def optimize(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .engine (or .program) file to write.")
    ],
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="PASSES", help="Pipeline of passes, in order.")
    ] = "unroll,hoist,simplify,fuse",
    target: Annotated[str, typer.Option("--target", "-t", help="What to build for.")] = "cpu",
    settings: Settings = None,
    steps: Steps = None,
    batch: Batches = "1",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Serve prompts of any number of tokens up to this, where the pipeline does not"
            " fix it.",
        ),
    ] = None,
    dynamic: Dynamic = "",
    compress: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=22,
            metavar="LEVEL",
            help="Compress what gets smaller: 1 is fast, 19 small. It then loads more slowly.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Largest relative error that one approximate pass may add."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what passes do at random.")] = 0,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts (or class labels), one a line, for passes that measure values; by"
            " default that of the trace.",
        ),
    ] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Show each pass's time.")] = False,
    stats: Stats = False,
    print_after: Annotated[
        str, typer.Option(metavar="NAMES", help="Print the program after these passes, or 'all'.")
    ] = "",
    print_changed: Annotated[
        bool, typer.Option("--print-changed", help="Print what each pass changed, as a diff.")
    ] = False,
    dump: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the program after each pass.")
    ] = None,
    bisect: Annotated[
        float | None,
        typer.Option(
            metavar="BOUND",
            help="Only find the first pass after which the output is further than this relative"
            " error from the captured program's; exit code 1 if there is one.",
        ),
    ] = None,
    verify_each: Annotated[bool, typer.Option(help="Verify the program after each pass.")] = True,
    compare: Annotated[
        bool,
        typer.Option(
            help="Run the program before and after each pass, and say what error it adds; for a"
            " large model without a GPU that may take hours."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Trace a model, run passes over it, check each, and build one engine file."""
    from diffopt.analysis import weight_memory
    from diffopt.cli import optimize as optimize_command
    from diffopt.cli import output as show

    _expect(output, ".engine", ".program")
    count, more = optimize_command.parse_batch(batch)
    lengths = optimize_command.parse_tokens(tokens, batch if more else "")
    prompts = _prompts(calibrate)
    passes = ",".join(filter(None, (passes, lengths, more)))
    target_text = target if output.suffix == ".engine" else None
    job = optimize_command.Job.parse(passes, target_text, compress)
    with show.progress(f"tracing {model}"):
        program = _trace(model, settings, steps, count, dynamic)
    if bisect is not None:
        options = {"seed": seed, "prompts": prompts}
        code = optimize_command.find_culprit(job.pipeline, program, bisect, as_json, **options)
        raise typer.Exit(code)
    watchers = optimize_command.watchers(job.pipeline, print_after, print_changed, dump)
    result, records = optimize_command.rewrite(
        job.pipeline,
        program,
        watchers,
        budget=budget,
        verify=verify_each,
        compare=compare,
        seed=seed,
        prompts=prompts,
    )
    optimize_command.write(job, result, output)
    size = weight_memory.of_program(result)
    if as_json:
        rows = [asdict(record) for record in records]
        show.print_json({"output": str(output), "passes": rows, "weights": size.to_json()})
    elif records:
        show.records_table(records, timing=timing, stats=stats)
    show.stderr().print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB), {size}")


@app.command(
    epilog='diffopt run out.engine --prompt "ankle boot" --seed 0 -n 8 -o boots.png\n\n'
    "diffopt run dit.engine --set class_labels=[3] -o dress.pt"
)
def run(
    engine: Annotated[Path, typer.Argument(help="An .engine or .program file.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A picture (a grid for several), or .pt, or .npy."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What to make.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count up.")] = 0,
    number: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 1,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How much the prompt counts.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Run it on eager instead of what it was built for."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Run an engine and write what it makes."""
    from diffopt.cli import output as show
    from diffopt.cli import run as run_command

    arguments = _arguments(settings)
    named = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
    arguments |= {name: value for name, value in named.items() if value is not None}
    with show.progress(f"loading {engine}") as progress:
        made = run_command.run(engine, arguments, seed, number, output, progress, target)
    show.stderr().print(f"wrote {output} ({made})")


@app.command(
    epilog="diffopt bench out.engine --against eager,compile\n\n"
    "diffopt bench fast.engine --against eager,exact.engine --rounds 20 --json"
)
def bench(
    engine: Annotated[Path, typer.Argument(help="An .engine file.")],
    against: Annotated[
        str,
        typer.Option(
            help="What to compare with: eager, compile, max-autotune (the original pipeline so"
            " run or compiled), or other .engine files. eager always runs: it is the reference."
        ),
    ] = "eager",
    model: Annotated[
        str, typer.Option(help="The original MODEL; by default what the engine was made from.")
    ] = "",
    prompt: Annotated[str | None, typer.Option(help="The prompt to time with.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first round; the others count up.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Calls of each before those.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of each call, of one prompt; by default as traced."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Time an engine against the original pipeline, and compare their images."""
    from diffopt.cli import bench as bench_command

    arguments = _arguments(settings) | ({} if prompt is None else {"prompt": prompt})
    bench_command.run(
        engine, against.split(","), model, arguments, seed, rounds, warmup, threads, as_json, batch
    )


@app.command(
    epilog='diffopt compare exact.engine cached.engine --prompt "ankle boot" -n 4 -o grid.png\n\n'
    "diffopt compare a.program b.engine c.engine --prompts prompts.txt --json -o grid.png"
)
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE FILE…", help="Two or more .engine or .program files."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A picture: a column a file, a row an image.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="What to make; repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More prompts, one a line.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of each prompt's first image; the others count up.")
    ] = 0,
    number: Annotated[int, typer.Option("-n", min=1, help="How many images of each prompt.")] = 1,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show images of several engines side by side, and how far they are from the first one's."""
    from diffopt.cli import compare as compare_command

    texts = [*(prompt or ()), *_prompts(prompts)]
    compare_command.run(files, output, texts, _arguments(settings), seed, number, as_json)


@app.command(
    epilog="diffopt inspect fashion.program\n\ndiffopt inspect out.engine --json\n\n"
    "diffopt inspect cached.program --picture heat.png\n\n"
    "diffopt inspect pruned.program --stats\n\n"
    "diffopt inspect fashion.program --target h100"
)
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"An .engine file, or {MODEL_HELP}")],
    graph: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Print this component's graph ('program': the outer)."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw which blocks each step computes, reuses or extrapolates.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="DEVICE",
            help="Show instead what each component costs on this device at best, and why.",
        ),
    ] = None,
    stats: Stats = False,
    as_json: Json = False,
) -> None:
    """Show what a program or an engine consists of, and what each step calls."""
    from diffopt.cli import image_files
    from diffopt.cli import inspect as inspect_command
    from diffopt.lowering.target import parse_hardware

    hardware = None if target is None else parse_hardware(target)
    if picture is not None:
        _expect(picture, *image_files.PICTURES)
    parts: dict[str, int] = {}
    if file.endswith(".engine"):
        program, parts = inspect_command.open_engine(file)
    else:
        program = _trace(file)
    if picture is not None:
        inspect_command.save_picture(program, picture)
    if graph is not None:
        print(inspect_command.graph_text(program, graph))
    elif hardware is not None:
        inspect_command.print_roofline(program, file, hardware, as_json)
    else:
        inspect_command.inspect(program, file, as_json, stats, parts)


@app.command(
    epilog="diffopt sensitivity fashion.program --formats int8,int4 -o heat.png\n\n"
    'diffopt sensitivity MODEL -p "unroll(steps=25),hoist,simplify" --calibrate prompts.txt --json'
)
def sensitivity(
    model: Model,
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            "-p",
            metavar="PASSES",
            help="Passes to run first; by default unroll,hoist,simplify, and none for a .program.",
        ),
    ] = None,
    formats: Annotated[
        str, typer.Option(help="What to try weights in: int8, int4, fp8.")
    ] = "int8,int4",
    activations: Annotated[
        str, typer.Option(help="Where inputs' scales come from: static, dynamic, rows, none.")
    ] = "static",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Draw layers by steps, too."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts (or class labels) to measure on, one a line."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many requests to calibrate with.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 0,
    settings: Settings = None,
    steps: Steps = None,
    as_json: Json = False,
) -> None:
    """Measure which layer, in which format and at which step, costs how much accuracy."""
    from diffopt.cli import image_files
    from diffopt.cli import output as show
    from diffopt.cli import sensitivity as sensitivity_command

    if output is not None:
        _expect(output, *image_files.PICTURES)
    options = sensitivity_command.parse(formats, activations, passes, model)
    prompts = _prompts(calibrate)
    with show.progress(f"tracing {model}"):
        program = _trace(model, settings, steps)
    with show.progress("measuring") as progress:
        found = sensitivity_command.measure(program, options, prompts, samples, seed, progress)
    if output is not None:
        sensitivity_command.save_picture(found, output)
    sensitivity_command.print_report(found, as_json)


@app.command(epilog="diffopt verify out.engine  # exit code 1 if it is damaged")
def verify(
    file: Annotated[Path, typer.Argument(help="An .engine or .program file.")],
    as_json: Json = False,
) -> None:
    """Check a file: checksums, graphs, types, and that it runs here."""
    from diffopt.cli import inspect as inspect_command
    from diffopt.cli import output as show

    if not file.is_file():
        raise DiffoptError(f"there is no file {file}")
    problem = inspect_command.problem(file)
    if as_json:
        show.print_json({"file": str(file), "ok": problem is None, "problem": problem})
    elif problem is None:
        print(f"{file}: ok")
    else:
        print(f"diffopt: error: {problem}", file=sys.stderr)
    raise typer.Exit(0 if problem is None else 1)


@app.command(epilog="diffopt finish out.engine  # on the GPU machine, before it is deployed")
def finish(
    file: Annotated[Path, typer.Argument(help="An .engine file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; none: FILE itself.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile what an engine was left to compile on the device that it is for."""
    from diffopt.cli import output as show
    from diffopt.engine import engine

    if not file.is_file():
        raise DiffoptError(f"there is no file {file}")
    if output is not None:
        _expect(output, ".engine")
    with show.progress(f"finishing {file}") as progress:
        done = engine.finish(file, output, progress=progress)
    written = output or file
    if as_json:
        show.print_json({"file": str(written if done else file), "finished": done})
    elif done:
        print(f"{written}: finished, {written.stat().st_size / 1e6:.1f} MB")
    else:
        print(f"{file}: has nothing left to compile")


@app.command(epilog="diffopt passes\n\ndiffopt passes unroll")
def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass's options.")] = None,
    as_json: Json = False,
) -> None:
    """List the passes, or show one with its options."""
    from diffopt.cli import list as list_command

    list_command.passes(name, as_json)


@app.command(epilog="diffopt targets\n\ndiffopt targets cpu\n\ndiffopt targets h100")
def targets(
    name: Annotated[
        str | None, typer.Argument(help="Show this lowering's options, or describe this device.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List lowerings and devices, or show one: --target is DEVICE:LOWERING, or one of the two."""
    from diffopt.cli import list as list_command

    list_command.targets(name, as_json)


def main() -> None:
    """Run the command line; the exit code is 0, 1 (a check did not hold) or 2 (wrong input)."""
    for name in ("torchao", "torch.utils._pytree"):
        # What binaries torchao lacks here is of no use to whom diffusers imports it for.
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = app(prog_name="diffopt", standalone_mode=False)
    except DiffoptError as error:
        code = 1 if isinstance(error, ToleranceError) else 2
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        print(f"diffopt: error: {error}{notes}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # A wrong option. Its class is click's or typer's own copy of it, by typer's version.
        if not hasattr(error, "format_message"):
            raise
        if error.format_message():  # empty after `diffopt` alone, which prints the help
            print(f"diffopt: error: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _trace(
    model: str,
    settings: list[str] | None = None,
    steps: int | None = None,
    batch: int = 1,
    dynamic: str = "",
) -> Program:
    from diffopt.cli import load_model

    return load_model.trace_model(model, _arguments(settings), steps, batch, dynamic)


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    from diffopt.execution.calibration_inputs import read_prompts

    return read_prompts(file)


def _arguments(settings: list[str] | None) -> dict[str, Any]:
    from diffopt.cli.load_model import read_settings

    return read_settings(settings or ())


def _expect(output: Path, *suffixes: str) -> None:
    if output.suffix not in suffixes:
        wanted = " or ".join(suffixes)
        raise DiffoptError(f"the output's name must end in {wanted}, got '{output}'")
    if not output.parent.is_dir():
        raise DiffoptError(f"there is no folder {output.parent} to write {output.name} into")


if __name__ == "__main__":
    main()
