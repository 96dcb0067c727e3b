"""Which share each group loses: in what order, and that what is measured is what removal does."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import fx

from diffopt.core.equivalence import squared_relative_error
from diffopt.execution.calibration_inputs import requests
from diffopt.execution.trajectories import run_root
from diffopt.ir.program import Program
from diffopt.pruning import ratio_search
from diffopt.pruning.ablation import Ablation
from diffopt.pruning.coupling import Unit, couple
from diffopt.pruning.importance import importance
from diffopt.pruning.ratio_search import RatioChoice, RatioTrial, hull_steps
from diffopt.pruning.removal import remove
from diffopt.pruning.selection import unit_scores
from tests import loops
from tests.zoo import traced


def trials(*pairs: tuple[float, int]) -> list[RatioTrial]:
    return [RatioTrial([], error, saved) for error, saved in pairs]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # The cheaper group first, each in the order of its shares.
        ([trials((4, 1), (12, 2)), trials((1, 1), (6, 2))], [(1, 0), (0, 0), (1, 1), (0, 1)]),
        # A share that costs more than a larger one does is passed over.
        ([trials((4, 1), (4, 2))], [(0, 1)]),
        # What costs nothing goes in small steps, so that no more of it goes than has to.
        ([trials((0, 1), (0, 2)), trials((1, 1))], [(0, 0), (0, 1), (1, 0)]),
        # What saves nothing, or has no error that is a number, stays.
        ([trials((0, 0)), trials((float("nan"), 3), (float("inf"), 4))], []),
    ],
)
def test_ladder(groups: list[list[RatioTrial]], expected: list[tuple[int, int]]) -> None:
    assert hull_steps(groups) == expected


def bench(program: Program, *names: str, count: int = 1) -> Ablation:
    return Ablation(program, couple(program), names, requests(program, None, count))


def some_units(program: Program) -> list[Unit]:
    """Return a quarter of the units of each group."""
    return [u for group in couple(program).groups for u in group.units[: len(group.units) // 4]]


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_program_without_units_is_one_they_were_removed_from(name: str) -> None:
    whole = traced(name)
    ablation, before = bench(whole, "unet" if name == "sd" else "transformer"), whole.fingerprint()
    smaller, expected = ablation.without(some_units(whole)), whole.clone()
    remove(expected, couple(expected), some_units(expected))
    smaller.refresh()
    expected.refresh()
    assert all(map(torch.equal, smaller.run(whole.sample), expected.run(whole.sample)))
    assert ablation.cost(smaller) < ablation.cost(whole)
    assert whole.fingerprint() == before


def test_errors_are_those_of_calls_on_what_the_whole_program_reads() -> None:
    whole = loops.program()
    ablation = bench(whole, "denoiser")
    smaller = ablation.without(some_units(whole))
    body = smaller.components["denoiser"]
    body.recompile()
    errors = []

    def visit(call: fx.Node, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        results = list(whole.components["denoiser"](*arguments))
        errors.append(squared_relative_error(body(*arguments), results))
        return results

    run_root(whole, requests(whole, None, 1)[0], visit)
    assert len(errors) == 4
    assert ablation.error(smaller) == pytest.approx(sum(errors) / 4)
    assert ablation.error(whole) == 0


def test_a_second_target_needs_no_new_measurements(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path))
    whole = loops.program()
    scores = [unit_scores(group, importance(whole, "magnitude")) for group in couple(whole).groups]
    counts = []

    def choose(part: float) -> RatioChoice:
        group = bench(whole, "denoiser", count=2)
        error = group.error
        counts.append(0)

        def counted(program: Program) -> float:
            counts[-1] += 1
            return error(program)

        monkeypatch.setattr(group, "error", counted)
        return ratio_search.search_ratios(group, couple(whole).groups, scores, part, 0.75, 1)

    first, second = choose(0.9), choose(0.8)
    assert counts == [sum(map(len, first.trials)) + 1, 1]
    assert second.after < first.after <= 0.9 * first.before
    assert second.after <= 0.8 * second.before
