"""What Python does in C with texts, in every form that it can be written in.

These are tried without the comparison, and without the words of the code itself, which find more.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import operator
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffopt
from diffopt.capture import challenges, followed_code
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from tests.capture import text_helpers
from tests.capture.test_tracked_patterns import Sampler, made, read
from tests.zoo import CASES, call, session, traced

A_TEXT = "a {} and {}"


class Holder:
    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


class Name(str):
    pass


def with_default(text, find=text_helpers.has_cat):
    return find(text)


@functools.lru_cache
def cached(holder):
    return "cat" in f"a {holder.text}"


@functools.singledispatch
def dispatched(value):
    return "cat" in f"a {value.text}"


def formatted_in_place(text):
    result = "a %s"
    result %= text
    return "cat" in result


def an_item_in_place(text):
    rows = ["a %s"]
    rows[0] %= text
    return "cat" in rows[0]


def shadowed(text, dir=ord):
    return dir(text[0]) == ord("c")


def imported_in_it(text):
    from tests.capture import text_helpers as helpers

    return helpers.has_cat(text)


def length_or(text):
    return (len(text[:10]) or 1) == 3


def of_a_generator(text):
    file = io.StringIO()
    file.writelines(part for part in [text])
    return "cat" in file.getvalue()


READ = {
    "%=": formatted_in_place,
    "%= of an item": an_item_in_place,
    "a chain": lambda p: "a cat" in f"a {p}" != "",
    "in a chain": lambda p: "" != p in "a cat and a tree",
    "a name that shadows": shadowed,
    "evaluated": lambda p: eval("'cat' in f'a {p}'"),
    "% of an object": lambda p: "cat" in "a %s, %d" % (Holder(p), 3),  # noqa: UP031
    "format of an object": lambda p: "cat" in A_TEXT.format(Holder(p), 3),
    "format of an attribute": lambda p: "cat" in "a {0.text}".format(Holder(p)),  # noqa: UP030, UP032
    "format of a mapping": lambda p: "cat" in "a {t}".format_map({"t": p}),
    "% of a mapping": lambda p: "cat" in "a %(t)s" % collections.ChainMap({"t": p}),  # noqa: UP031
    "str of an object": lambda p: "cat" in str(Holder(p)),
    "a text of another class": lambda p: "cat" in f"a {Name(p)}",
    "in a text of another class": lambda p: p in Name("a cat and a tree"),
    "a field's form": lambda p: len(f"{3:{len(p)}}") == 3,
    "numpy ==": lambda p: (np.array(["cat"]) == p).any(),
    "numpy's array": lambda p: "cat" in np.array([p]),
    "a default": with_default,
    "imported in the function": imported_in_it,
    "a cached function": lambda p: cached(Holder(p)),
    "a function by type": lambda p: dispatched(Holder(p)),
    "a length or": length_or,
    "what a generator gives": of_a_generator,
    "printed": lambda p: (print(p, file=(file := io.StringIO())), "cat" in file.getvalue())[1],
    "handed over": lambda p: next(map(functools.partial(operator.contains, p), ["cat"])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READ)
def test_a_later_text_is_the_pipelines_or_refused(name, tmp_path):
    pipe = Sampler(read(READ[name]))
    program = diffopt.trace(pipe, prompt="a dog", check=False)
    program.save(tmp_path / "a.program")
    for other in ("cat", "my bird", "a dog"):
        with contextlib.suppress(DiffoptError):
            result = Program.load(tmp_path / "a.program")(prompt=other)
            assert torch.equal(result, pipe(prompt=other)), other


def lists(text):
    letters = []
    letters += text
    return "".join(letters)


def unset(text):
    @dataclasses.dataclass
    class Row:
        text: str
        other: str = dataclasses.field(init=False)

    print(Row(text).text, file=sys.stderr)
    return text


def cyclic(text):
    rows = {"text": text}
    rows["self"] = rows
    print(rows["text"], len(rows))
    return rows["text"]


WORKS = {
    "a list of letters": lists,
    "a path": lambda p: str(Path("x") / p).removeprefix("x/"),
    "its class": lambda p: p.__class__("x").replace("x", p),
    "an unset field": unset,
    "in itself": cyclic,
    "%": lambda p: "%-9s|%5.3s|%%|%d" % (p, p, 3),  # noqa: UP031
    "format": lambda p: "{x}: {} {:>9} {!r}".format(p, p, p, x="a"),
    "a slice of numpy's numbers": lambda p: p[np.int64(0) : np.int64(5)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKS)
def test_what_works_in_python_works_in_a_capture(name, tmp_path):
    pipe = Sampler(made(WORKS[name]))
    program = diffopt.trace(pipe, prompt="a dog")
    assert torch.equal(program(prompt="a dog"), pipe(prompt="a dog"))
    program.save(tmp_path / "a.program")


class Keeps:
    """Makes functions and classes in its first call, and keeps them."""

    def __init__(self):
        self.function = None

    def __call__(self, text):
        if self.function is None:
            self.function = lambda t: f"a {t}".replace("x", "%s" % ord("a"))  # noqa: UP031
        return self.function(text)


def test_what_a_pipeline_keeps_of_a_capture_works_afterwards():
    keeps = Keeps()
    pipe = Sampler(made(keeps))
    program = diffopt.trace(pipe, prompt="a dog")
    assert keeps.function("x") == "a 97"
    assert torch.equal(program(prompt="my cat"), pipe(prompt="my cat"))


@pytest.mark.filterwarnings("ignore")
def test_a_text_whose_tokens_python_counts_unseen_is_bound():
    # Sana tokenizes its instruction, and lengthens the prompt by as many tokens.
    program = traced("sana")
    program.retrace = None
    arguments = CASES["sana"].inputs(1)
    pipe = session("sana").pipeline
    assert torch.equal(call(program, arguments)[0], call(pipe, CASES["sana"].inputs(1))[0])
    changed = {**CASES["sana"].inputs(1), "complex_human_instruction": ["two words:"]}
    with pytest.raises(DiffoptError, match=r"complex_human_instruction\[0\] is 'two words:'"):
        call(program, changed)


# Words of the pipeline's own code


def redirected(text):
    with contextlib.redirect_stdout(io.StringIO()) as file:
        print(text)
    return "cat" in file.getvalue()


def test_what_is_not_seen_is_found_by_the_words_of_the_code(caplog, tmp_path):
    pipe = Sampler(read(redirected))
    diffopt.trace(pipe, prompt="a dog").save(tmp_path / "a.program")
    program = Program.load(tmp_path / "a.program")
    assert torch.equal(program(prompt="a dog"), pipe(prompt="a dog"))
    with pytest.raises(DiffoptError, match="prompt is 'my bird' for this text and was 'a dog'"):
        program(prompt="my bird")
    assert "texts are bound: of " in caplog.text


def test_the_words():
    def function(text):
        """Return a docstring."""
        return text in ("red", "blue") or text.startswith("cat")

    texts = challenges.texts(function)
    assert texts == [challenges.MIXED, "3", "cat red blue", "cat", "red", "blue"]
    assert not any("Return" in text for text in texts)


def test_nothing_of_it_stays_in_functions():
    function = READ["evaluated"]
    code = function.__code__
    with followed_code.watching(function):
        assert function.__code__ is not code
    assert function.__code__ is code
