"""The cache policies' schedules against the papers' rules, and how policies are found and written.

The lists were made with the authors' packages where there are some: DeepCache 0.1.1, tgate 1.0.0,
pruna's FORA, Roblox/SmoothCache, hutaiHang/Faster-Diffusion.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import mag_cache
from diffusers.hooks.taylorseer_cache import TaylorSeerState

import diffopt.caching.policies
from diffopt import plugins, spec
from diffopt.caching import policy
from diffopt.caching.policies import (
    deepcache,
    delta_dit,
    faster_diffusion,
    fora,
    magcache,
    smoothcache,
    t_gate,
    taylorseer,
)
from diffopt.caching.policy import Policy, find_policy, policy_names
from diffopt.cli import list as list_command
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError

FLUX = [round(float(ratio), 5) for ratio in mag_cache.FLUX_MAG_RATIOS]


# Schedules


def test_deepcache_computes_every_nth_step() -> None:
    assert deepcache.Deepcache(interval=3).schedule(10) == [0, 3, 6, 9]
    assert deepcache.Deepcache(interval=1, nonuniform=True).schedule(4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ((50, 5, 15, 1.4), [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        ((50, 10, 15, 1.4), [0, 9, 17, 26, 37]),
        ((50, 3, 15, 1.4), [0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46]),
        ((20, 5, 5, 1.4), [0, 4, 8, 13]),
        ((50, 5, 10, 1.2), [0, 5, 9, 12, 16, 21, 26, 32, 38, 43]),
        ((20, 2, 10, 2.0), [0, 2, 4, 7, 9, 10, 12, 14, 16, 18]),  # less uneven than asked for
    ],
)
def test_deepcache_nonuniform(options: Any, computed: list[int]) -> None:
    assert deepcache.nonuniform(*options) == computed


def test_deepcache_says_where_no_such_steps_are() -> None:
    with pytest.raises(DiffoptError) as caught:
        deepcache.nonuniform(10, 2, 5, 1.4)
    assert str(caught.value) == (
        "no 5 of 10 steps are as uneven as pow=1.4 about center=5; use another center"
    )


def test_faster_diffusion_has_the_papers_key_steps() -> None:
    assert faster_diffusion.key_steps(50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert faster_diffusion.key_steps(25) == [0, 1, 2, 5, 7, 12, 17]


def test_fora_computes_the_first_steps_then_every_nth() -> None:
    assert fora.computed(10, 3) == [0, 3, 6, 9]
    assert fora.computed(10, 2, 3) == [0, 1, 2, 3, 5, 7, 9]
    assert fora.computed(3, 2, 5) == [0, 1, 2]


def test_delta_dit_skips_rear_blocks_first() -> None:
    assert delta_dit.schedule(8, 2, 4) == [
        *("all", "front", "all", "front"),
        *("all", "rear", "all", "rear"),
    ]
    assert delta_dit.schedule(4, 3, 2) == ["all", "front", "rear", "all"]


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ((25, 10, 2, 5, 1), [0, 1, 2, 5, 9, *range(10, 25)]),
        ((25, 10, 2, 1, 1), [*range(25)]),
        ((12, 5, 0, 3, 2), [0, 3, 4, 6, 8, 10]),
        ((12, 2, 4, 3, 3), [0, 1, 3, 6, 9]),
    ],
)
def test_t_gate_self_attention(options: Any, computed: list[int]) -> None:
    assert t_gate.self_attention(*options) == computed


def test_taylorseer_computes_what_diffusers_computes() -> None:
    assert taylorseer.schedule(28, 5, 3) == [0, 1, 2, 4, 9, 14, 19, 24]
    assert taylorseer.schedule(6, 1, 3) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_weights_are_those_of_diffusers(order: int) -> None:
    computed = taylorseer.schedule(28, 5, 3)
    features = torch.randn(28, 6, dtype=torch.float64)
    state = TaylorSeerState(torch.float64, order)
    for state.current_step in range(28):
        if state.current_step in computed:
            state.update((features[state.current_step],))
            continue
        earlier = [step for step in computed if step < state.current_step]
        weights = taylorseer.extrapolate(earlier, state.current_step, order)
        assert len(weights) <= order + 1
        assert sum(weights.values()) == pytest.approx(1)
        torch.testing.assert_close(
            sum(weight * features[step] for step, weight in weights.items()), *state.predict()
        )


@pytest.mark.parametrize(
    ("threshold", "computed"),
    [
        (0.06, [0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 24, 26, 27]),
        (0.12, [0, 1, 2, 3, 4, 5, 8, 11, 15, 19, 23, 26]),
        (0.24, [0, 1, 2, 3, 4, 5, 9, 13, 17, 21, 25]),
    ],
)
def test_magcache_with_the_ratios_of_flux(threshold: float, computed: list[int]) -> None:
    assert magcache.schedule(FLUX, threshold, 3, 0.2) == computed


@pytest.mark.parametrize("steps", [1, 2, 20, 28, 50])
def test_magcache_takes_the_nearest_ratios_of_other_numbers_of_steps(steps: int) -> None:
    expected = mag_cache.nearest_interp(torch.tensor(FLUX), steps)
    assert magcache.nearest(FLUX, steps) == pytest.approx(expected.tolist())


def test_smoothcache_goes_as_far_as_errors_are_small() -> None:
    one = [0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    two = [0.3, 0.3, 0.3, 0.1, 0.3, 0.3, 0.1, 0.1]
    assert smoothcache.schedule([one, two], 0.2, 3) == [0, 2, 3, 6, 9]
    assert smoothcache.schedule([one, two], 0.2, 1) == [0, 2, 3, 5, 7, 9]
    assert smoothcache.schedule([one, two], 0.0, 3) == [*range(10)]
    assert smoothcache.schedule([one, two], 0.5, 3) == [0, 3, 6, 9]
    assert smoothcache.schedule([one[:3], two[:2]], 0.5, 3) == [0, 3]  # the last one computes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "errors={path} can't be read: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "{wants}"),
        ('{"mlp": []}', "{wants}"),
        ('{"mlp": [[1, 2], [1]]}', "{wants}"),
        ('{"mlp": [[1, 2, "3"], [1, 2]]}', "{wants}"),
        ('{"mlp": [[1, 2, 3], 1]}', "{wants}"),
    ],
)
def test_smoothcache_refuses_a_file_that_says_too_little(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "errors.json"
    path.write_text(text)
    wants = (
        f"errors={path} wants for 'mlp' a list of rows of numbers, row k of at least 4 - k: "
        "the relative errors between steps i and i + k"
    )
    with pytest.raises(DiffoptError) as caught:
        smoothcache.read_errors(str(path), ["mlp"], 4)
    assert str(caught.value) == message.format(path=path, wants=wants)


def test_smoothcache_reads_a_table_for_more_steps(tmp_path: Path) -> None:
    path = tmp_path / "errors.json"
    path.write_text('{"mlp": [[1, 2, 3, 4], [5, 6, 7]], "attention": []}')
    assert smoothcache.read_errors(str(path), ["mlp"], 4) == {"mlp": [[1, 2, 3], [5, 6]]}


# The text form


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_prints_and_parses(name: str) -> None:
    cls = find_policy(name)
    (step,) = Pipeline.parse(f"cache({name})").passes
    assert getattr(step, "policy", None) == cls()
    assert str(step) == f"cache({name})"
    assert set(spec.options(cls)).isdisjoint({"policy", "max_cache_mb", "budget"})
    assert (cls.__doc__ or "").splitlines()[0].endswith(".")
    for key in spec.options(cls):
        assert cls.__dataclass_fields__[key].metadata["help"]


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("cache(deepcache,5)", "cache(deepcache,interval=5)"),
        ("cache(deepcache,interval=3,branch=2,budget=0.1)", "cache(deepcache,branch=2,budget=0.1)"),
        ("cache(policy=fora,start=2)", "cache(fora,start=2)"),
        ("cache(mask,1100)", "cache(mask,1100)"),
        ("cache( mask , 1100, values=deep)", "cache(mask,1100,deep)"),
        ("cache(mask,'1',max-cache-mb=2)", "cache(mask,1,max-cache-mb=2.0)"),
        ("cache(magcache,ratios=(1,1.5))", "cache(magcache,ratios=(1.0,1.5))"),
        ("cache(faster-diffusion,key_steps=(0,2))", "cache(faster-diffusion,key-steps=(0,2))"),
        ("cache(max-cache-mb=1)", "cache(max-cache-mb=1.0)"),
    ],
)
def test_text(text: str, again: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == again
    assert Pipeline.parse(again) == pipeline


ALL = ", ".join(policy_names())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "unroll,cache(deepcash)",
            """\
