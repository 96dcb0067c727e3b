"""The comparison with other packages: its document, and that both sides compute the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffopt.core import Pipeline
from diffopt.engine.engine import build
from examples.caching.peers import document, schedules
from examples.caching.peers.document import BEGIN, END
from examples.caching.peers.measure import (
    COMPILED,
    EAGER,
    ENGINE,
    UNCACHED,
    UNCACHED_COMPILED,
)
from examples.caching.peers.pairs import PEERS
from examples.caching.peers.pipelines import REQUESTS, images_of, unrolled
from examples.study.models import load

STEPS = 6


def row(**changes: Any) -> dict[str, Any]:
    names = (UNCACHED, UNCACHED_COMPILED, EAGER, COMPILED, ENGINE)
    times = {
        name: {"median": 0.1 / (i + 1), "spread": 0.002, "seconds": [0.1], "max_abs": 0.0}
        for i, name in enumerate(names)
    }
    return {
        "package": "DeepCache",
        "version": "0.1.1",
        "call": "`DeepCacheSDHelper`",
        "cache": "cache(deepcache)",
        "steps": 50,
        "same layers": True,
        "seeds": 4,
        "max_abs": 6e-7,
        "mean_abs": 1.3e-8,
        "cache max_abs": 0.1,
        "compile": {"graphs": 51, "breaks": 2, "seconds": 112.4},
        "contenders": times,
        **changes,
    }


MACHINE = {"cpu": "a CPU", "capability": "AVX2", "cores": 2, "threads": 2, "torch": "2.13"}


def test_document() -> None:
    text = document.document({"machine": MACHINE, "rows": {"deepcache-3": row()}})
    lines = text.splitlines()
    assert "DeepCache 0.1.1, on a CPU (AVX2), 2 threads, torch 2.13" in text
    images = "| DeepCache | `DeepCacheSDHelper` | `cache(deepcache)` | yes | 6.0e-07 | 1.3e-08 |"
    assert f"{images} 0.10 |" in lines
    times = "100.0 ± 1.0 | 50.0 ± 1.0 | 33.3 ± 1.0 | 25.0 ± 1.0 | 20.0 ± 1.0 | 1.67× | 1.25× |"
    assert f"| DeepCache, `cache(deepcache)` | 50 | {times}" in lines
    assert "- DeepCache, `cache(deepcache)`: 51 graphs, 2 graph breaks, 112 s" in lines


def test_document_without_what_did_not_compile() -> None:
    uncompiled = row(compile={"error": "Oops: no"}, **{"same layers": False})
    del uncompiled["contenders"][COMPILED]
    lines = document.document(
        {"machine": MACHINE, "rows": {"deepcache-3": uncompiled}}
    ).splitlines()
    times = "100.0 ± 1.0 | 50.0 ± 1.0 | 33.3 ± 1.0 | - | 20.0 ± 1.0 | 1.67× | - |"
    assert f"| DeepCache, `cache(deepcache)` | 50 | {times}" in lines
    assert "- DeepCache, `cache(deepcache)`: Oops: no" in lines
    assert any("`cache(deepcache)` | no |" in line for line in lines)


@pytest.mark.parametrize(
    ("cache", "shown"),
    [
        ("cache(magcache,ratios=(1.0,0.99,1.01,0.9,1.0,1.0))", "cache(magcache,ratios=…)"),
        ("cache(dual-block,1001001001)", "cache(dual-block,…)"),
        ("cache(mask,1100101)", "cache(mask,1100101)"),
    ],
)
def test_long_options_are_not_shown(cache: str, shown: str) -> None:
    assert document.short({"cache": cache}) == f"`{shown}`"


def test_the_section_is_put_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "caching.md"
    path.write_text(f"# Caching\n\n{BEGIN}\nold\n{END}\n\n## More\n")
    document.put("new\n", path)
    document.put("newer\n", path)
    assert path.read_text() == f"# Caching\n\n{BEGIN}\n\nnewer\n\n{END}\n\n## More\n"


def test_signs() -> None:
    assert schedules.signs([{"a", "b"}, {"a"}, set(), {"a", "b"}]) == "#+-#"


def test_a_package_that_is_not_installed_has_no_version() -> None:
    peer = replace(PEERS["reuse"], package="no-such-package")
    assert peer.version is None
    assert PEERS["reuse"].version is not None


@pytest.mark.parametrize("key", ["deepcache-3", "deepcache-deep", "pyramid", "cache-dit-fast"])
def test_the_same_layers_and_the_same_image(key: str, tmp_path: Path) -> None:
    peer = PEERS[key]
    if peer.version is None:
        pytest.skip(f"{peer.package} is not installed")
    cached = Pipeline((peer.pass_(STEPS),)).run(unrolled(peer.model, STEPS))
    pipe = load(peer.model)
    plain = images_of(peer.model, pipe, STEPS)(0)
    make = images_of(peer.model, pipe, STEPS, peer.install(pipe, STEPS))
    paths = schedules.layers(peer, STEPS)
    expected = schedules.computed_by_peer(pipe, make, paths)
    assert schedules.computed_by_engine(cached, peer, STEPS) == expected
    assert set(schedules.signs(expected)) > {"#"}
    assert expected[0] == {*paths}
    engine = build(cached, "eager", tmp_path / "cached.engine")
    images = engine(**REQUESTS[peer.model], seed=0, output_type="pt").images
    torch.testing.assert_close(images, make(0), rtol=0, atol=1e-5)
    assert (images - plain).abs().max() > 1e-3, "nothing was cached"
