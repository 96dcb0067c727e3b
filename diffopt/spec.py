"""Reads and writes the text form of passes and targets: `unroll(steps=20),hoist,cache(auto)`.

    text   = call ("," call)*
    call   = NAME ["(" [option ("," option)*] ")"]
    option = [NAME "="] value
    value  = WORD | STRING | "(" [value ("," value)*] ")"

Options are the fields of a frozen dataclass, written in kebab-case; a value without a name is
taken by position, and one behind a named option of several values belongs to that:
`keep=first:2,last:2` is `keep=(first:2,last:2)`. A field whose type is a `Choice` is written as a
word, and what is chosen brings its own options to the same call:
`cache(deepcache,interval=3,max-cache-mb=64)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

from diffopt.errors import DiffoptError

T = TypeVar("T")
Span = tuple[int, int]


class Choice:
    """A dataclass of options that a word chooses; the first field of a pass may have this type."""

    name: ClassVar[str]

    @classmethod
    def find(cls, word: str) -> type[Choice]:
        """Return what `word` chooses, or raise a DiffoptError that names what there is."""
        raise NotImplementedError

    @classmethod
    def words(cls) -> list[str]:
        """Return what there is to choose from."""
        raise NotImplementedError


def option(default: T, help: str) -> T:
    """Declare an option of a pass or a target: a dataclass field with a sentence of help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Value:
    """Hold one written value: a word, a string in quotes, or a tuple of values."""

    text: str
    span: Span
    quoted: bool = False
    items: tuple[Value, ...] | None = None


@dataclass(frozen=True)
class Argument:
    """Hold one written option, with its name unless it was given by position."""

    name: str | None
    span: Span
    value: Value


@dataclass(frozen=True)
class Call:
    """Hold one written pass or target, its options and where it stands in the text."""

    name: str
    span: Span
    arguments: tuple[Argument, ...]


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `word`, or the list of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; there are {', '.join(names)}" if names else ""


def parse(text: str, noun: str = "pass") -> list[Call]:
    """Parse `text` into calls; `noun` is what the error messages call one of them."""
    return _Parser(text, noun).calls()


class _Parser:
    TOKEN = re.compile(
        r"""(?P<word>[^\s,()="']+)|(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<mark>.)""",
        re.DOTALL,
    )

    def __init__(self, text: str, noun: str) -> None:
        self.text = text
        self.noun = noun
        self.tokens = [m for m in self.TOKEN.finditer(self.text) if not m.group().isspace()]
        self.at = 0

    def calls(self) -> list[Call]:
        calls = []
        while self.tokens:
            calls.append(self.call())
            if self.at == len(self.tokens):
                break
            if not self.accept(","):
                stray = self.peek() in (")", "=")
                self.fail(
                    f"unexpected '{self.peek()}'"
                    if stray
                    else f"expected ',' before the next {self.noun}"
                )
        return calls

    def call(self) -> Call:
        name = self.word(f"expected a {self.noun} name")
        opening = self.at
        if not self.accept("("):
            return Call(name.group(), name.span(), ())
        arguments: list[Argument] = []
        while not self.accept(")"):
            if arguments and not self.accept(","):
                self.unclosed(opening)
            if self.at == len(self.tokens):
                self.unclosed(opening)
            arguments.append(self.argument(opening))
        return Call(name.group(), name.span(), tuple(arguments))

    def argument(self, opening: int) -> Argument:
        if self.peek(1) == "=":
            name = self.word("expected an option name")
            self.accept("=")
            return Argument(name.group(), name.span(), self.value(opening))
        value = self.value(opening)
        return Argument(None, value.span, value)

    def value(self, opening: int) -> Value:
        start = self.at
        if self.accept("("):
            items: list[Value] = []
            while not self.accept(")"):
                if items and not self.accept(","):
                    self.unclosed(start)
                if self.at == len(self.tokens):
                    self.unclosed(start)
                items.append(self.value(start))
            span = self.tokens[start].start(), self.tokens[self.at - 1].end()
            return Value(self.text[slice(*span)], span, items=tuple(items))
        if self.at == len(self.tokens):
            self.unclosed(opening)
        token = self.tokens[self.at]
        if token.lastgroup == "mark":
            quote = token.group() in "\"'"
            self.fail("this quote is not closed" if quote else "expected a value")
        self.at += 1
        if token.lastgroup == "string":
            return Value(
                re.sub(r"(?s)\\(.)", r"\1", token.group()[1:-1]), token.span(), quoted=True
            )
        return Value(token.group(), token.span())

    def peek(self, ahead: int = 0) -> str | None:
        place = self.at + ahead
        return self.tokens[place].group() if place < len(self.tokens) else None

    def accept(self, mark: str) -> bool:
        found = self.peek() == mark
        self.at += found
        return found

    def word(self, message: str) -> re.Match[str]:
        if self.at == len(self.tokens) or self.tokens[self.at].lastgroup != "word":
            self.fail(message)
        self.at += 1
        return self.tokens[self.at - 1]

    def unclosed(self, opening: int) -> NoReturn:
        raise DiffoptError("this '(' has no ')'", text=self.text, span=self.tokens[opening].span())

    def fail(self, message: str) -> NoReturn:
        end = len(self.text)
        span = self.tokens[self.at].span() if self.at < len(self.tokens) else (end, end + 1)
        raise DiffoptError(message, text=self.text, span=span)


