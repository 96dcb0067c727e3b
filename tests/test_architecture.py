"""The picture of the rooms is that of the imports, and documents name what exists."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Written by a reader who follows CONTRIBUTING.
EXAMPLES = {"passes/merge_relus.py", "tests/passes/test_merge_relus.py"}

GROUPS = {"diffopt.devices", "diffopt.policies"}  # of entry points


def test_the_picture_is_that_of_the_imports() -> None:
    pytest.importorskip("grimp")
    script = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert picture == script["draw"](script["imports"]()), "run python docs/draw_architecture.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_modules_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    files = set(re.findall(r"\w[\w/]*/\w+\.(?:py|toml|svg|json)\b(?!:\d)", text)) - EXAMPLES
    missing = [
        name
        for name in files
        if "NAME" not in name
        and not any((ROOT / top / name).exists() for top in ("", "diffopt", "docs"))
    ]
    modules = set(re.findall(r"\bdiffopt(?:\.[a-z_0-9]+)+", text)) - GROUPS
    assert not missing
    assert not [name for name in modules if not exists(name)]


def exists(name: str) -> bool:
    """Tell whether a dotted name is a module, or what a module or the package has."""
    package, _, last = name.rpartition(".")
    if not package:
        return True
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    return exists(package) and hasattr(importlib.import_module(package), last)
