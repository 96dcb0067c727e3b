"""Every command and every snippet in the documents is run, here or by `make demo`."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

import diffopt.passes
from diffopt.cli import load_model, main
from diffopt.cli.load_model import TracedCall
from diffopt.core import pass_manager
from diffopt.engine.engine import build
from tests.keys import make_key

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Commands that no test can run: they make the environment that the tests run in.
ELSEWHERE = {'pip install ".[diffusers]"'}


def fences(path: Path, language: str) -> Iterator[str]:
    for info, text in FENCE.findall(path.read_text(encoding="utf-8")):
        if info == language:
            yield text


def commands(path: Path) -> list[str]:
    lines = [line for text in fences(path, "console") for line in text.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def demo() -> set[str]:
    """Return the commands that `make demo` runs."""
    text = (ROOT / "Makefile").read_text()
    for name, value in re.findall(r"^(\w+) :?\??= (.*)$", text, re.MULTILINE):
        text = text.replace(f"$({name})", value)
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert recipe is not None
    return {line[line.index("diffopt ") :] for line in recipe[1].splitlines()}


COMMANDS = [
    pytest.param(command, id=command)
    for path in DOCUMENTS
    for command in commands(path)
    if command not in demo() | ELSEWHERE
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout in which `make demo` has run, with fewer steps."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        program = load_model.trace_model("examples/models/fashion-sd", TracedCall({}, 2))
        build(program, "eager", "fashion.engine")
    make_key(folder, "key")
    return folder


def test_the_first_commands_of_the_readme_are_the_demo() -> None:
    first = commands(ROOT / "README.md")[:3]
    assert set(first) == demo()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    command: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *words = shlex.split(command)
    assert program == "diffopt", "run it, or list it in ELSEWHERE"
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert not exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize("text", fences(ROOT / "README.md", "python"))
def test_snippets_of_the_readme(
    text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    text = text.replace('"cpu"', '"eager"')  # compiling takes a minute, and is tested elsewhere
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)
    images = names["images"]
    assert isinstance(images, list)
    assert images[0].size == (32, 32)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the worked example's pass, where `merge-relus` is found."""
    monkeypatch.setattr(diffopt.passes, "__path__", [*diffopt.passes.__path__, str(tmp_path)])
    monkeypatch.setattr(pass_manager, "_sources", pass_manager._sources.__wrapped__)
    source, _ = fences(ROOT / "CONTRIBUTING.md", "python")
    path = tmp_path / "merge_relus.py"
    path.write_text(source)
    yield path
    sys.modules.pop("diffopt.passes.merge_relus")


def example_tests() -> dict[str, Callable[[], None]]:
    _, tests = fences(ROOT / "CONTRIBUTING.md", "python")
    names: dict[str, Callable[[], None]] = {}
    exec(compile(tests, "CONTRIBUTING.md", "exec"), names)
    return {name: value for name, value in names.items() if name.startswith("test_")}


def test_the_worked_example(example: Path) -> None:
    assert "merge-relus" in pass_manager.pass_names()
    functions = example_tests()
    assert len(functions) == 3
    for function in functions.values():
        function()


def test_the_guard_of_the_worked_example_is_needed(example: Path) -> None:
    guard = re.compile(r" +if node in returned.*?continue\n", re.DOTALL)
    source, guards = guard.subn("", example.read_text())
    assert guards == 1
    example.write_text(source)
    with pytest.raises(AssertionError):
        example_tests()["test_values_that_are_both_returned_are_left_alone"]()


def test_options_of_the_command_line_are_in_the_help() -> None:
    """A command in a plain block or a sentence names options that exist."""
    root = typer.main.get_command(main.app)
    known = {"--help"}
    for command in (root, *root.commands.values()):  # type: ignore[attr-defined]
        known.update(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))
    for path in DOCUMENTS:
        for line in re.findall(r"diffopt [a-z]+ [^`\n]*", path.read_text(encoding="utf-8")):
            options = set(re.findall(r"(?<!\S)--[\w-]+", line))
            assert options <= known, f"{path.name}: {line}"
