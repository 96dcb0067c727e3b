"""Numbers of tokens that a tokenizer returned as lists: what Python makes and reads of them.

Python may join such lists to others and make a tensor of the whole. How many there are, and each of
which Python asks, is noted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffopt.host.arguments import Place, items

Note = Callable[[str, Any], None]
"""Called with what was read ("count" or "all") and its value."""

Known = Mapping[Any, tuple[list[int], list[int]]]
"""Lists that tokenizers returned: by where, in this run and in the one with other texts."""


class TrackedTokens(list):  # type: ignore[type-arg]
    """The numbers of a text's tokens."""

    note: Note

    @staticmethod
    def make(numbers: list[int], note: Note) -> "TrackedTokens":
        """Return a list that hands each read of it to `note`."""
        tracked = TrackedTokens(numbers)
        tracked.note = note
        return tracked

    def plain(self) -> list[int]:
        """Return the numbers, which is no read."""
        return [int(number) for number in list.__iter__(self)]

    def __len__(self) -> int:
        count = list.__len__(self)
        self.note("count", count)
        return count

    def __iter__(self) -> Iterator[Any]:
        return (_Token.make(number, self) for number in list.__iter__(self))


class _Token(int):
    owner: TrackedTokens

    @staticmethod
    def make(number: int, owner: TrackedTokens) -> "_Token":
        token = _Token(number)
        token.owner = owner
        return token


def _reading(kind: type, name: str) -> None:
    original = getattr(kind, name)

    def method(self: Any, *args: Any) -> Any:
        owner = self if isinstance(self, TrackedTokens) else self.owner
        owner.note("all", owner.plain())
        return original(self, *args)

    setattr(kind, name, method)


for _name in ("__getitem__", "__contains__", "__eq__", "__ne__", "index", "count"):
    _reading(TrackedTokens, _name)
_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "and", "or", "xor")
for _name in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__bool__"),
    *("__repr__", "__str__", "__format__", "__neg__", "__abs__", "__float__", "__invert__"),
    *(f"__{side}{name}__" for name in _ARITHMETIC for side in ("", "r")),
):
    _reading(_Token, _name)
_reading(TrackedTokens, "__repr__")


def plain_tokens(value: Any) -> Any:
    """Return nested lists, tuples and dictionaries with plain lists in place of tracked ones."""
    if isinstance(value, TrackedTokens):
        return value.plain()
    if type(value) in (list, tuple):
        return type(value)(map(plain_tokens, value))
    if type(value) is dict:
        return {key: plain_tokens(part) for key, part in value.items()}
    return int(value) if isinstance(value, _Token) else value


def nested_numbers(value: Any) -> list[Any] | None:
    """Return nested lists of whole numbers as plain lists; None of anything else."""
    if not isinstance(value, (list, tuple)):
        return None
    rows: list[Any] = []
    for part in value:
        is_number = isinstance(part, int) and type(part) is not bool
        row = int(part) if is_number else nested_numbers(part)
        if row is None:
            return None
        rows.append(row)
    return rows


def token_lists(result: Any) -> list[tuple[Place, list[int]]]:
    """Return the lists of whole numbers in a host call's result, by place."""
    return [*_lists(result, ())]


def _lists(value: Any, place: Place) -> Iterator[tuple[Place, list[int]]]:
    if isinstance(value, list) and value and all(isinstance(v, int) for v in list.__iter__(value)):
        yield place, [int(number) for number in list.__iter__(value)]
    elif not isinstance(value, TrackedTokens):
        for key, part in items(value) or ():
            yield from _lists(part, (*place, key))


def tracked(result: Any, note: Callable[[Place, str, Any], None]) -> Any:
    """Return a host call's result with tracked lists in place of those of whole numbers."""

    def visit(value: Any, place: Place) -> Any:
        if any(at == () for at, _ in _lists(value, ())):
            return TrackedTokens.make(value, lambda what, read: note(place, what, read))
        if isinstance(value, list):
            return [visit(part, (*place, index)) for index, part in enumerate(value)]
        if isinstance(value, Mapping):
            for key, part in list(value.items()):
                if token_lists(part):
                    value[key] = visit(part, (*place, key))  # type: ignore[index]
        return value

    return visit(result, ())


def parts_of(final: Sequence[int], probe: Sequence[int], known: Known) -> list[Any] | None:
    """Return how a list is joined of known ones and of numbers; None where that is not seen.

    A number stands for itself, and {"of": where} for a known list.
    """
    parts: list[Any] = []
    i = j = 0
    while i < len(final) or j < len(probe):
        for where, (ours, theirs) in known.items():
            here = final[i : i + len(ours)], probe[j : j + len(theirs)]
            if ours != theirs and here == (ours, theirs):
                parts.append({"of": where})
                i, j = i + len(ours), j + len(theirs)
                break
        else:
            if i >= len(final) or j >= len(probe) or final[i] != probe[j]:
                return None
            parts.append(final[i])
            i, j = i + 1, j + 1
    return parts
