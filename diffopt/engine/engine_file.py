"""Reads and checks engine files, without running them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.ir.program import FORMAT as PROGRAM_FORMAT
from diffopt.ir.program import Program
from diffopt.lowering.target import EngineContents, Target, parse_target
from diffopt.storage import container, file_schema, program_file

FORMAT = f"1.{PROGRAM_FORMAT}"
"""The version of the engine format, then that of the program in it."""
KIND = "application/x-diffopt-engine"
KERNELS = "kernels/"
"""The prefix of the members that a target compiled."""
HINT = "build one with `diffopt optimize MODEL -o FILE.engine`"


def is_component(name: str) -> bool:
    """Tell a component's graph from the root graph "" and from helpers such as "(guards)"."""
    return bool(name) and not name.startswith("(")


class EngineFile:
    """An open engine file.

    Attributes:
        archive: The container of its members.
        manifest: Target, passes, records, versions and members.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.archive = container.Archive(path, KIND, "an engine file", HINT)
        self.manifest = self.archive.manifest
        if (version := self.manifest.get("format")) != FORMAT:
            raise DiffoptError(
                f"{self.path}: engine format {version}, this diffopt reads {FORMAT};"
                " build it again with this version"
            )
        with self.archive.making(f"member {container.MANIFEST}"):
            file_schema.checked(self.manifest, file_schema.EngineManifest)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each member in the file, compressed or not."""
        table = self.manifest["members"]
        return {name: entry.get("zstd", entry["size"]) for name, entry in table.items()}

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by key, mapped."""
        return self.archive.tensors("weights.safetensors")

    def target(self, wanted: Target | str | None = None) -> Target:
        """Return the target to run the engine on: `wanted`, or the one that it was built for."""
        text = str(self.manifest["target"])
        target = parse_target(wanted) if isinstance(wanted, str) else wanted
        # Engines of earlier versions name a lowering without a device.
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
            # With the options that it was built with: its kernels are compiled for those.
            built = self._built_target(text)
            if target not in (None, built, type(built)(), type(built)(device=built.device)):
                raise DiffoptError(
                    f"{self.path}: built for target {text}, with whose options its kernels are"
                    f" compiled; build it again for {target}"
                )
            target = built
        if target.name == built_for and (reason := target.unfit(self.manifest["requires"])):
            instead = "" if self.manifest["holds_weights"] else ', or load it with target="eager"'
            raise DiffoptError(f"{self.path}: {reason}; build it again for this machine{instead}")
        return target

    def without_native(self) -> str:
        """Say how the engine can be had without code for the machine."""
        if self.manifest["holds_weights"]:
            return "it cannot run without"
        return 'load it with target="eager", which runs the graphs alone'

    def digest(self) -> str:
        """Return a hash of the manifest, and so of everything in the file."""
        return hashlib.sha256(self.archive.manifest_text).hexdigest()

    def check(self) -> None:
        """Raise an error for a malformed file; nothing in it is loaded to run."""
        data = self.program_json()
        if self.manifest["holds_weights"]:
            outer = {n: graph for n, graph in data["graphs"].items() if not is_component(n)}
            self.program({**data, "graphs": outer})
        else:
            program = self.program(data)
            with self.archive.making("member program.json"):
                program.verify()

    def _built_target(self, text: str) -> Target:
        try:
            return parse_target(text)
        except DiffoptError as error:
            raise DiffoptError(
                f"{self.path}: built for target {text}, and {error.message}; install what adds it,"
                ' or load the engine with target="eager"'
            ) from None

    def program_json(self) -> dict[str, Any]:
        """Return the program as JSON."""
        data: dict[str, Any] = self.archive.json("program.json", file_schema.ProgramData)
        return data

    def program(self, data: Mapping[str, Any]) -> Program:
        """Rebuild a program from its JSON, which may lack components."""
        assets = program_file.assets(self.archive)
        with self.archive.making("member program.json"):
            return Program.from_members(data, self.tensors, assets)

    def contents(self, data: Mapping[str, Any]) -> EngineContents:
        """Return what a target loads components from; `data` is the program's JSON."""
        return EngineContents(
            members={
                name.removeprefix(KERNELS): self.archive.read(name)
                for name in self.archive.names(KERNELS)
            },
            graphs={name: gm for name, gm in data["graphs"].items() if is_component(name)},
            tensors=self.tensors,
            program=lambda: self.program(self.program_json()),
        )
