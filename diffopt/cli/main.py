"""The command line."""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffopt.cli.flags import (
    MODEL_HELP,
    BenchFlags,
    CompareFlags,
    Json,
    OptimizeFlags,
    RunFlags,
    SensitivityFlags,
    ServeFlags,
    Stats,
    TraceFlags,
    TrustedKeys,
    with_flags,
)
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
@with_flags(TraceFlags)
def trace(flags: TraceFlags) -> None:
    """Capture a pipeline's whole call as a program file."""
    from diffopt.cli import inspect as inspect_command
    from diffopt.cli import output as show

    output = flags.output
    _expect(output, ".program")
    with show.progress(f"tracing {flags.model}"):
        call = flags.steps, flags.batch, flags.dynamic, flags.check
        program = _trace(flags.model, flags.settings, *call, dtype=flags.dtype)
        program.save(output)
    inspect_command.print_arguments(program)
    calls = len(program.calls())
    show.stderr().print(f"wrote {output}: {len(program.components)} components, {calls} calls")


@app.command(
    epilog='diffopt optimize MODEL -p "unroll(steps=25),hoist,simplify,fuse" -o out.engine\n\n'
    'diffopt optimize in.program --passes "cache(auto,budget=0.02)" --stats -o out.program\n\n'
    "diffopt passes  lists the passes; an output named .program is not lowered to a target."
)
@with_flags(OptimizeFlags)
def optimize(flags: OptimizeFlags) -> None:
    """Trace a model, run passes over it, check each, and build one engine file."""
    from diffopt.analysis import weight_memory
    from diffopt.cli import load_model
    from diffopt.cli import optimize as optimize_command
    from diffopt.cli import output as show

    output = flags.output
    _expect(output, ".engine", ".program")
    job = optimize_command.Job.parse(flags)
    prompts = _prompts(flags.calibrate)
    settings = _arguments(flags.settings)
    phases = show.Phases()
    with phases("load"), show.progress(f"loading {flags.model}"):
        model = load_model.load_model(flags.model, flags.dtype)
    with phases("capture"), show.progress(f"tracing {flags.model}"):
        call = load_model.TracedCall(settings, flags.steps, job.batch, flags.dynamic, flags.check)
        program = load_model.traced(model, call, flags.model)
        del model
    if flags.bisect is not None:
        raise typer.Exit(optimize_command.find_culprit(job.pipeline, program, flags, prompts))
    with phases("passes"):
        program, records = optimize_command.rewrite(job.pipeline, program, flags, prompts)
    with phases("build"):
        optimize_command.write(job, program, output)
    size = weight_memory.of_program(program)
    if flags.as_json:
        rows = [asdict(record) for record in records]
        result = {"output": str(output), "passes": rows, "weights": size.to_json()}
        show.print_json({**result, "phases": phases.to_json()})
    elif records:
        show.records_table(records, timing=flags.timing, stats=flags.stats)
    if flags.timing and not flags.as_json:
        show.stderr().print(str(phases))
    show.stderr().print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB), {size}")


@app.command(
    epilog='diffopt run out.engine --prompt "ankle boot" --seed 0 -n 8 -o boots.png\n\n'
    "diffopt run dit.engine --set class_labels=[3] -o dress.pt"
)
@with_flags(RunFlags)
def run(flags: RunFlags) -> None:
    """Run an engine and write what it makes."""
    from diffopt.cli import output as show
    from diffopt.cli import run as run_command

    names = ("prompt", "negative_prompt", "guidance_scale")
    named = {name: getattr(flags, name) for name in names}
    arguments = _merged(flags.settings, {**named, "seed": flags.seed})
    seed = arguments.pop("seed", None)
    with show.progress(f"loading {flags.engine}") as progress:
        count = run_command.run(flags, arguments, seed, progress)
    show.stderr().print(f"wrote {flags.output} ({count})")


@app.command(
    epilog="diffopt serve out.engine --port 8000\n\n"
    "diffopt serve many.engine edits.engine --max-wait-ms 20 --token-file token.txt\n\n"
    "diffopt serve out.engine --dry-run"
)
@with_flags(ServeFlags)
def serve(flags: ServeFlags) -> None:
    """Serve engines over HTTP, as OpenAI's image API."""
    from diffopt.cli import serve as serve_command

    serve_command.run(flags)


@app.command(
    epilog="diffopt bench out.engine --against eager,compile\n\n"
    "diffopt bench fast.engine --against eager,exact.engine --rounds 20 --json"
)
@with_flags(BenchFlags)
def bench(flags: BenchFlags) -> None:
    """Time an engine against the original pipeline, and compare their images."""
    from diffopt.cli import bench as bench_command

    arguments = _merged(flags.settings, {"prompt": flags.prompt, "seed": flags.seed})
    del arguments["seed"]
    bench_command.run(flags, arguments)


@app.command(
    epilog='diffopt compare exact.engine cached.engine --prompt "ankle boot" -n 4 -o grid.png\n\n'
    "diffopt compare a.program b.engine c.engine --prompts prompts.txt --json -o grid.png"
)
@with_flags(CompareFlags)
def compare(flags: CompareFlags) -> None:
    """Show images of several engines side by side, and how far they are from the first one's."""
    from diffopt.cli import compare as compare_command

    prompts = [*(flags.prompt or ()), *_prompts(flags.prompts)]
    arguments = _merged(flags.settings, {"prompt": prompts or None, "seed": flags.seed})
    if prompts:
        del arguments["prompt"]
    seed = arguments.pop("seed", None)
    compare_command.run(flags, prompts, arguments, seed)


