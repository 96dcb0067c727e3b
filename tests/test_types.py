"""Arguments of wrong types to the public API: one line each, before anything is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffopt
from diffopt.core import Pipeline
from diffopt.ir.program import Program
from tests import sampler

WRONG: list[tuple[Callable[[Any, Path], Any], str]] = [
    (lambda p, f: diffopt.build("x", "eager", f), "program must be a Program, as diffopt.trace"),
    (lambda p, f: diffopt.build(p, 3, f), "target must be a target or its text, such as 'cpu'"),
    (lambda p, f: diffopt.build(p, None, f), "target must be a target or its text, such as 'cpu'"),
    (lambda p, f: diffopt.build(p, "eager", 3), "path must be a path, got int 3"),
    (lambda p, f: diffopt.build(p, "eager", None), "path must be a path, got None"),
    (lambda p, f: diffopt.build(p, "eager", f, compress="x"), "compress=x: wants a level from 1"),
    (lambda p, f: diffopt.load(3), "path must be a path, got int 3"),
    (lambda p, f: diffopt.load(f, target=3), "target must be a target or its text, such as"),
    (lambda p, f: diffopt.trace(5), "the pipeline must be something that is called, got int"),
    (lambda p, f: diffopt.trace("x", prompt="a"), "the pipeline must be something that is called"),
    (lambda p, f: diffopt.trace(print, dynamic="x"), "dynamic must be a list of names, got str"),
    (lambda p, f: diffopt.trace(print, components=[1]), "components must be a dict of modules by"),
    (lambda p, f: diffopt.trace(print, check="x"), "check must be True, False or None, got str"),
    (lambda p, f: diffopt.trace(print, source=3), "source must be a text, got int 3"),
    (lambda p, f: Pipeline("unroll"), "passes must be a sequence of passes; Pipeline.parse reads"),
    (lambda p, f: Pipeline(("unroll",)), "each of the passes must be a pass, got str 'unroll'"),
    (lambda p, f: Pipeline.parse(5), "passes must be a text such as 'unroll,hoist', got int 5"),
    (lambda p, f: Pipeline.parse("unroll").run("x"), "program must be a Program, as diffopt.trace"),
    (lambda p, f: Program.load(5), "path must be a path, got int 5"),
    (lambda p, f: p.save(5), "path must be a path, got int 5"),
]


@pytest.fixture(scope="module")
def program() -> Program:
    return sampler.program()


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_one_line(
    call: Callable[[Any, Path], Any], message: str, program: Program, tmp_path: Path
) -> None:
    with pytest.raises(diffopt.DiffoptError) as caught:
        call(program, tmp_path / "x.engine")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
