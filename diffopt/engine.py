"""The engine: one file with all that a program needs to run, and the object that runs it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt import archive, batching, formats
from diffopt import graph as g
from diffopt import program as p
from diffopt.core import Progress
from diffopt.errors import DiffoptError
from diffopt.host import Host
from diffopt.program import Program
from diffopt.target import Image, Lowered, Target, parse_target

FORMAT = f"1.{p.FORMAT}"
"""Of the file, then of the program in it."""
KIND = "application/x-diffopt-engine"
HINT = "build one with `diffopt optimize MODEL -o FILE.engine`"


def build(
    program: Program,
    target: Target | str,
    path: str | os.PathLike[str],
    *,
    compress: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Engine:
    """Lower `program` for `target`, write the engine to `path`, and return it loaded.

    Args:
        program: What to build.
        target: A target that this machine can run, or its text such as `cpu(threads=2)`.
        path: The file; it has the whole engine or what it had before, never a part.
        compress: The level of zstandard, from 1 (fast) to 22 (small), to compress parts of the file
            with that get smaller; they are decompressed on loading, and not mapped. None: no part.
        progress: Called with what is being done and the fraction done, if known.
    """
    write(program, target, path, compress=compress, progress=progress)
    return load(path, verify=False)


def write(
    program: Program,
    target: Target | str,
    path: str | os.PathLike[str],
    *,
    compress: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> None:
    """Lower `program` for `target` and write the engine to `path`, as `build` does.

    The target may be another machine's, as `rtx4090:tensorrt` is where there is no GPU.
    """
    target = parse_target(target) if isinstance(target, str) else target
    lacking = target.hardware and formats.refused(program, target.hardware)
    if reason := lacking or target.refuses(program):
        raise DiffoptError(f"target {target} cannot take this program: {reason}")
    folder = Path(path).parent
    if not folder.is_dir():
        raise DiffoptError(f"{path}: there is no folder {folder}")
    if Path(path).is_dir():
        raise DiffoptError(f"{path}: is a directory; name the engine file to write")
    lowered = target.compile(program, progress)
    progress("writing", None)
    members = _members(program, lowered)
    try:
        manifest = _manifest(program, target, lowered, members)
        archive.write(path, KIND, manifest, members, compress)
    except OSError as error:
        raise DiffoptError(f"{path}: cannot be written: {error.strerror}") from None


def _members(program: Program, lowered: Lowered) -> dict[str, archive.Buffers]:
    data, tensors, assets = program.to_members()
    if lowered.holds_weights:
        outer = [graph for name, graph in data["graphs"].items() if not _is_component(name)]
        used = {key for graph in outer for key, _, _ in graph["tensors"].values()}
        used |= {data["graphs"][name]["tensors"][part][0] for name, part in lowered.reads}
        tensors = {k: t for k, t in tensors.items() if k in used or k.startswith("sample/")}
    kernels = {f"kernels/{name}": [content] for name, content in lowered.members.items()}
    return {
        "program.json": [json.dumps(data).encode()],
        **{f"assets/{name}": [content] for name, content in assets.items()},
        **kernels,
        "weights.safetensors": archive.pack_tensors(tensors),
    }


def _manifest(
    program: Program,
    target: Target,
    lowered: Lowered,
    members: Mapping[str, archive.Buffers],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": {
            "diffopt": _version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "source": program.source,
        "digests": program.digests,
        "target": str(target),
        "lowering": target.name,
        "requires": lowered.requires,
        "holds_weights": lowered.holds_weights,
        "passes": ",".join(record["text"] for record in program.history),
        "records": program.history,
        "inputs": {n.name: g.type_text(n.meta["val"]) for n in g.placeholders(program.root)},
        "arguments": sorted(program.host.inputs()),
        "batch": program.batch,
        "lengths": {n.text: [n.low, n.high] for n in program.lengths},
        "components": lowered.bodies,
        "releasable": program.releasable(),
    }


def _is_component(name: str) -> bool:
    """Tell a component's graph from the outer one, called "", and from helpers in parentheses."""
    return bool(name) and not name.startswith("(")


def _version() -> str:
    try:
        return importlib.metadata.version("diffopt")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load(
    path: str | os.PathLike[str], *, target: Target | str | None = None, verify: bool = True
) -> Engine:
    """Open an engine file; whatever is wrong with it is one `DiffoptError`.

    Args:
        path: The file.
        target: What to run it on instead of what it was built for; only `eager` can run what
            another target has built.
        verify: Compare every part of the file with its checksum first.
    """
    return Engine(path, target=target, verify=verify)


