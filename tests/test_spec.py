"""The text form of passes and targets: what parses, what it prints, and every error message."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffopt import spec
from diffopt.errors import DiffoptError
from diffopt.spec import option


@dataclass(frozen=True)
class Cache:
    mode: Literal["auto", "off"] | None = option(None, "which values to reuse")
    budget: float = option(0.0, "relative error that is allowed")
    layers: tuple[str, ...] = option((), "layers to leave alone")
    max_bytes: int | None = option(None, "largest cache")
    eager: bool = option(False, "do not wait")
    label: str | int = option("", "a name or a number")

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise DiffoptError("budget is not negative")


def read(text: str) -> list[Cache]:
    return [spec.bind(call, Cache, text) for call in spec.parse(text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cache", Cache()),
        ("cache()", Cache()),
        ("cache(auto)", Cache("auto")),
        ("cache(auto,0.5)", Cache("auto", 0.5)),
        ("cache( auto , budget = 1e-3 )", Cache("auto", 0.001)),
        ("cache(layers=a,b:2,budget=0.5)", Cache(layers=("a", "b:2"), budget=0.5)),
        ("cache(layers=(a,b),c)", Cache(layers=("a", "b", "c"))),
        ("cache(max-bytes=1_000)", Cache(max_bytes=1000)),
        ("cache(max_bytes=none,eager=TRUE)", Cache(eager=True)),
        ("cache(layers=(a,'b c'))", Cache(layers=("a", "b c"))),
        ("cache(layers=a)", Cache(layers=("a",))),
        ("cache(layers=())", Cache()),
        ("cache(label=5)", Cache(label=5)),
        ("cache(label='5')", Cache(label="5")),
        ('cache(label="a\\"b")', Cache(label='a"b')),
    ],
)
def test_reads(text: str, value: Cache) -> None:
    assert read(text) == [value]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Cache(), "cache"),
        (Cache("auto", 0.02), "cache(auto,budget=0.02)"),
        (Cache(None, 0.02), "cache(budget=0.02)"),
        (Cache(layers=("a", "b,c"), eager=True), 'cache(layers=(a,"b,c"),eager=true)'),
        (Cache(max_bytes=3, label="7"), 'cache(max-bytes=3,label="7")'),
    ],
)
def test_writes(value: Cache, text: str) -> None:
    assert spec.unparse("cache", value) == text


def test_reads_several() -> None:
    calls = spec.parse(" a , b-c(1),\nh100:tensorrt ")
    assert [call.name for call in calls] == ["a", "b-c", "h100:tensorrt"]
    assert spec.parse("") == spec.parse("  ") == []


@given(
    st.builds(
        Cache,
        mode=st.sampled_from(["auto", "off", None]),
        budget=st.floats(0, allow_nan=False),
        layers=st.lists(st.text()).map(tuple),
        max_bytes=st.none() | st.integers(),
        eager=st.booleans(),
        label=st.text() | st.integers(),
    )
)
def test_round_trip(value: Cache) -> None:
    text = spec.unparse("cache", value)
    (again,) = read(text)
    assert again == value
    assert type(again.label) is type(value.label)


@given(st.text(alphabet="ab(),='\" \n-1\\"))
def test_any_text_parses_or_is_one_clear_error(text: str) -> None:
    try:
        read(text)
        message = ""
    except DiffoptError as error:
        message = str(error)
    assert len(message.splitlines()) in (0, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cache(max-bites=1)",
            """\
cache has no option 'max-bites'; did you mean 'max-bytes'?
  cache(max-bites=1)
        ^^^^^^^^^""",
        ),
        (
            "cache(zzz=1)",
            """\
cache has no option 'zzz'; there are budget, eager, label, layers, max-bytes, mode
  cache(zzz=1)
        ^^^""",
        ),
        (
            "cache(eager=maybe)",
            """\
option 'eager' of cache wants bool, got 'maybe'
  cache(eager=maybe)
              ^^^^^""",
        ),
        (
            "cache(max-bytes=1.5)",
            """\
option 'max-bytes' of cache wants int or none, got '1.5'
  cache(max-bytes=1.5)
                  ^^^""",
        ),
        (
            "cache(autp)",
            """\
option 'mode' of cache wants one of auto, off or none, got 'autp'
  cache(autp)
        ^^^^""",
        ),
        (
            "cache(budget=nan)",
            """\
option 'budget' of cache wants float, got 'nan'
  cache(budget=nan)
               ^^^""",
        ),
        (
            "cache(budget=(1,2))",
            """\
option 'budget' of cache wants float, got '(1,2)'
  cache(budget=(1,2))
               ^^^^^""",
        ),
        (
            "cache(budget=-1)",
            """\
budget is not negative
  cache(budget=-1)
  ^^^^^""",
        ),
        (
            "cache(auto,mode=off)",
            """\
cache was given 'mode' twice
  cache(auto,mode=off)
             ^^^^""",
        ),
        (
            "cache(auto,1,a,2,true,b,c)",
            """\
cache takes at most 6 options by position
  cache(auto,1,a,2,true,b,c)
                          ^""",
        ),
        (
            "a,cache(auto",
            """\
this '(' has no ')'
  a,cache(auto
         ^""",
        ),
        (
            "cache(layers=(a,b)",
            """\
this '(' has no ')'
  cache(layers=(a,b)
       ^""",
        ),
        (
            "cache)",
            """\
unexpected ')'
  cache)
       ^""",
        ),
        (
            "a cache",
            """\
expected ',' before the next pass
  a cache
    ^^^^^""",
        ),
        (
            "a,",
            """\
expected a pass name
  a,
    ^""",
        ),
        (
            "cache(auto,,)",
            """\
expected a value
  cache(auto,,)
             ^""",
        ),
        (
            "cache('a)",
            """\
this quote is not closed
  cache('a)
        ^""",
        ),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        read(text)
    assert str(caught.value) == message
