"""Builds engines (one file with everything that a program needs to run), loads and runs them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.engine.engine_file import FORMAT, KERNELS, KIND, EngineFile, is_component
from diffopt.engine.lora import Loras
from diffopt.engine.steps import CALLBACK, OnStep, Preview, Watcher, from_callback
from diffopt.errors import Cancelled, DiffoptError, expect_path, expect_type
from diffopt.host.inputs import Host
from diffopt.ir import graph as g
from diffopt.ir.flat_inputs import FlatInputs
from diffopt.ir.printing import format_type
from diffopt.ir.program import ORIGIN, Program
from diffopt.ir.step_boundaries import Boundary, mark, step_boundaries
from diffopt.lowering import legality
from diffopt.lowering.target import EngineContents, Lowered, Target, parse_target
from diffopt.progress import Progress, silent
from diffopt.storage import container, program_file, signatures

_Saved = tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]
"""The result of `Program.to_members`."""


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
        program: The program.
        target: A target that this machine can run, or its text such as `cpu(threads=2)`.
        path: The file, which is written atomically.
        compress: The level of zstandard, from 1 (fast) to 22 (small), at which members that shrink
            are compressed; these are decompressed on loading, and not mapped. None: none.
        progress: Called with what is being done and the fraction done, if known.
    """
    write(program, target, path, compress=compress, progress=progress)
    engine = load(path, verify=False)
    engine.host.classes = program.host.classes
    return engine


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
    expect_type("program", program, Program, wanted="a Program, as diffopt.trace returns")
    expect_type("target", target, str, Target, wanted="a target or its text, such as 'cpu'")
    expect_path("path", path)
    target = parse_target(target) if isinstance(target, str) else target
    lacking = target.hardware and legality.unsupported(program, target.hardware)
    if reason := lacking or target.refuses(program):
        raise DiffoptError(f"target {target} cannot take this program: {reason}")
    _expect_writable(path)
    lowered = target.compile(program, progress)
    saved = program.to_members()
    if not lowered.finished and target.unfit(lowered.requires) is None:
        finished = target.finish(_contents(program, saved, lowered), progress)
        lowered.members |= finished.members
        lowered.bodies = _merged(lowered.bodies, finished.bodies)
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
    """Compile the rest of an engine on the device that it is for, and write it.

    An engine finished with another torch or on another GPU is compiled again.

    Args:
        path: An engine built where there is no such device, which otherwise compiles when it is
            first loaded on a machine.
        output: The file to write; None: `path`.
        progress: Called with what is being done and the fraction done, if known.

    Returns:
        Whether anything was left to compile; otherwise no file is written.
    """
    output = path if output is None else output
    file = EngineFile(path)
    file.archive.verify()
    target, contents = file.target(), file.contents(file.program_json())
    if target.is_finished(contents):
        return False
    _expect_writable(output)
    finished = target.finish(contents, progress)
    members: dict[str, container.Buffers] = {
        name: [file.archive.read(name)] for name in file.manifest["members"]
    }
    members |= {KERNELS + name: [content] for name, content in finished.members.items()}
    facts = _merged(file.manifest["components"], finished.bodies)
    progress("writing", None)
    _write(output, {**file.manifest, "components": facts, "finished": True}, members)
    return True


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about each component, those of `after` first."""
    return {name: {**facts, **after.get(name, {})} for name, facts in before.items()}


def _expect_writable(path: str | os.PathLike[str]) -> None:
    """Raise a `DiffoptError` for a path that cannot be written, before anything is compiled."""
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


def _contents(program: Program, saved: _Saved, lowered: Lowered) -> EngineContents:
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
        kept = ("sample/", ORIGIN)
        tensors = {k: t for k, t in tensors.items() if k in used or k.startswith(kept)}
    kernels = {KERNELS + name: [content] for name, content in lowered.members.items()}
    return {
        "program.json": [program_file.encoded(data)],
        **{program_file.ASSETS + name: [content] for name, content in assets.items()},
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
        "check": program.check,
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
        "steps": [dataclasses.asdict(boundary) for boundary in step_boundaries(program)],
    }


def _version() -> str:
    try:
        return importlib.metadata.version("diffopt")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load(
    path: str | os.PathLike[str],
    *,
    target: Target | str | None = None,
    verify: bool = True,
    allow_native: bool = True,
    trusted_keys: signatures.Keys | None = None,
) -> Engine:
    """Open an engine file; a damaged or unfit one is a `DiffoptError`.

    Engines of all targets but `eager` hold code for the machine, which runs in this process with
    its rights: open those of people whom you trust, or say so.

    Args:
        path: The file.
        target: The target to run it on instead of the one that it was built for; only `eager` can
            run engines of others.
        verify: Compare every member of the file with its checksum first, which a signature is of:
            with `trusted_keys` it is done in any case.
        allow_native: Whether code for the machine may be loaded; False: such an engine is an error.
        trusted_keys: PEM files with public keys (see `diffopt sign`), one of which must have signed
            the file; None: nobody has to.
    """
    return Engine(
        path, target=target, verify=verify, allow_native=allow_native, trusted_keys=trusted_keys
    )


def _reloaded(
    path: str,
    target: str,
    manifest: str,
    options: Mapping[str, Any],
    loras: Sequence[tuple[str, float, str]] = (),
) -> Engine:
    """Return an engine in another process, of the same file and with the same adapters."""
    engine = Engine(path, target=target, **options)
    if engine._file.digest() != manifest:
        raise DiffoptError(f"{path}: is another file than the engine that was pickled")
    for lora in loras:
        engine.load_lora(*lora)
    return engine


class Engine:
    """A program lowered for one target, ready to run.

    Attributes:
        path: The file.
        manifest: Target, passes, records, versions and members.
        target: The target that runs it.
        tensors: Weights by key. To replace them, change them in place (but not where the target
            packs them on loading).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: Target | str | None = None,
        verify: bool = True,
        allow_native: bool = True,
        trusted_keys: signatures.Keys | None = None,
    ) -> None:
        expect_path("path", path)
        wanted = "a target or its text, such as 'eager'"
        expect_type("target", target, str, Target, type(None), wanted=wanted)
        self._options: dict[str, Any] = {"verify": verify, "allow_native": allow_native}
        self._options["trusted_keys"] = trusted_keys and [os.path.abspath(k) for k in trusted_keys]
        self._file = EngineFile(path)
        self.path = self._file.path
        self.manifest = self._file.manifest
        if verify or trusted_keys is not None:
            signatures.verify(self._file.archive, trusted_keys)
        self.target = self._file.target(target)
        if self.target.is_native and not allow_native:
            raise DiffoptError(
                f"{self.path}: is for target {self.target}, and so has code for this machine, which"
                " allow_native=False forbids; " + self._file.without_native()
            )
        self.tensors = self._file.tensors
        data = self._file.program_json()
        outer = {name: graph for name, graph in data["graphs"].items() if not is_component(name)}
        self._outer = self._file.program({**data, "graphs": outer})
        self._boundaries = [Boundary(**row) for row in self.manifest.get("steps", ())]
        self._preview = Preview(weakref.proxy(self))  # no cycle: memory is freed at once
        self._lock = threading.RLock()
        self._cancels = 0
        self._mark_steps()
        self._bodies = self.target.load(self._file.contents(data))
        self._executor = self.target.executor(self._outer.root, self._bodies)
        root, devices = self._outer.root, self.target.input_devices
        self._flat_inputs = FlatInputs(root, self._outer.batch, self._outer.lengths, devices)

    def _mark_steps(self) -> None:
        with self._file.archive.making(f"member {container.MANIFEST}"):
            mark(self._outer.root, self._boundaries)

    @functools.cached_property
    def program(self) -> Program:
        """The program that the engine was built from."""
        if self.manifest["holds_weights"]:
            raise DiffoptError(
                f"{self.path}: target {self.target} keeps the weights in its kernels, so its"
                " program cannot be had; build it again so that it keeps them,"
                f" see `diffopt targets {self.target.name}`"
            )
        return self._file.program(self._file.program_json())

    @property
    def host(self) -> Host:
        """The host side: from arguments to flat inputs, from flat outputs to the result."""
        return self._outer.host

    @property
    def batch(self) -> tuple[int, int] | None:
        """The fewest and the most requests of one run; None: one. See `Program.batch`."""
        return self._outer.batch

    @property
    def steps(self) -> int:
        """The steps of a run, each an evaluation of the denoiser; 0 without a loop."""
        return len(self._boundaries)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each member in the file, compressed or not."""
        return self._file.parts

    @property
    def inputs(self) -> dict[str, str]:
        """The type of each flat input of `run` by name, in order."""
        return dict(self.manifest["inputs"])

    def __call__(self, *, on_step: OnStep | None = None, **arguments: Any) -> Any:
        """Run the engine as the pipeline was called, and return what the pipeline returns.

        Args:
            on_step: Called with a `steps.Step` after each step of sampling; False ends the run.
            **arguments: Those of the pipeline's call: `prompt`, `generator`, `latents`, …; `seed`
                stands for a generator; `output_type` is "pil", "np" or "pt". diffusers'
                `callback_on_step_end` is called with the engine in place of the pipeline.

        Raises:
            Cancelled: `on_step` returned False, or `cancel` was called.
        """
        callback = from_callback(self, arguments)
        if callback is not None and on_step is not None:
            raise DiffoptError(f"on_step and {CALLBACK}: give one of the two")
        return self.serve([arguments], on_step=on_step or callback)[0]

    def serve(
        self, requests: Sequence[Mapping[str, Any]], *, on_step: OnStep | None = None
    ) -> list[Any]:
        """Run the engine for the arguments of several calls, and return their results in order.

        As many requests run at once as it was built for; calls of several threads wait for each
        other. `on_step` is called after each step of each run.
        """
        run = functools.partial(self._run, on_step=on_step, cancels=self._cancels)
        with self._lock:
            return self._outer.serve_with(run, requests)

    def cancel(self) -> None:
        """End all calls that have begun, in this thread and others, after the step they are in.

        Each raises a `Cancelled`. A run that is one CUDA graph ends when it is done.
        """
        self._cancels += 1

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """Return the flat outputs of a request as the pipeline returns them, pictures by PIL."""
        return self._outer.pack(tensors, "pil" if self.converts("pil") else None)

    def converts(self, output_type: str) -> bool:
        """Tell whether the result can be had as this `output_type`."""
        return self._outer.converts(output_type)

    def run(self, tensors: Sequence[Tensor], *, on_step: OnStep | None = None) -> list[Tensor]:
        """Return the flat outputs for flat inputs; others than `inputs` are a `DiffoptError`.

        `on_step` is called as in a call of the engine.
        """
        return self._run(tensors, on_step, self._cancels)

    def _run(self, tensors: Sequence[Tensor], on_step: OnStep | None, cancels: int) -> list[Tensor]:
        """Run the graph; calls that began before the last of `cancels` end."""
        if on_step is not None and not self._boundaries:
            raise DiffoptError(
                f"{self.path}: on_step has no step to be called after: no component is called in"
                " several steps, or an earlier version built the engine"
            )

        def is_cancelled() -> bool:
            return self._cancels != cancels

        with self._lock:
            self._file.archive.expect_unchanged()
            if is_cancelled():
                raise Cancelled("cancelled before the first step")
            checked = self._flat_inputs.checked(tensors)
            if on_step is None and not self._executor.is_stepwise:
                return self._executor.run(checked)
            watcher = Watcher(self._preview, self._boundaries, on_step, is_cancelled)
            return self._executor.run(checked, watcher)

    @functools.cached_property
    def _loras(self) -> Loras:
        if self.manifest["holds_weights"] or not self.target.reads_weights:
            raise DiffoptError(
                f"{self.path}: target {self.target} has the weights in its kernels, and so takes no"
                f" LoRA; see `diffopt targets {self.target.name}`, or fuse it into the pipeline and"
                " build the engine again"
            )
        engine = weakref.proxy(self)
        return Loras(self._file, lambda graph: engine._computed(graph))

    @property
    def loras(self) -> dict[str, float]:
        """The scale of each loaded LoRA by name, in the order in which they were loaded."""
        return self._loras.scales if "_loras" in vars(self) else {}

    def load_lora(
        self, path: str | os.PathLike[str], scale: float = 1.0, name: str | None = None
    ) -> None:
        """Add a LoRA's change to the weights, in this process and not in the file.

        Several add up. Nothing is compiled; what the target makes of weights on loading is made
        again.

        Args:
            path: A safetensors file with the names of diffusers, PEFT or kohya, or the folder of
                one that diffusers or PEFT has saved.
            scale: What its change is multiplied by.
            name: By which to change it later; None: the file's, without its suffix.

        Raises:
            DiffoptError: It changes what this engine cannot change. Nothing is changed then.
        """
        expect_path("path", path)
        with self._lock:
            self._follow(self._loras.load(path, scale, name))

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change what the change of a loaded LoRA is multiplied by."""
        with self._lock:
            self._follow(self._loras.set_scale(name, scale))

    def unload_lora(self, name: str | None = None) -> None:
        """Take off a LoRA, or all; without any, each weight has the bits that it had before."""
        with self._lock:
            self._follow(self._loras.unload(name))

    def _computed(self, graph: fx.GraphModule) -> Tensor:
        """Return the result of an outer graph without inputs."""
        return self.target.executor(graph, self._bodies).run([])[0]

    def _follow(self, changed: set[str]) -> None:
        """Load again what was made of weights that have changed in place, and of constants."""
        data = self._file.program_json() if changed else {}
        self._reload(data, changed)
        self._reload(data, self._loras.refresh())

    def _reload(self, data: Mapping[str, Any], changed: set[str]) -> None:
        if not changed:
            return
        outer = {name: graph for name, graph in data["graphs"].items() if not is_component(name)}
        if not changed.isdisjoint(key for key, _, _ in outer[""]["tensors"].values()):
            self._outer.root = self._file.program({**data, "graphs": outer}).root
            self._mark_steps()
        contents = self._file.contents(data)
        if any(contents.reading(changed)):
            self._bodies = self.target.reload(contents, self._bodies, changed)
        self._executor = self.target.executor(self._outer.root, self._bodies)
        vars(self).pop("program", None)

    def verify(self) -> None:
        """Raise a `DiffoptError` for a damaged file, or infinite outputs for the sample inputs."""
        self._file.archive.verify()
        self._outer.expect_finite(self.run, str(self.path))

    def check(self, /, **arguments: Any) -> None:
        """Raise the `DiffoptError` that a call with these arguments would, without running it."""
        self._outer.prepare(**arguments)

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Return the width and height of each picture that a call returns."""
        return self._outer.picture_sizes()

    def digest(self) -> str:
        """Return a hash of the manifest, and so of everything in the file."""
        return self._file.digest()

    def __reduce__(self) -> Any:
        """Pickle the path of the file, which another process maps, too, and those of adapters."""
        arguments = os.path.abspath(self.path), str(self.target), self._file.digest()
        loras = self._loras.arguments if self.loras else []
        return _reloaded, (*arguments, self._options, loras)

    def __repr__(self) -> str:
        size = sum(self.parts.values())
        arguments = ", ".join(self.manifest["arguments"])
        passes = self.manifest["passes"] or "none"
        return (
            f"<Engine {self.path}: target {self.manifest['target']}, passes {passes},"
            f" {size / 1e6:.1f} MB, takes {arguments}>"
        )
