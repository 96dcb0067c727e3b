"""What every pass has, so that adding one touches its own file and its test, and nothing else."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from diffopt import spec
from diffopt.core import Pipeline, find_pass, pass_names
from tests.conftest import SLOW

ROOT = Path(__file__).parents[1]
PASSES = [name for name in pass_names() if find_pass(name).__module__.startswith("diffopt.")]
SOURCES = sorted(
    path
    for folder in ("diffopt", "passes", "targets")
    for path in (ROOT / folder).rglob("*.py")
    if (ROOT / "diffopt").joinpath("passes") not in path.parents
    and (ROOT / "diffopt").joinpath("targets") not in path.parents
)

passes = pytest.mark.parametrize("name", PASSES)


def test_the_folder_is_what_the_listing_shows() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "passes").glob("[!_]*.py")}
    assert set(PASSES) == files


@passes
def test_a_pass_has_its_documentation(name: str) -> None:
    cls = find_pass(name)
    summary = (cls.__doc__ or "").splitlines()[0]
    assert not summary.startswith(f"{cls.__name__}("), "a dataclass makes up a docstring"
    assert summary.endswith(".")
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    assert "Before" in module
    assert "After" in module
    assert "Not rewritten" in module


@passes
def test_every_option_has_help(name: str) -> None:
    cls = find_pass(name)
    helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(cls)}
    assert all(helps.get(key) for key in spec.options(cls)), helps


@passes
def test_a_pass_is_a_value_that_prints_and_parses(name: str) -> None:
    step = find_pass(name)()
    assert Pipeline.parse(str(step)).passes == (step,)
    assert hash(step) == hash(find_pass(name)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.anything = 1  # type: ignore[attr-defined]


@passes
def test_a_pass_has_a_test(name: str) -> None:
    assert (ROOT / "tests" / "passes" / f"test_{name.replace('-', '_')}.py").is_file()


@passes
def test_passes_do_not_import_passes(name: str) -> None:
    source = (ROOT / "passes" / f"{name.replace('-', '_')}.py").read_text()
    imported = {
        node.module or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
    }
    assert not any(module.startswith("diffopt.passes") for module in imported)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_code_never_prints(path: Path) -> None:
    if "cli" in path.parts:
        return
    names = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in names


LINES, PARAMETERS = 60, 7


@pytest.mark.parametrize("folder", ["diffopt", "passes", "targets", "examples", "tests"])
def test_functions_are_read_at_once(folder: str) -> None:
    exceeding = []
    for path in [*SOURCES, *(ROOT / "examples").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            args = node.args
            every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            names = [a.arg for a in every if a is not None]
            lines = (node.end_lineno or 0) - node.lineno + 1
            parameters = len([name for name in names if name not in ("self", "cls")])
            if lines > LINES or parameters > PARAMETERS:
                exceeding.append(f"{path.name} {node.name}: {lines} lines, {parameters} parameters")
    assert not exceeding


def test_files_that_take_long_are_called_as_they_are() -> None:
    assert not [name for name in SLOW if not (ROOT / "tests" / f"{name}.py").is_file()]
