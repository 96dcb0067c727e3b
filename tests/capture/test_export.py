"""Writes inside of components: the graph has none, and gives what the component gives."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import diffopt
from diffopt.capture.dispatch_modes import functional_variant


class Body(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def add(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    return y.sigmoid_().mul_(x)


def add_of_another_type(x: Tensor) -> Tensor:
    y = (x * 3).int()
    y *= 2.0 > 1
    return y


def detached(x: Tensor) -> Tensor:
    y = x * 2
    y.detach_()
    return y + 1


def read_before(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = y + 1
    y.add_(z)
    return y, z


# Another tensor is in the same memory.


def a_view_from_before(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    view = y[0]
    y.add_(1)
    return y, view


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[0].add_(1)
    return y


def through_what_may_be_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    same = y.reshape(-1)
    same.add_(1)
    return y, same


def dropout_is_its_argument(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    same = nn.functional.dropout(y, 0.5, training=False)
    y.add_(1)
    return y, same


def what_is_returned_by_a_write(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    same = y.add_(1)
    y.mul_(3)
    return y, same


def copied(x: Tensor) -> Tensor:
    y = x * 0
    y.copy_(x[:1])
    return y


def spread(x: Tensor) -> Tensor:
    y = (x[:1] * 2).expand(3, 4).clone()
    y[:, 1:] = 0
    return y.add_(1)


ALONE = [add, detached, read_before, what_is_returned_by_a_write]
OTHERS = [add_of_another_type, a_view_from_before, through_a_view, through_what_may_be_a_view]
OTHERS += [dropout_is_its_argument, copied, spread]


def traced(function):
    body = Body(function)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    return body, diffopt.trace(lambda x: body(x), components={"body": body}, x=x)


@pytest.mark.parametrize("function", ALONE + OTHERS, ids=lambda f: f.__name__)
def test_what_is_written_is_what_the_component_writes(function):
    body, program = traced(function)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected, got = body(x.clone()), program(x=x.clone())
    pairs = [(got, expected)] if isinstance(expected, Tensor) else zip(got, expected, strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ALONE, ids=lambda f: f.__name__)
def test_what_nothing_else_sees_is_not_traced_again(function):
    refuse = mock.patch.object(torch.export.ExportedProgram, "run_decompositions")
    with refuse as decompose:
        traced(function)
    assert not decompose.called


def test_an_operator_of_another_library_is_not_taken_for_one_of_torchs():
    library = torch.library.Library("diffopt_test", "FRAGMENT")
    library.define("mul_(Tensor(a!) self, Tensor other) -> Tensor(a!)")
    assert functional_variant(torch.ops.aten.mul_.Tensor) is torch.ops.aten.mul.Tensor
    assert functional_variant(torch.ops.diffopt_test.mul_.default) is None