def bind(call: Call, cls: Callable[..., T], text: str, **given: Any) -> T:
    """Make an instance of the dataclass `cls` with the options written in `call`.

    `given` are values of fields that are no options.
    """
    hints = options(cls)
    kind = choice(cls)
    first = call.arguments[0] if call.arguments else None
    if kind is None or first is None or first.name not in (None, _kebab(kind[0])):
        values = _read(call.name, call.arguments, hints, text)
        return _make(call, cls, {**values, **given}, text)
    key, base = kind
    try:
        chosen = base.find(first.value.text)
    except DiffoptError as error:
        raise DiffoptError(error.message, text=text, span=first.value.span) from None
    del hints[key]
    own = options(chosen)
    name = f"{call.name}({chosen.name})"
    values = _read(name, call.arguments[1:], {**own, **hints}, text)
    inner = _make(call, chosen, {k: values.pop(k) for k in own if k in values}, text)
    return _make(call, cls, {key: inner, **values, **given}, text)


def _make(call: Call, cls: Callable[..., T], values: Mapping[str, Any], text: str) -> T:
    try:
        return cls(**values)
    except DiffoptError as error:  # from __post_init__: a value out of range
        raise DiffoptError(error.message, text=text, span=call.span) from None


def _read(
    name: str, arguments: Sequence[Argument], hints: Mapping[str, Any], text: str
) -> dict[str, Any]:
    """Return the written values by field."""
    by_position = iter(hints)
    values: dict[str, Any] = {}
    for argument in _joined(arguments, hints):
        key = next(by_position, None) if argument.name is None else _field(argument.name)
        if key is None:
            message = f"{name} takes at most {len(hints)} options by position"
            raise DiffoptError(message, text=text, span=argument.span)
        if key not in hints:
            near = suggest(argument.name or "", map(_kebab, hints)) or "; it has none"
            message = f"{name} has no option '{argument.name}'{near}"
            raise DiffoptError(message, text=text, span=argument.span)
        if key in values:
            message = f"{name} was given '{_kebab(key)}' twice"
            raise DiffoptError(message, text=text, span=argument.span)
        try:
            values[key] = _convert(argument.value, hints[key])
        except ValueError:
            wanted = describe(hints[key])
            got = argument.value.text
            message = f"option '{_kebab(key)}' of {name} wants {wanted}, got '{got}'"
            raise DiffoptError(message, text=text, span=argument.value.span) from None
    return values


def _joined(arguments: Sequence[Argument], hints: Mapping[str, Any]) -> list[Argument]:
    """Read `keep=first:2,last:2` as `keep=(first:2,last:2)` where the option takes several values.

    Nothing else could follow an option with a name: what has no name comes before them.
    """
    joined: list[Argument] = []
    for argument in arguments:
        last = joined[-1] if joined else None
        many = last is not None and last.name is not None and _takes_many(hints, last.name)
        if last is None or argument.name is not None or not many:
            joined.append(argument)
            continue
        items = last.value.items or (last.value,)
        span = last.value.span[0], argument.value.span[1]
        text = f"{last.value.text},{argument.value.text}"
        value = Value(text, span, items=(*items, argument.value))
        joined[-1] = Argument(last.name, (last.span[0], span[1]), value)
    return joined


