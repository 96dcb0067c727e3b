import pytest
import torch
from torch import Tensor

from diffopt.ir import graph as g
from diffopt.ir.strides import empty_like, restore_outputs, with_strides
from tests.passes.build import body

aten = torch.ops.aten


def test_strides_are_changed_only_where_they_must() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert with_strides(tensor, (3, 1)) is tensor
    transposed = with_strides(tensor, [1, 2])
    assert transposed.stride() == (1, 2)
    assert torch.equal(transposed, tensor)
    repeated = tensor[:1].expand(4, 3)
    assert with_strides(tensor, repeated.stride()) is tensor


def test_gaps_are_kept() -> None:
    tensor = torch.zeros(2, 5)[:, :3]
    assert torch.empty_like(tensor).stride() == (3, 1)
    assert empty_like(tensor).stride() == (5, 1)


@pytest.mark.parametrize(
    ("before", "copied"),
    [
        (torch.zeros(4, 6), []),
        (torch.zeros(6, 4).T, ["permute", "clone", "permute"]),
        (torch.zeros(25)[1:].view(4, 6), ["clone"]),
    ],
)
def test_outputs_are_copied_where_their_layout_is_another(
    before: Tensor, copied: list[str]
) -> None:
    gm = body(lambda make, x: make(aten.add.Tensor, x, 1), torch.zeros(4, 6))
    restore_outputs(gm, [before])
    gm.recompile()
    (result,) = gm(torch.ones(4, 6))
    assert torch.equal(result, torch.full((4, 6), 2.0))
    targets = [str(n.target).split(".") for n in gm.graph.nodes if n.op == "call_function"]
    assert [name for _, name, _ in targets[1:]] == copied
    assert g.output_node(gm).meta["val"][0].stride() == result.stride() == before.stride()


def test_a_slice_is_copied_once() -> None:
    gm = body(
        lambda make, x: make(aten.slice.Tensor, make(aten.neg.default, x), 1, 0, 3),
        torch.zeros(4, 6),
    )
    restore_outputs(gm, [torch.zeros(4, 3)])
    gm.recompile()
    (result,) = gm(torch.ones(4, 6))
    assert result.stride() == (3, 1)
