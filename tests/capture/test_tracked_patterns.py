"""What Python and its library make and read of texts: followed, guarded, or the text is bound."""

import contextlib
import functools
import html
import inspect
import json
import logging
import operator
import re
import shlex
import string
import sys
import textwrap
import unicodedata
import urllib.parse
import warnings
import zlib
from html import unescape

import numpy as np
import pytest
import regex
import torch
from torch import nn

import diffopt
from diffopt.capture import followed_code, tracked_patterns
from diffopt.capture.tracked_patterns import TrackedPattern
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from tests import sampler
from tests.capture import text_helpers
from tests.zoo.text import clip_tokenizer

LETTERS = regex.compile(r"\p{Lu}")
COLOUR = re.compile(r"(red|blue) (\w+)", re.IGNORECASE)


class Sampler:
    """Sums embeddings of what a function makes of the prompt, times a number that it reads."""

    colour = re.compile("red")

    def __init__(self, function):
        torch.manual_seed(0)
        embed = nn.Embedding(160, 4).requires_grad_(False)
        self.components = {"words": clip_tokenizer(), "embed": embed}
        self.function = function

    def __call__(self, prompt):
        text, number = self.function(prompt)
        length = {"padding": "max_length", "max_length": 16, "truncation": True}
        ids = self.components["words"](text, return_tensors="pt", **length).input_ids
        return self.components["embed"](ids).sum(1) * (1.0 + number)


def made(function):
    return lambda prompt: (function(prompt), 0.0)


def read(function):
    return lambda prompt: (prompt, float(function(prompt)))