@app.command(
    epilog="diffopt inspect fashion.program\n\ndiffopt inspect out.engine --json\n\n"
    "diffopt inspect cached.program --picture heat.png\n\n"
    "diffopt inspect pruned.program --stats\n\n"
    "diffopt inspect fashion.program --target h100\n\n"
    "diffopt inspect boot.png  # the prompt, the seed, the engine"
)
def inspect(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help=f"An .engine file, a .png of ours, or {MODEL_HELP}"),
    ],
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
    """Show what a program or an engine consists of, what each step calls, or what made a PNG."""
    from diffopt.cli import image_files
    from diffopt.cli import inspect as inspect_command
    from diffopt.lowering.target import parse_hardware

    if file.endswith(".png"):
        inspect_command.print_record(file, as_json)
        return
    hardware = None if target is None else parse_hardware(target)
    if picture is not None:
        _expect(picture, *image_files.PICTURES)
    parts: dict[str, int] = {}
    if file.endswith(".engine"):
        program, parts = inspect_command.open_engine(file)
    else:
        program = _trace(file, check=False)
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
@with_flags(SensitivityFlags)
def sensitivity(flags: SensitivityFlags) -> None:
    """Measure which layer, in which format and at which step, costs how much accuracy."""
    from diffopt.cli import image_files
    from diffopt.cli import output as show
    from diffopt.cli import sensitivity as sensitivity_command

    if flags.output is not None:
        _expect(flags.output, *image_files.PICTURES)
    job = sensitivity_command.Job.parse(flags)
    prompts = _prompts(flags.calibrate)
    with show.progress(f"tracing {flags.model}"):
        program = _trace(flags.model, flags.settings, flags.steps)
    with show.progress("measuring") as progress:
        report = sensitivity_command.measure(
            program, job, prompts, flags.samples, flags.seed, progress
        )
    if flags.output is not None:
        sensitivity_command.save_picture(report, flags.output)
    sensitivity_command.print_report(report, flags.as_json)


@app.command(
    epilog="diffopt verify out.engine  # exit code 1 if it is damaged\n\n"
    "diffopt verify out.engine --run\n\ndiffopt verify out.engine --trusted-key key.pub.pem"
)
def verify(
    file: Annotated[Path, typer.Argument(help="An .engine or .program file.")],
    run: Annotated[
        bool, typer.Option("--run", help="Load it, and run it on its sample inputs, too.")
    ] = False,
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Check a file: checksums, graphs, types. Nothing in it is run, unless you say so."""
    from diffopt.cli import inspect as inspect_command
    from diffopt.cli import output as show

    if not file.is_file():
        raise DiffoptError(f"there is no file {file}")
    problem = inspect_command.problem(file, trusted_key or [], run=run)
    if as_json:
        show.print_json({"file": str(file), "ok": problem is None, "problem": problem})
    elif problem is None:
        print(f"{file}: ok")
    else:
        print(f"diffopt: error: {problem}", file=sys.stderr)
    raise typer.Exit(0 if problem is None else 1)


@app.command(
    epilog="openssl genpkey -algorithm ed25519 -out key.pem\n\n"
    "openssl pkey -in key.pem -pubout -out key.pub.pem\n\n"
    "diffopt sign out.engine --key key.pem\n\n"
    "diffopt run out.engine --trusted-key key.pub.pem"
)
def sign(
    file: Annotated[Path, typer.Argument(help="An .engine or .program file.")],
    key: Annotated[Path, typer.Option(metavar="PEM", help="Your private key, of Ed25519.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; none: FILE itself.")
    ] = None,
) -> None:
    """Sign a file, so that those who have your public key know that it is yours."""
    from diffopt.cli import inspect as inspect_command

    if not file.is_file():
        raise DiffoptError(f"there is no file {file}")
    inspect_command.sign(file, key, output or file)
    print(f"signed {output or file}")


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


_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
)


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
    except OSError as error:
        # Of the disk, which is nobody's fault but the user's to mend; others are faults of ours.
        if error.errno not in _OF_THE_DISK:
            raise
        name = f"{error.filename}: " if error.filename else ""
        print(f"diffopt: error: {name}{error.strerror}", file=sys.stderr)
        code = 2
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
    check: bool | None = None,
    dtype: str = "fp32",
) -> Program:
    from diffopt.cli import load_model

    call = load_model.TracedCall(_arguments(settings), steps, batch, dynamic, check)
    return load_model.trace_model(model, call, dtype)


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    from diffopt.execution.calibration_inputs import read_prompts

    return read_prompts(file)


def _arguments(settings: list[str] | None) -> dict[str, Any]:
    from diffopt.cli.load_model import read_settings

    return read_settings(settings or ())


def _merged(settings: list[str] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `--set` and those of flags of their own, each given once."""
    arguments = _arguments(settings)
    given = {name: value for name, value in named.items() if value is not None}
    for name in sorted(arguments.keys() & given.keys()):
        flag = name.replace("_", "-")
        raise DiffoptError(f"{name} is given by --{flag} and by --set {name}=: give one of the two")
    return arguments | given


def _expect(output: Path, *suffixes: str) -> None:
    if output.suffix not in suffixes:
        wanted = " or ".join(suffixes)
        raise DiffoptError(f"the output's name must end in {wanted}, got '{output}'")
    if not output.parent.is_dir():
        raise DiffoptError(f"there is no folder {output.parent} to write {output.name} into")


if __name__ == "__main__":
    main()
