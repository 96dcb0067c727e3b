"""Enumerates how texts may be made of a caller's texts."""

from collections.abc import Iterator, Sequence

from diffopt.host.arguments import Place
from diffopt.host.cleaners import CLEANERS


def templates(
    texts: Sequence[tuple[Place, str]], text: str
) -> Iterator[tuple[str | tuple[Place, str], ...]]:
    """Yield the parts of each `Text` of literals and cleaned texts that renders a text."""
    if not texts:
        yield (text,) if text else ()
        return
    place, value = texts[0]
    for clean, function in CLEANERS.items():
        cleaned = function(value)
        if cleaned and cleaned in text:
            before, after = text.split(cleaned, 1)
            for left in templates(texts[1:], before):
                yield from ((*left, (place, clean), *right) for right in templates(texts, after))
    yield from templates(texts[1:], text)