there is no cache policy 'deepcash'; did you mean 'deepcache'?
  unroll,cache(deepcash)
               ^^^^^^^^""",
        ),
        (
            "cache(zzz,interval=3)",
            f"""\
there is no cache policy 'zzz'; there are {ALL}
  cache(zzz,interval=3)
        ^^^""",
        ),
        (
            "cache(deepcache,intervall=3)",
            """\
cache(deepcache) has no option 'intervall'; did you mean 'interval'?
  cache(deepcache,intervall=3)
                  ^^^^^^^^^""",
        ),
        (
            "cache(deepcache,max-cash-mb=3)",
            """\
cache(deepcache) has no option 'max-cash-mb'; did you mean 'max-cache-mb'?
  cache(deepcache,max-cash-mb=3)
                  ^^^^^^^^^^^""",
        ),
        (
            "cache(interval=3)",
            """\
cache has no option 'interval'; there are budget, max-cache-mb, policy
  cache(interval=3)
        ^^^^^^^^""",
        ),
        (
            "cache(fora,interval=x)",
            """\
option 'interval' of cache(fora) wants int, got 'x'
  cache(fora,interval=x)
                      ^""",
        ),
        (
            "cache(fora,3,interval=4)",
            """\
cache(fora) was given 'interval' twice
  cache(fora,3,interval=4)
               ^^^^^^^^""",
        ),
        (
            "cache(fora,1,2,3,0.5,6)",
            """\
