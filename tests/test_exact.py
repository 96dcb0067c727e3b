"""The exact passes on every pipeline of the zoo, in more than one order."""

import random

import pytest
import torch

from diffopt.check import difference
from diffopt.core import Pipeline, Record
from tests.zoo import CASES, traced

PASSES = ("unroll", "hoist", "simplify", "fuse")


@pytest.mark.parametrize("name", sorted(CASES))
def test_exact_passes(name: str) -> None:
    case = CASES[name]
    program = traced(name)
    # Every pass is checked against the program before it as it runs: an error raises.
    orders = [",".join(PASSES)]
    number = sorted(CASES).index(name)
    if number % 3 == 0:  # for time: one in three also in another order
        orders.append(",".join(random.Random(name).sample(PASSES, len(PASSES))))
    for text in orders:
        result = Pipeline.parse(text).run(program)
        records = [Record.from_json(row) for row in result.history]
        assert [r.exact for r in records] == [True] * 4
        new = program.prepare(**case.inputs(0) | {"generator": torch.Generator().manual_seed(1)})
        expected, got = program.run(new), result.run(new)
        # Other noise, all four passes: the rounding of merged and batched matrix products.
        assert difference(got, expected)[1] <= 1e-4
        assert {r.max_abs for r in records if r.text == "unroll"} == {0.0}
        if number % 3 == 1:  # for time: another third
            Pipeline.parse("batch(max=2)").run(result)


def test_every_pass_has_what_to_do_on_a_unet_and_on_a_transformer() -> None:
    for name in ("sd", "dit"):
        program = traced(name)
        result = Pipeline.parse(",".join(PASSES)).run(program)
        assert all(row["changed"] for row in result.history)
        step = next(n for n in result.components if n.endswith("_step"))
        assert len(result.calls(step)) > 1
