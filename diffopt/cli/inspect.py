"""`diffopt inspect` and `diffopt verify`: the contents of a file, and whether it is intact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from diffopt.analysis import weight_memory
from diffopt.cli import heatmap, image_files
from diffopt.cli import output as show
from diffopt.core import Record
from diffopt.engine import engine, picture_record
from diffopt.engine.engine_file import EngineFile
from diffopt.errors import DiffoptError, VerifyError, printable
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.flops import graph_flops
from diffopt.ir.printing import format_graph, format_type
from diffopt.ir.program import Program
from diffopt.lowering import roofline
from diffopt.lowering.hardware import Hardware
from diffopt.spec import suggest
from diffopt.storage import program_file, signatures


def open_engine(file: str) -> tuple[Program, dict[str, int]]:
    """Return the program in an engine file, and the bytes of each member of the file."""
    opened = EngineFile(file)  # it may be another machine's, and none of its code is loaded
    opened.archive.verify()
    if opened.manifest["holds_weights"]:
        raise DiffoptError(
            f"{file}: target {opened.manifest['target']} keeps the weights in its kernels, so its"
            " program cannot be had; inspect the program that it was built from"
        )
    return opened.program(opened.program_json()), opened.parts


def graph_text(program: Program, name: str) -> str:
    """Return the text of a component's graph, or of the root graph, called `program`."""
    graphs = {"program": program.root, **program.components}
    if name not in graphs:
        raise DiffoptError(f"there is no component '{name}'{suggest(name, graphs)}")
    return format_graph(graphs[name])


def print_record(file: str, as_json: bool) -> None:
    """Print what made a picture."""
    told = picture_record.read(file)
    if as_json:
        show.print_json(told)
        return
    for name, value in told.items():
        print(printable(f"{name}: {value}"))


def save_picture(program: Program, output: Path) -> None:
    """Draw which blocks each step computes into a file."""
    image_files.save_picture(heatmap.draw(program), output)
    show.stderr().print(f"wrote {output}")


def inspect(
    program: Program, title: str, as_json: bool, stats: bool, parts: Mapping[str, int]
) -> None:
    """Print the inputs, the components, the calls in order, and the steps of the calls.

    Args:
        program: The program.
        title: The name of its file or model.
        as_json: Print JSON.
        stats: Print the notes of each pass, too.
        parts: The bytes of each member of an engine file.
    """
    components = [_component(program, name) for name in program.components]
    inputs = {n.name: format_type(n.meta["val"]) for n in g.placeholders(program.root)}
    calls = [str(node.target) for node in program.calls()]
    tags = [call_tags.tag(node) for node in program.calls()]
    size = weight_memory.of_program(program)
    if as_json:
        show.print_json(
            {
                "source": program.source,
                "arguments": program.host.bindings(),
                "check": program.check,
                "inputs": inputs,
                "components": components,
                "calls": calls,
                "tags": [tag and asdict(tag) for tag in tags],
                "flops": program.flops(),
                "bytes": g.tensor_bytes(program.weights().values()),
                "weights": size.to_json(),
                "file": dict(parts),
                "passes": program.history,
            }
        )
        return
    columns = ["component", "calls", "nodes", "parameters", "bytes", "of fp16", "FLOPs a call"]
    columns.append("FLOPs")
    rows = [_component_row(row) for row in components]
    show.table(f"{title}: {show.count(program.flops())} FLOPs a run", columns, rows)
    _size_tables(size, parts)
    print_arguments(program)
    show.table("inputs", ["input", "type"], [[name, kind] for name, kind in inputs.items()])
    show.stdout().print("calls: " + ", ".join(_runs(calls)), markup=False)
    show.table("steps", ["call", "component", "branch", "steps"], _steps(calls, tags))
    if program.history:
        records = [Record.from_json(row) for row in program.history]
        show.records_table(records, timing=True, stats=stats)
        if not stats:
            show.step_maps(records)


def print_arguments(program: Program) -> None:
    """Print which arguments of the captured call are inputs, and to what the others are bound."""
    if bindings := program.host.bindings():
        show.table("arguments of the captured call", ["argument", "is", "at capture"], bindings)
    if program.check:
        show.stdout().print(f"capture: {program.check}", markup=False)


def print_roofline(program: Program, title: str, hardware: Hardware, as_json: bool) -> None:
    """Print the least time of each component on a device; see `diffopt.lowering.roofline`."""
    times = roofline.roofline(program, hardware)
    if as_json:
        show.print_json(times.to_json())
        return
    columns = ["component", "calls", "steps", "FLOPs a call", "bytes a call", "bound by"]
    columns += ["a call", "at least", "a run"]
    cores = f", {hardware.cores} cores" if hardware.cores else ""
    summary = f"{_time(times.seconds)} a run predicted, {_time(times.limit)} at least"
    rows = list(map(_roofline_row, times.rows))
    show.table(f"{title} on {hardware.name}{cores}: {summary}", columns, rows)
    weights = f"weights {times.weights / 1e6:.1f} MB of {hardware.memory / 1e9:.4g} GB memory"
    show.stdout().print(weights + ("" if times.weights < hardware.memory else ": they do not fit"))