def _takes_many(hints: Mapping[str, Any], name: str) -> bool:
    return any(typing.get_origin(each) is tuple for each in _members(hints.get(_field(name))))


def unparse(name: str, instance: Any) -> str:
    """Return the text that binds back to `instance`: its name and the options that it changes."""
    kind = choice(type(instance))
    chosen = getattr(instance, kind[0]) if kind else None
    if kind is None or chosen is None:
        written = _written(instance)
    else:
        written = [chosen.name, *_written(chosen), *_written(instance, skip=kind[0])]
    return f"{name}({','.join(written)})" if written else name


def _written(instance: Any, skip: str | None = None) -> list[str]:
    """Return the options that differ from their defaults, as text."""
    written = []
    leading = skip is None  # words at the front need no name: cache(auto,budget=0.02)
    for key, hint in options(type(instance)).items():
        value = getattr(instance, key)
        if key == skip or value == _default(type(instance), key):
            leading = False
            continue
        leading = leading and isinstance(value, str)
        text = _format(value, hint)
        written.append(text if leading else f"{_kebab(key)}={text}")
    return written


def choice(cls: Any) -> tuple[str, type[Choice]] | None:
    """Return the field of a dataclass whose value a word chooses, and its type: the first only."""
    for key, hint in list(options(cls).items())[:1]:
        for kind in _members(hint):
            if isinstance(kind, type) and issubclass(kind, Choice):
                return key, kind
    return None


def options(cls: Any) -> dict[str, Any]:
    """Return the options of a dataclass in order, each with its type.

    A field with `written: False` in its metadata is none: what `bind` is given for it stands before
    the parentheses.
    """
    hints = typing.get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init and f.metadata.get("written", True)]
    return {f.name: hints[f.name] for f in fields}


def describe(hint: Any) -> str:
    """Say a type in the user's words: "int or none", "one of int8, fp8"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(each) for each in arguments)
    if origin is tuple:
        return f"a tuple of {describe(arguments[0])}"
    return "none" if hint is type(None) else str(hint.__name__)


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _field(name: str) -> str:
    return name.replace("-", "_")


def _default(cls: Any, key: str) -> Any:
    return next(f.default for f in dataclasses.fields(cls) if f.name == key)


# In a union the narrowest type that reads the text wins, whatever order the union is written in.
_ORDER = (type(None), bool, int, float)


def _convert(value: Value, hint: Any) -> Any:
    """Read one written value as `hint`; ValueError when it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for each in sorted(
            arguments,
            key=lambda each: _ORDER.index(each) if each in _ORDER else 9 + (each is str),
        ):
            try:
                return _convert(value, each)
            except ValueError:
                continue
        raise ValueError(value.text)
    if origin is tuple:
        items = (value,) if value.items is None else value.items
        return tuple(_convert(item, arguments[0]) for item in items)
    if value.items is not None:
        raise ValueError(value.text)
    if origin is Literal:
        for each in arguments:
            if str(each) == value.text:
                return each
        raise ValueError(value.text)
    if hint is str:
        return value.text
    words: dict[Any, dict[str, Any]] = {
        type(None): {"none": None},
        bool: {"true": True, "false": False},
    }
    if value.quoted:
        raise ValueError(value.text)
    if hint not in words:
        read = hint(value.text)
        if read != read:  # nan, which every comparison with a bound would let through
            raise ValueError(value.text)
        return read
    if value.text.lower() not in words[hint]:
        raise ValueError(value.text)
    return words[hint][value.text.lower()]


def _format(value: Any, hint: Any) -> str:
    """Write one value so that `_convert` reads it back as `hint`."""
    if isinstance(value, tuple):
        (inner, *_) = [each for each in _members(hint) if typing.get_origin(each) is tuple]
        return f"({','.join(_format(item, typing.get_args(inner)[0]) for item in value)})"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"""[^\s,()="']+""", value):
        read = _convert(Value(value, (0, 0)), hint)
        if read == value and isinstance(read, str):
            return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)