class Engine:
    """A program lowered for one target, ready to run.

    Attributes:
        path: The file that it is in.
        manifest: What the file says about itself: target, passes, records, versions, members.
        target: What runs it.
        tensors: Weights by key. To swap in others, change them in place.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: Target | str | None = None,
        verify: bool = True,
    ) -> None:
        self.path = Path(path)
        self._archive = archive.Archive(path, KIND, "an engine file", HINT)
        self.manifest = self._archive.manifest
        self._check_format()
        if verify:
            self._archive.verify()
        self.target = self._choose_target(target)
        self.tensors = self._archive.tensors("weights.safetensors")
        data = self._read_program()
        graphs = data["graphs"]
        outer = {name: graph for name, graph in graphs.items() if not _is_component(name)}
        self._outer = self._program({**data, "graphs": outer})
        bodies = {name: graph for name, graph in graphs.items() if _is_component(name)}
        self._plan = self.target.outer(self._outer.root, self.target.load(self._image(bodies)))

    def _check_format(self) -> None:
        found = self.manifest.get("format")
        if found != FORMAT:
            raise DiffoptError(
                f"{self.path}: engine format {found}, this diffopt reads {FORMAT};"
                " build it again with this version"
            )

    def _choose_target(self, wanted: Target | str | None) -> Target:
        text = str(self.manifest["target"])
        target = parse_target(wanted) if isinstance(wanted, str) else wanted
        # Engines of earlier versions were built for lowerings that no device was named for.
        built_for = self.manifest.get("lowering") or text.partition("(")[0]
        if target is not None and target.name not in (built_for, "eager"):
            raise DiffoptError(
                f"{self.path}: built for target {text}, not {target}; build it again for {target}"
            )
        if target is not None and target.name != built_for and self.manifest["holds_weights"]:
            raise DiffoptError(
                f"{self.path}: target {text} keeps the weights in its kernels, so {target} cannot"
                f" run it; build it again so that it keeps them, see `diffopt targets {built_for}`"
            )
        if target is None or target.name == built_for:
            # What it was built with, and not the options asked for now: the kernels are there.
            target = self._parse_own_target(text)
        if target.name == built_for and (reason := target.unfit(self.manifest["requires"])):
            instead = "" if self.manifest["holds_weights"] else ', or load it with target="eager"'
            raise DiffoptError(f"{self.path}: {reason}; build it again for this machine{instead}")
        return target

    def _parse_own_target(self, text: str) -> Target:
        try:
            return parse_target(text)
        except DiffoptError as error:
            raise DiffoptError(
                f"{self.path}: built for target {text}, and {error.message}; install what adds it,"
                ' or load the engine with target="eager"'
            ) from None

    def _read_program(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(bytes(self._archive.read("program.json")))
        return data

    def _program(self, data: Mapping[str, Any]) -> Program:
        names = self._archive.names("assets/")
        assets = {n.removeprefix("assets/"): bytes(self._archive.read(n)) for n in names}
        return Program.from_members(data, self.tensors, assets)

    def _image(self, graphs: Mapping[str, Any]) -> Image:
        return Image(
            members={
                name.removeprefix("kernels/"): self._archive.read(name)
                for name in self._archive.names("kernels/")
            },
            graphs=graphs,
            tensors=self.tensors,
            program=lambda: self.program,
        )

    @functools.cached_property
    def program(self) -> Program:
        """The program that the engine was built from, to look at or to run without a target."""
        if self.manifest["holds_weights"]:
            raise DiffoptError(
                f"{self.path}: target {self.target} keeps the weights in its kernels, so its"
                " program cannot be had; build it again so that it keeps them,"
                f" see `diffopt targets {self.target.name}`"
            )
        return self._program(self._read_program())

    @property
    def host(self) -> Host:
        """How the caller's arguments become flat inputs, and flat outputs the result."""
        return self._outer.host

    @property
    def batch(self) -> tuple[int, int] | None:
        """The fewest and the most requests that one run serves; None: one, see `Program.batch`."""
        return self._outer.batch

    @property
    def parts(self) -> dict[str, int]:
        """The bytes that each part takes in the file, compressed or not."""
        table = self.manifest["members"]
        return {name: entry.get("zstd", entry["size"]) for name, entry in table.items()}

    @property
    def inputs(self) -> dict[str, str]:
        """The flat inputs of `run` in order, each with its type."""
        return dict(self.manifest["inputs"])

    def __call__(self, **arguments: Any) -> Any:
        """Run the engine as the pipeline was called, and return what the pipeline returns.

        Args:
            **arguments: What the pipeline's call takes: `prompt`, `generator`, `latents`, …; `seed`
                stands for a generator; `output_type` is "pil", "np" or "pt".
        """
        return self.serve([arguments])[0]

    def serve(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run the engine for several calls, as many at once as it was built for.

        Args:
            requests: The arguments of each call.

        Returns:
            What each call returns, in order.
        """
        return batching.serve(self._outer, self.run, requests)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the flat outputs for flat inputs."""
        return self._plan.run(tensors)

    def verify(self) -> None:
        """Check the file against its checksums, and that it runs on the inputs seen at capture."""
        self._archive.verify()
        for count in self._outer.batch or (None,):
            for index, output in enumerate(self.run(self._outer.sample_inputs(count))):
                if output.is_floating_point() and not output.isfinite().all():
                    raise DiffoptError(
                        f"{self.path}: output {index} is not finite on the sample inputs"
                    )

    def __repr__(self) -> str:
        size = sum(self.parts.values())
        arguments = ", ".join(self.manifest["arguments"])
        passes = self.manifest["passes"] or "none"
        return (
            f"<Engine {self.path}: target {self.manifest['target']}, passes {passes},"
            f" {size / 1e6:.1f} MB, takes {arguments}>"
        )
