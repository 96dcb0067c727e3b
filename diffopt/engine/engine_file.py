"""Engine files: what is in one, read and checked but not yet run."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.ir import program as p
from diffopt.ir.program import Program
from diffopt.lowering.target import EngineContents, Target, parse_target
from diffopt.storage import container

FORMAT = f"1.{p.FORMAT}"
"""Of the file, then of the program in it."""
KIND = "application/x-diffopt-engine"
KERNELS = "kernels/"
"""What the names of the members begin with that a target has made."""
HINT = "build one with `diffopt optimize MODEL -o FILE.engine`"


def is_component(name: str) -> bool:
    """Tell a component's graph from the outer one, called "", and from helpers in parentheses."""
    return bool(name) and not name.startswith("(")


class EngineFile:
    """An open engine file.

    Attributes:
        archive: Its members.
        manifest: What it says about itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.archive = container.Archive(path, KIND, "an engine file", HINT)
        self.manifest = self.archive.manifest
        found = self.manifest.get("format")
        if found != FORMAT:
            raise DiffoptError(
                f"{self.path}: engine format {found}, this diffopt reads {FORMAT};"
                " build it again with this version"
            )

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by key, mapped."""
        return self.archive.tensors("weights.safetensors")

    def target(self, wanted: Target | str | None = None) -> Target:
        """Return what is to run the engine: `wanted`, or what it was built for."""
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

    def program_json(self) -> dict[str, Any]:
        """Return the program as JSON."""
        data: dict[str, Any] = json.loads(bytes(self.archive.read("program.json")))
        return data

    def program(self, data: Mapping[str, Any]) -> Program:
        """Rebuild a program from (some of) its JSON."""
        names = self.archive.names("assets/")
        assets = {n.removeprefix("assets/"): bytes(self.archive.read(n)) for n in names}
        return Program.from_members(data, self.tensors, assets)

    def image(self, data: Mapping[str, Any]) -> EngineContents:
        """Return what the target needs to run the components; `data` is the program's JSON."""
        return EngineContents(
            members={
                name.removeprefix(KERNELS): self.archive.read(name)
                for name in self.archive.names(KERNELS)
            },
            graphs={name: gm for name, gm in data["graphs"].items() if is_component(name)},
            tensors=self.tensors,
            program=lambda: self.program(self.program_json()),
        )