def _roofline_row(row: roofline.Row) -> list[str]:
    flops = ", ".join(f"{show.count(count)} {number}" for number, count in row.flops.items())
    left = [row.component, str(row.calls), _ranges(list(row.steps)), flops, show.count(row.bytes)]
    return [*left, row.bound, *map(_time, (row.seconds, row.limit, row.calls * row.seconds))]


def _time(seconds: float) -> str:
    for unit in ("s", "ms", "µs"):
        if seconds >= 1:
            return f"{seconds:.3g} {unit}"
        seconds *= 1000
    return f"{seconds:.3g} ns"


def _component_row(row: dict[str, Any]) -> list[str]:
    counts = [show.count(row[key]) for key in ("calls", "nodes", "parameters", "bytes")]
    ratio = "" if row["fp16 bytes"] == 0 else f"{100 * row['bytes'] / row['fp16 bytes']:.0f} %"
    return [row["name"], *counts, ratio, show.count(row["flops"]), show.count(row["total"])]


def _size_tables(size: weight_memory.Footprint, parts: Mapping[str, int]) -> None:
    """Print the bytes of weights by format, and of the file by kind of member."""
    rows = [[n, show.count(size.elements[n]), show.count(size.bytes[n])] for n in size.bytes]
    show.table(str(size), ["format", "numbers", "bytes"], rows)
    totals: dict[str, int] = {}
    for name, count in parts.items():
        kind = name.partition("/")[0].partition(".")[0]
        totals[kind] = totals.get(kind, 0) + count
    if totals:
        rows = [[name, show.count(count)] for name, count in totals.items()]
        show.table(f"file: {sum(totals.values()) / 1e6:.1f} MB", ["part", "bytes"], rows)


def _component(program: Program, name: str) -> dict[str, Any]:
    body = program.components[name]
    size = weight_memory.of_graphs([body])
    calls = len(program.calls(name))
    flops = graph_flops(body)
    return {
        "name": name,
        "calls": calls,
        "nodes": len(body.graph.nodes),
        "parameters": sum(size.elements.values()),
        "bytes": size.total,
        "fp16 bytes": size.fp16,
        "flops": flops,
        "total": calls * flops,
    }


def _runs(calls: list[str]) -> list[str]:
    """Return runs of equal calls as text: text_encoder, 25× unet, vae_decode."""
    runs = [(name, len(list(group))) for name, group in groupby(calls)]
    return [name if times == 1 else f"{times}× {name}" for name, times in runs]


def _steps(calls: list[str], tags: list[call_tags.Tag | None]) -> list[list[str]]:
    """Return a row with the steps for each called body, component and branch."""
    steps: dict[tuple[str, str, int], list[int]] = {}
    for name, tag in zip(calls, tags, strict=True):
        if tag is not None:
            steps.setdefault((name, tag.component, tag.branch), []).append(tag.step)
    return [
        [name, component, str(branch), _ranges(sorted(numbers))]
        for (name, component, branch), numbers in steps.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as text with ranges: 0, 2-4."""
    # A number minus its index is constant within a range.
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ranges = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)


def sign(file: Path, key: Path, output: Path) -> None:
    """Write a signed copy of a file."""
    is_program = file.suffix == ".program"
    archive = program_file.read(file) if is_program else EngineFile(file).archive
    try:
        signatures.sign(archive, key, output)
    except OSError as error:
        raise DiffoptError(f"{output}: cannot be written: {error.strerror}") from None


def _check_program(file: Path, trusted_keys: Sequence[str] | None, run: bool) -> None:
    program = Program.load(file, trusted_keys=trusted_keys)
    assert program.file is not None
    with program.file.making("member program.json"):
        program.verify()
        if run:
            program.expect_finite(program.run, str(file))


def problem(file: Path, trusted_keys: Sequence[str] = (), *, run: bool = False) -> str | None:
    """Return the problem of a file in one line, or None.

    Args:
        file: A program or an engine, whose code is not loaded.
        trusted_keys: Files of keys, one of which must have signed it; empty: nobody has to.
        run: Load an engine after all, and run it, or the program, on its sample inputs.
    """
    try:
        if file.suffix == ".program":
            _check_program(file, trusted_keys or None, run)
        else:
            opened = EngineFile(file)
            signatures.verify(opened.archive, trusted_keys or None)
            opened.check()
            if run:
                engine.load(file, verify=False).verify()
    except (DiffoptError, VerifyError) as error:
        return printable(str(error))
    return None
