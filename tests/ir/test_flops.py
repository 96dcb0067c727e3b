"""Floating point operations: what a graph is said to cost is what its operators do."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffopt.ir.flops import flop_counter, graph_flops


class Attention(nn.Module):
    def __init__(self, masked: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.mask = torch.zeros(7, 5) if masked else None
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_costs_its_two_products(masked: bool, causal: bool, requires_grad: bool) -> None:
    arguments = tuple(
        torch.randn(2, 3, n, 16, requires_grad=requires_grad)
        for n in (7, 5 + 2 * causal, 5 + 2 * causal)
    )
    gm = torch.export.export(Attention(masked, causal), arguments).module()
    batch, tokens, keys, width = 2 * 3, 7, arguments[1].shape[2], 16
    assert graph_flops(gm) == 2 * (2 * batch * tokens * keys * width)
    with flop_counter() as counter, torch.no_grad():
        gm(*arguments)
    assert counter.get_total_flops() == graph_flops(gm)


def test_layers() -> None:
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(2), nn.Linear(36, 10))
    gm = torch.export.export(layer, (torch.randn(2, 4, 6, 6),)).module()
    assert graph_flops(gm) == 2 * (2 * 8 * 36 * 4 * 9) + 2 * (2 * 8 * 36 * 10)
