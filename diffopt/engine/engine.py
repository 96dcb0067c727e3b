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

from diffopt.engine.engine_file import FORMAT, KERNELS, KIND, EngineFile, is_component
from diffopt.errors import DiffoptError
from diffopt.host.inputs import Host
from diffopt.ir import graph as g
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program
from diffopt.lowering import legality
from diffopt.lowering.target import EngineContents, Lowered, Target, parse_target
from diffopt.progress import Progress, silent
from diffopt.storage import container

# What `Program.to_members` returns.
_Saved = tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]


def build(
    program: Program,
    target: Target | str,
    path: str | os.PathLike[str],
    *,
    compress: int | None = None,
    progress: Progress = silent,
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
    progress: Progress = silent,
) -> None:
    """Lower `program` for `target` and write the engine to `path`, as `build` does.

    The target may be another machine's, as `rtx4090:tensorrt` is where there is no GPU.
    """
    target = parse_target(target) if isinstance(target, str) else target
    lacking = target.hardware and legality.unsupported(program, target.hardware)
    if reason := lacking or target.refuses(program):
        raise DiffoptError(f"target {target} cannot take this program: {reason}")
    _expect_writable(path)
    lowered = target.compile(program, progress)
    saved = program.to_members()
    if not lowered.finished and target.unfit(lowered.requires) is None:
        done = target.finish(_image(program, saved, lowered), progress)
        lowered.members |= done.members
        lowered.bodies = _joined(lowered.bodies, done.bodies)
        lowered.finished = True
    progress("writing", None)
    members = _members(saved, lowered)
    manifest = {**_manifest(program, target, lowered, members), "compress": compress}
    _write(path, manifest, members)


def finish(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = silent,
) -> bool:
    """Compile what an engine is to be compiled of on the device that it is for, and keep that.

    One that was finished with another torch or on another GPU is compiled again.

    Args:
        path: An engine that was built where there is no such device. It would compile whenever it
            is loaded for the first time on a machine.
        output: The file to write; None: `path`.
        progress: Called with what is being done and the fraction done, if known.

    Returns:
        Whether there was anything to do, and the file is written.
    """
    output = path if output is None else output
    file = EngineFile(path)
    file.archive.verify()
    target, image = file.target(), file.image(file.program_json())
    if target.is_finished(image):
        return False
    _expect_writable(output)
    done = target.finish(image, progress)
    members: dict[str, container.Buffers] = {
        name: [file.archive.read(name)] for name in file.manifest["members"]
    }
    members |= {KERNELS + name: [content] for name, content in done.members.items()}
    about = _joined(file.manifest["components"], done.bodies)
    progress("writing", None)
    _write(output, {**file.manifest, "components": about, "finished": True}, members)
    return True


def _joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known about each component."""
    return {name: {**about, **after.get(name, {})} for name, about in before.items()}


def _expect_writable(path: str | os.PathLike[str]) -> None:
    """Refuse what cannot be an engine file before anything is compiled."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise DiffoptError(f"{path}: there is no folder {folder}")
    if Path(path).is_dir():
        raise DiffoptError(f"{path}: is a directory; name the engine file to write")


def _write(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    members: Mapping[str, container.Buffers],
) -> None:
    try:
        container.write(path, KIND, manifest, members, manifest["compress"])
    except OSError as error:
        raise DiffoptError(f"{path}: cannot be written: {error.strerror}") from None


def _image(program: Program, saved: _Saved, lowered: Lowered) -> EngineContents:
    data, tensors, _ = saved
    return EngineContents(
        members={name: memoryview(content) for name, content in lowered.members.items()},
        graphs={name: graph for name, graph in data["graphs"].items() if is_component(name)},
        tensors=tensors,
        program=lambda: program,
    )


def _members(saved: _Saved, lowered: Lowered) -> dict[str, container.Buffers]:
    data, tensors, assets = saved
    if lowered.holds_weights:
        outer = [graph for name, graph in data["graphs"].items() if not is_component(name)]
        used = {key for graph in outer for key, _, _ in graph["tensors"].values()}
        used |= {
            data["graphs"][name]["tensors"][part][0] for name, part in lowered.load_time_weights
        }
        tensors = {k: t for k, t in tensors.items() if k in used or k.startswith("sample/")}
    kernels = {KERNELS + name: [content] for name, content in lowered.members.items()}
    return {
        "program.json": [json.dumps(data).encode()],
        **{f"assets/{name}": [content] for name, content in assets.items()},
        **kernels,
        "weights.safetensors": container.pack_tensors(tensors),
    }


def _manifest(
    program: Program,
    target: Target,
    lowered: Lowered,
    members: Mapping[str, container.Buffers],
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
        "finished": lowered.finished,
        "passes": ",".join(record["text"] for record in program.history),
        "records": program.history,
        "inputs": {n.name: format_type(n.meta["val"]) for n in g.placeholders(program.root)},
        "arguments": sorted(program.host.inputs()),
        "batch": program.batch,
        "lengths": {n.text: [n.low, n.high] for n in program.lengths},
        "components": lowered.bodies,
        "releasable": program.releasable(),
    }


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
        tensors: Weights by key. To swap in others, change them in place (but not where
            the target has packed them on loading).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: Target | str | None = None,
        verify: bool = True,
    ) -> None:
        self._file = EngineFile(path)
        self.path = self._file.path
        self.manifest = self._file.manifest
        if verify:
            self._file.archive.verify()
        self.target = self._file.target(target)
        self.tensors = self._file.tensors
        data = self._file.program_json()
        outer = {name: graph for name, graph in data["graphs"].items() if not is_component(name)}
        self._outer = self._file.program({**data, "graphs": outer})
        bodies = self.target.load(self._file.image(data))
        self._plan = self.target.executor(self._outer.root, bodies)

    @functools.cached_property
    def program(self) -> Program:
        """The program that the engine was built from, to look at or to run without a target."""
        if self.manifest["holds_weights"]:
            raise DiffoptError(
                f"{self.path}: target {self.target} keeps the weights in its kernels, so its"
                " program cannot be had; build it again so that it keeps them,"
                f" see `diffopt targets {self.target.name}`"
            )
        return self._file.program(self._file.program_json())

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
        return self._outer.serve_with(self.run, requests)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the flat outputs for flat inputs."""
        return self._plan.run(tensors)

    def verify(self) -> None:
        """Check the file against its checksums, and that it runs on the inputs seen at capture."""
        self._file.archive.verify()
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
