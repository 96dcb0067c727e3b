"""Reads and writes the text form of passes and targets: `unroll(steps=20),hoist,cache(auto)`.

    text   = call ("," call)*
    call   = NAME ["(" [option ("," option)*] ")"]
    option = [NAME "="] value
    value  = WORD | STRING | "(" [value ("," value)*] ")"

Options are the fields of a frozen dataclass, written in kebab-case; a value without a name is bound
by position, or to the named tuple option before it: `keep=first:2,last:2` is
`keep=(first:2,last:2)`. A field whose type is a `Choice` is written as a word, and the options of
the chosen class are written in the same call: `cache(deepcache,interval=3,max-cache-mb=64)`.
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
    """A dataclass of options, selected by a word; the first field of a pass may have this type."""

    name: ClassVar[str]

    @classmethod
    def find(cls, word: str) -> type[Choice]:
        """Return the class called `word`, or raise a DiffoptError that names all."""
        raise NotImplementedError

    @classmethod
    def words(cls) -> list[str]:
        """Return the names of all classes."""
        raise NotImplementedError


def option(default: T, help: str) -> T:
    """Declare an option of a pass or a target: a dataclass field with a sentence of help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Value:
    """A written value: a word, a string in quotes, or a tuple of values."""

    text: str
    span: Span
    quoted: bool = False
    items: tuple[Value, ...] | None = None


@dataclass(frozen=True)
class Argument:
    """A written option; its name is None if it is bound by position."""

    name: str | None
    span: Span
    value: Value


@dataclass(frozen=True)
class Call:
    """A written pass or target, with its options and the span of its name in the text."""

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
    """Parse `text` into calls; `noun` is what error messages call one."""
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
        index = self.at + ahead
        return self.tokens[index].group() if index < len(self.tokens) else None

    def accept(self, mark: str) -> bool:
        matches = self.peek() == mark
        self.at += matches
        return matches

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


def bind(call: Call, cls: Callable[..., T], text: str, **fields: Any) -> T:
    """Return an instance of the dataclass `cls` with the options written in `call`.

    `fields` are values of fields that are no options.
    """
    hints = options(cls)
    selector = choice(cls)
    first = call.arguments[0] if call.arguments else None
    if selector is None or first is None or first.name not in (None, _kebab(selector[0])):
        values = _read(call.name, call.arguments, hints, text)
        return _make(call, cls, {**values, **fields}, text)
    key, base = selector
    try:
        chosen = base.find(first.value.text)
    except DiffoptError as error:
        raise DiffoptError(error.message, text=text, span=first.value.span) from None
    del hints[key]
    inner_hints = options(chosen)
    name = f"{call.name}({chosen.name})"
    values = _read(name, call.arguments[1:], {**inner_hints, **hints}, text)
    inner = _make(call, chosen, {k: values.pop(k) for k in inner_hints if k in values}, text)
    return _make(call, cls, {key: inner, **values, **fields}, text)


def _make(call: Call, cls: Callable[..., T], values: Mapping[str, Any], text: str) -> T:
    try:
        return cls(**values)
    except DiffoptError as error:  # from __post_init__: a value out of range
        raise DiffoptError(error.message, text=text, span=call.span) from None


def _read(
    name: str, arguments: Sequence[Argument], hints: Mapping[str, Any], text: str
) -> dict[str, Any]:
    """Return the written values by field; a wrong option or value is a DiffoptError."""
    by_position = iter(hints)
    values: dict[str, Any] = {}
    for argument in _join_tuples(arguments, hints):
        key = next(by_position, None) if argument.name is None else _snake(argument.name)
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


def _join_tuples(arguments: Sequence[Argument], hints: Mapping[str, Any]) -> list[Argument]:
    """Return `keep=first:2,last:2` as `keep=(first:2,last:2)` where the option is a tuple.

    An argument without a name behind a named one can mean nothing else.
    """
    joined: list[Argument] = []
    for argument in arguments:
        last = joined[-1] if joined else None
        many = last is not None and last.name is not None and _is_tuple(hints, last.name)
        if last is None or argument.name is not None or not many:
            joined.append(argument)
            continue
        items = last.value.items or (last.value,)
        span = last.value.span[0], argument.value.span[1]
        text = f"{last.value.text},{argument.value.text}"
        value = Value(text, span, items=(*items, argument.value))
        joined[-1] = Argument(last.name, (last.span[0], span[1]), value)
    return joined


def _is_tuple(hints: Mapping[str, Any], name: str) -> bool:
    return any(typing.get_origin(each) is tuple for each in _members(hints.get(_snake(name))))


def unparse(name: str, instance: Any) -> str:
    """Return the text that binds to `instance`: its name and the options that are not default."""
    selector = choice(type(instance))
    chosen = getattr(instance, selector[0]) if selector else None
    if selector is None or chosen is None:
        written = _written(instance)
    else:
        written = [chosen.name, *_written(chosen), *_written(instance, skip=selector[0])]
    return f"{name}({','.join(written)})" if written else name


def _written(instance: Any, skip: str | None = None) -> list[str]:
    """Return the text of the options that differ from their defaults."""
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
    """Return the name and type of a dataclass's first field if that is a `Choice`."""
    for key, hint in list(options(cls).items())[:1]:
        for kind in _members(hint):
            if isinstance(kind, type) and issubclass(kind, Choice):
                return key, kind
    return None


def options(cls: Any) -> dict[str, Any]:
    """Return the type of each option of a dataclass, in order.

    A field with `written: False` in its metadata is no option: its value is not written in the
    parentheses.
    """
    hints = typing.get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init and f.metadata.get("written", True)]
    return {f.name: hints[f.name] for f in fields}


def describe(hint: Any) -> str:
    """Return a type in the user's words: "int or none", "one of int8, fp8"."""
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


def _snake(name: str) -> str:
    return name.replace("-", "_")


def _default(cls: Any, key: str) -> Any:
    return next(f.default for f in dataclasses.fields(cls) if f.name == key)


# A union is read as its narrowest type that can read the text, whatever order it is written in.
_ORDER = (type(None), bool, int, float)


def _convert(value: Value, hint: Any) -> Any:
    """Return a written value as type `hint`; raise a ValueError if it is none."""
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
    """Return the text of a value that `_convert` reads back as `hint`."""
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