cache(fora) takes at most 4 options by position
  cache(fora,1,2,3,0.5,6)
                       ^""",
        ),
        (
            "unroll,cache(deepcache,interval=0)",
            """\
deepcache wants interval >= 1, branch >= 0, center >= 0, pow > 1
  unroll,cache(deepcache,interval=0)
         ^^^^^""",
        ),
        (
            "cache(fora,interval=0)",
            """\
fora wants interval >= 1 and start >= 0
  cache(fora,interval=0)
  ^^^^^""",
        ),
        (
            "cache(delta-dit,range=0)",
            """\
delta-dit wants interval >= 1, bound >= 0 and range >= 1
  cache(delta-dit,range=0)
  ^^^^^""",
        ),
        (
            "cache(t-gate,gate=0)",
            """\
t-gate wants gate >= 1, sp-interval >= 1, fi-interval >= 1 and warm-up >= 0
  cache(t-gate,gate=0)
  ^^^^^""",
        ),
        (
            "cache(taylorseer,warm-up=0)",
            """\
taylorseer wants order >= 0, interval >= 1 and warm-up >= 1
  cache(taylorseer,warm-up=0)
  ^^^^^""",
        ),
        (
            "cache(magcache,retain=2)",
            """\
magcache wants threshold >= 0, max-skip >= 0, retain in 0…1 and calls >= 1
  cache(magcache,retain=2)
  ^^^^^""",
        ),
        (
            "cache(smoothcache,max-interval=0)",
            """\
smoothcache wants alpha >= 0, max-interval >= 1 and calls >= 1
  cache(smoothcache,max-interval=0)
  ^^^^^""",
        ),
        (
            "cache(faster-diffusion,key-steps=(1,2))",
            """\
faster-diffusion wants key-steps that go up and begin with 0
  cache(faster-diffusion,key-steps=(1,2))
  ^^^^^""",
        ),
        (
            "cache(mask,0110)",
            """\
mask wants digits 0 and 1, the first a 1: cache(mask,1100101)
  cache(mask,0110)
  ^^^^^""",
        ),
        (
            "cache(fora,budget=-1)",
            """\
cache wants max-cache-mb >= 0 and budget >= 0
  cache(fora,budget=-1)
  ^^^^^""",
        ),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse(text)
    assert str(caught.value) == message


def test_the_listing_shows_policies_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    list_command.passes("cache", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert [option["name"] for option in row["options"]] == ["policy", "max-cache-mb", "budget"]
    choices = {choice["name"]: choice for choice in row["choices"]}
    assert [*choices] == policy_names()
    assert choices["fora"]["options"][0] == {
        "name": "interval",
        "type": "int",
        "default": 3,
        "help": "compute every N steps",
    }
    list_command.passes("cache", as_json=False)
    assert "options of cache(fora)" in capsys.readouterr().out


# Plug-ins


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which policies are found too."""
    monkeypatch.setattr(
        diffopt.caching.policies, "__path__", [*diffopt.caching.policies.__path__, str(tmp_path)]
    )
    monkeypatch.setattr(policy, "_sources", policy._sources.__wrapped__)
    yield tmp_path
    sys.modules.pop("diffopt.caching.policies.not_one", None)


def test_a_file_that_is_no_policy_is_named(folder: Path) -> None:
    (folder / "not_one.py").write_text("NotOne = 3\n")
    with pytest.raises(DiffoptError) as caught:
        Pipeline.parse("cache(not-one)")
    assert caught.value.message == (
        "diffopt.caching.policies.not_one:NotOne is not a Policy named 'not-one'"
    )


def test_two_policies_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="fora", value="other:Fora")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    monkeypatch.setattr(policy, "_sources", policy._sources.__wrapped__)
    with pytest.raises(DiffoptError) as caught:
        find_policy("fora")
    assert str(caught.value) == (
        "two cache policies are called 'fora': diffopt.caching.policies.fora:Fora and other:Fora; "
        "uninstall or rename one"
    )


def test_names_follow_the_module() -> None:
    assert all(issubclass(find_policy(name), Policy) for name in policy_names())
    assert {"deepcache", "delta-dit", "faster-diffusion", "fora", "magcache"} <= {*policy_names()}
    assert {"mask", "smoothcache", "t-gate", "taylorseer"} <= {*policy_names()}