MADE = {
    "sub": (made(lambda p: re.sub(r"\d+", "n", p)), "3 cats", "a cat of 12"),
    "sub with groups": (made(lambda p: re.sub(r"(\w) (\w)", r"\2 \1", p)), "a cat", "my dogs"),
    "a pattern of the module": (made(lambda p: COLOUR.sub("pink", p)), "a Red hat", "blue cats"),
    "compiled in the call": (made(lambda p: re.compile("a").sub("", p, 1)), "a cat", "cats"),
    "of the library regex": (
        made(lambda p: regex.sub(r"\s+", " ", p).upper()),
        "a  cat",
        "dogs  2",
    ),
    "a pattern of regex": (made(lambda p: LETTERS.sub("x", p)), "a Red hat", "blue cats"),
    "split": (made(lambda p: re.split(r"\s+(?=[A-z]|$)", p)[-2]), "a red hat", "my blue hat"),
    "a group": (made(lambda p: re.search(r"(\w+)\s+(\w)", p).group(2)), "a red hat", "1 BLUE cat"),
    "groups": (made(lambda p: re.search(r"(\w+)\s+(\w)", p).groups()[1]), "a hat", "1 BLUE cat"),
    "an item of a match": (made(lambda p: re.search(r"\w+\s+(\w+)", p)[1]), "a hat", "1 BLUE cat"),
    "all": (made(lambda p: re.findall("[A-z]+", p)[0]), "cat a b", "dog 1 b c"),
    "one of all": (made(lambda p: re.findall("(?i)[a-z]+", p)[1]), "cat 1 x y", "dog 2 y z"),
    "each": (made(lambda p: next(re.finditer("[A-z]+", p)).group()), "cat 1", "dog 2"),
    "entities": (made(lambda p: html.unescape(p).upper()), "a &amp; b", "&lt;cat&gt;"),
    "a function of a module's": (made(lambda p: unescape(p).upper()), "a &amp; b", "&lt;cat&gt;"),
    "forms": (made(lambda p: unicodedata.normalize("NFKC", p).upper()), "ﬁg", "ﬁsh"),
    "an address": (made(lambda p: urllib.parse.unquote_plus(p).upper()), "a+cat", "red%20hats"),
    "JSON": (made(lambda p: json.loads(p)["a"]["b"]), '{"a": {"b": "cat"}}', '{"a":{"b":"dogs"}}'),
    "str": (made(lambda p: str(p).upper()), "a cat", "dogs"),
    "an f-string": (made(lambda p: f"<{p!s}> {p.upper()}"), "a cat", "dogs"),
    "a field's form": (made(lambda p: f"{p!r:>9}{p:>3}"), "a cat", "dogs"),
    "percent": (made(lambda p: "%s, %s" % (p.upper(), p)), "a cat", "dogs"),  # noqa: UP031
    "format": (made(lambda p: "{} {{{0}}} {x}".replace("{} ", "").format(p, x=1)), "a cat", "dogs"),
    "str.upper": (made(lambda p: str.upper(p)), "a cat", "dogs"),
    "of each": (made(lambda p: next(map(str.upper, [p]))), "a cat", "dogs"),
    "by a key": (made(lambda p: max([p, "a"], key=str.lower).upper()), "b cat", "dogs"),
    "put into": (made(lambda p: "<x>, x".replace("x", p).upper()), "a cat", "dogs"),
    "a method of a template": (made(lambda p: next(map("a {}".format, [p]))), "cat", "dogs"),
    "a helper's": (made(lambda p: text_helpers.shouted(p)), "a cat", "dogs"),
    "an object's": (made(lambda p: text_helpers.Shouter("{} !").shout(p)), "a cat", "dogs"),
    "repr": (made(lambda p: repr(p).upper()), "a cat", "dogs"),
    "a value in JSON": (made(lambda p: json.dumps(p).upper()), "a cat", "dogs"),
    "join": (made(lambda p: ", ".join(w.upper() for w in (p, "red"))), "a cat", "dogs"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_texts_is_made_of_new_ones(name, tmp_path):
    function, first, other = MADE[name]
    pipe = Sampler(function)
    diffopt.trace(pipe, prompt=first).save(tmp_path / "a.program")
    program = Program.load(tmp_path / "a.program")
    assert torch.equal(program(prompt=other), pipe(prompt=other))


def is_number(text):
    try:
        return int(text) >= 0
    except ValueError:
        return False


READ = {
    "search": (read(lambda p: bool(re.search("cat", p))), "a dog", "a bird", "the cat"),
    "a module's pattern": (read(lambda p: COLOUR.match(p) is None), "a dog", "a cat", "red hat"),
    "a class's pattern": (read(lambda p: bool(Sampler.colour.search(p))), "a", "a cat", "red"),
    "fullmatch": (read(lambda p: bool(re.fullmatch(r"(?s)\s*[A-z].*", p))), "dog", "cat", "1 cat"),
    "how many": (read(lambda p: len(re.findall("a", p))), "a cat", "an apple", "dog"),
    "where": (read(lambda p: re.search("cat", p).start()), "a cat", "", "two cats"),
    "subn": (read(lambda p: re.subn("a", "b", p)[1]), "a cat", "a cat", "dog"),
    "by a function": (
        lambda p: (re.sub("c", lambda m: m.group().upper(), p), 0.0),
        *("a cat", "a cat", "cc"),
    ),
    "a number in JSON": (read(lambda p: json.loads(p)["n"]), '{"n": 2}', '{"n":2 }', '{"n": 3}'),
    "keys in JSON": (read(lambda p: "n" in json.loads(p)), '{"n": 2}', '{ "n": 2}', '{"m": 2}'),
    "a number": (read(int), "3", "", "4"),
    "a fraction": (read(float), "1.5", "", "2"),
    "whether it is a number": (read(is_number), "a dog", "a cat", "3"),
    "bytes": (read(lambda p: len(p.encode())), "a cat", "a cat", "dogs"),
    "if": (read(lambda p: 1 if p else 0), "a cat", "dogs", ""),
    "if len": (read(lambda p: 1 if len(p) else 0), "a cat", "dogs", ""),
    "characters": (read(lambda p: any(c.isdigit() for c in p)), "a cat", "a dog", "a 3at"),
    "str": (read(lambda p: "cat" in str(p)), "a cat", "the cats", "dog"),
    "a letter's number": (read(lambda p: ord(p[0]) == 97), "dog", "dig", "a cat"),
    "a number of a base": (read(lambda p: int(p, 16)), "1f", "", "2f"),
    "bytes of": (read(lambda p: len(bytes(p, "utf8"))), "a cat", "", "dogs"),
    "of each": (read(lambda p: next(map(str.isupper, [p]))), "a cat", "dogs", "DOGS"),
    "a letter's number of each": (read(lambda p: max(map(ord, p))), "a cat", "", "dogs"),
    "a method": (read(lambda p: str.startswith(p, "a")), "dog", "cat", "a cat"),
    "of another text": (read(lambda p: "a cat".startswith(p)), "dog", "", "a"),
    "of an operator": (read(lambda p: operator.contains(p, "cat")), "a cat", "", "dog"),
    "wrapped": (read(lambda p: len(textwrap.wrap(p, 4))), "a cat", "", "two cats and dogs"),
    "split by a shell's rules": (read(lambda p: len(shlex.split(p))), "a cat", "", "a 'b c' d"),
    "a template of the library": (
        read(lambda p: "cat" in string.Template("a $x").substitute(x=p)),
        *("a cat", "", "dog"),
    ),
    "in JSON": (read(lambda p: "cat" in json.dumps({"p": [p]})), "a cat", "", "dog"),
    "in a list's text": (read(lambda p: "cat" in str([p])), "a cat", "", "dog"),
    "evaluated": (read(lambda p: eval(repr(p)) == "dog"), "a cat", "", "dog"),
    "an attribute's name": (read(lambda p: getattr(text_helpers, p)), "ONE", "", "TWO"),
    "partial": (read(lambda p: functools.partial(int, base=16)(p)), "1f", "", "2f"),
    "a digest": (read(lambda p: zlib.crc32(p.encode()) == zlib.crc32(b"dog")), "a cat", "", "dog"),
    "a helper's": (read(lambda p: text_helpers.has_cat(p)), "a cat", "the cat", "dog"),
    "a decorated helper's": (read(lambda p: text_helpers.decorated(p)), "dog", "dig", "a cat"),
    "an object's": (read(lambda p: text_helpers.Shouter("cat").found(p)), "dog", "b", "a"),
    "its type": (read(lambda p: 1 if type(p) is str else 0), "a cat", "dogs", None),
    "in an f-string": (read(lambda p: "cat" in f"a {p}"), "a cat", "the cats", "dog"),
    "in a joined text": (read(lambda p: "cat" in " ".join([p, "x"])), "a cat", "the cats", "dog"),
    "in what format gives": (
        read(lambda p: "{} x".format(p).startswith("cat")),  # noqa: UP032
        *("a dog", "a bird", "cats"),
    ),
    "in what % gives": (read(lambda p: ("a %s" % p).count("cat")), "a cat", "my cat", "dog"),  # noqa: UP031
    "in what % gives of names": (
        read(lambda p: "cat" in "a %(p)s" % {"p": p}),  # noqa: UP031
        *("a cat", "a cat", "dog"),
    ),
    "as a part": (read(lambda p: p in "a cat and a dog"), "a bird", "two birds", "a cat"),
    "not as a part": (read(lambda p: p not in "a cat and a dog"), "bird", "birds", "a dog"),
    "one of some": (read(lambda p: p in ("a cat", "a dog")), "bird", "birds", "a dog"),
    "with a width": (read(lambda p: len(f"{p:>9}")), "a cat", "", "a very long cat"),
    "one field": (read(lambda p: "cat" in f"{p}"), "a cat", "the cats", "dog"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READ)
def test_what_python_reads_of_texts_holds_for_new_ones(name, tmp_path):
    function, first, alike, other = READ[name]
    pipe = Sampler(function)
    program = diffopt.trace(pipe, prompt=first)
    if alike:
        assert torch.equal(program(prompt=alike), pipe(prompt=alike))
    # It is captured when it comes, or refused.
    with contextlib.suppress(DiffoptError):
        assert torch.equal(program(prompt=other), pipe(prompt=other))
    program.save(tmp_path / "a.program")
    with pytest.raises(DiffoptError) as caught:
        Program.load(tmp_path / "a.program")(prompt=other)
    assert "\n" not in str(caught.value)


def test_json_that_is_only_checked():
    def checked(prompt):
        json.loads(prompt)
        return prompt, 0.0

    pipe = Sampler(checked)
    program = diffopt.trace(pipe, prompt='{"a": "cat"}')
    program.retrace = None
    other = '[{"b": [1, 2, "dog"]}]'
    assert torch.equal(program(prompt=other), pipe(prompt=other))
    with pytest.raises(DiffoptError, match=r"is_json\(prompt\) is False"):
        program(prompt="{a: dog}")


@pytest.mark.parametrize(
    "function",
    [
        lambda: f"{3!r:>4} {'x'} {2.5:.2f} {'a':{'>'}{3}}",
        lambda: "%d %s %%" % (1, "x"),  # noqa: UP031
        lambda: 7 % 3,
        lambda: "{0} {0} {a} {}".replace("{}", "").format(1, a="x"),
        lambda: ", ".join(c for c in "abc"),
        lambda: ["a" in "cat", "a" not in ["b"], 1 in (1, 2), "x" in {"x": 1}],
        lambda: (
            sorted(["B", "a"], key=str.lower)
            + list(map(functools.partial("{text}{}".format, text="b"), "a"))
        ),
        lambda x=2: (
            eval("x + 1"),
            sorted(locals()),
            dict.fromkeys("ab", x),
            "a".replace("a", "b"),
        ),
        lambda one="upper": (
            type(one),
            type("T", (int,), {})(3),
            int("1f", base=16),
            int("7"),
            getattr("a", one)(),
        ),
        lambda: (max(3, 1), max("ab", default=""), "".join(iter("ab")), repr("a")),
        lambda: Sub().value(),
        lambda: written_in_place(),
        lambda: [sys._getframe(0).f_code.co_name, inspect.currentframe().f_lineno > 0],
    ],
)
def test_code_without_texts_does_what_it_did(function):
    expected = function()
    original = function.__code__
    with followed_code.watching(function):
        assert function.__code__ is not original
        assert function() == expected
    assert function.__code__ is original


def written_in_place():
    numbers, others = torch.arange(5), np.arange(5)
    views = numbers[1:], others[1:]
    numbers %= 3
    others %= 3
    rest = 7
    rest %= 4
    return [view.tolist() for view in views], rest


class Base:
    def value(self):
        return [1]


class Sub(Base):
    def value(self):
        return [*super().value(), len(vars(self)), format(2.5, ".2f")]


def test_code_without_source_that_may_read_texts_is_said(caplog):
    names = {"torch": torch}
    exec("def plain(p):\n    return p, 0.5 + torch.ones(1)[0]", names)
    exec("def reading(p):\n    return p, float('cat' in f'a {p}')", names)
    exec("def calling(p):\n    return p, float(ord(p[0]) > 0)", names)
    for name in ("plain", "reading", "calling"):
        diffopt.trace(Sampler(names[name]), prompt="a dog")
    assert [
        r.getMessage().partition(" of texts")[0] for r in caplog.records if r.name == "diffopt"
    ] == [
        "the source of calling is not at hand: what it reads",
    ]


def test_nobody_keeps_a_tracked_text(caplog):
    log = logging.getLogger("somebody")

    def warned(prompt):
        warnings.warn(f"warned of {prompt}", stacklevel=1)
        log.warning("logged %s", prompt)
        log.warning(f"logged {prompt}")
        return prompt, 0.0

    with pytest.warns(UserWarning, match="warned of") as seen:
        diffopt.trace(Sampler(warned), prompt="a cat")
    assert {type(row.message.args[0]) for row in seen} == {str}
    assert {row.filename for row in seen} == {__file__}
    records = [row for row in caplog.records if row.name == "somebody"]
    assert {type(row.getMessage()) for row in records} == {str}
    assert {row.pathname for row in records} == {__file__}

    def failed(prompt):
        raise NotImplementedError(f"no {prompt}")

    with pytest.raises(NotImplementedError, match="no a cat") as caught:
        diffopt.trace(Sampler(failed), prompt="a cat")
    assert type(caught.value.args[0]) is str


def test_a_source_that_has_changed_is_not_taken(tmp_path, monkeypatch):
    file = tmp_path / "changed_module.py"
    file.write_text("def f(x):\n    return f'a {x}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import changed_module

    file.write_text("def f(x):\n    return f'b {x}'\n")
    with followed_code.watching(changed_module.f):
        assert changed_module.f("c") == "a c"


def test_nothing_stays_replaced():
    def held():
        return re.sub, re.compile, json.loads, html.unescape, COLOUR, Sampler.colour, unescape

    originals = held()
    with tracked_patterns.watching():
        assert not any(a is b for a, b in zip(held(), originals, strict=True))
        assert isinstance(COLOUR, TrackedPattern)
        assert isinstance(COLOUR, re.Pattern)
        assert COLOUR.sub("x", "a red hat") == "a x"
        assert re.compile("a") == re.compile("a")
    assert all(a is b for a, b in zip(held(), originals, strict=True))


def test_what_only_says_that_it_is_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:  # as cffi's are, in `sys.modules` once cryptography is imported
        __slots__ = ("content",)
        __class__ = type(sys)  # type: ignore[assignment]

    monkeypatch.setitem(sys.modules, "a_library_of_c", Library())  # type: ignore[arg-type]
    assert sampler.program()(seed=0)["images"].shape[0] == 2
