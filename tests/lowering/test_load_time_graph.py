"""What follows from stored tensors alone is computed once for all components, on loading."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq
from diffopt.ir.nodes import replace_node
from diffopt.lowering import load_time_graph
from tests.passes.build import body, parameter, randn
from tests.quantized import pack

aten = torch.ops.aten
X = randn(4, 8)


def components() -> dict[str, fx.GraphModule]:
    """Return two bodies that share a quantized weight, and one without."""
    packed = pack(parameter(6, 8), "int8")

    def make(make: Any, x: fx.Node) -> list[fx.Node]:
        weight = qdq.place_weight(make.gm, "weight", packed, torch.float32)
        product = make(aten.linear.default, x, weight)
        return [make(aten.permute.default, make(aten.relu.default, product), [1, 0])]

    plain = body(lambda make, x: make(aten.linear.default, x, parameter(6, 8)), X)
    return {"one": body(make, X), "other": body(make, X), "plain": plain}


def rewrite(name: str, gm: fx.GraphModule) -> load_time_graph.Rewritten:
    """Multiply the weight by the transposed input, into results in a column-major layout."""
    (layer,) = qdq.layers(gm)
    weight = qdq.weight(layer.weight)
    assert weight is not None
    with gm.graph.inserting_before(layer.node):
        wide = g.call(gm.graph, aten._to_copy.default, weight.values, dtype=torch.float32)
        transposed = g.call(gm.graph, aten.t.default, layer.x)
        product = g.call(gm.graph, aten.mm.default, wide, transposed)
        scales = g.call(gm.graph, aten.view.default, weight.scales, [-1, 1])
        scaled = g.call(gm.graph, aten.mul.Tensor, product, scales)
        result = g.call(gm.graph, aten.t.default, scaled)
    replace_node(layer.node, result)
    return load_time_graph.Rewritten({result}, {"product": 1}, [f"a note on {name}"])


def is_wanted(gm: fx.GraphModule) -> bool:
    return any(map(qdq.dequantizes_weight, gm.graph.nodes))


def results(lowered: load_time_graph.Lowered, bodies: dict[str, fx.GraphModule]) -> list[Tensor]:
    """Run the setup; return what the component `one` takes of it."""

    def tensor(component: str, name: str) -> Tensor:
        value: Tensor = g.attribute(bodies[component], name)
        return value

    data = json.loads(json.dumps(lowered.setup.to_json()))
    return load_time_graph.run_setup(data, tensor)["one"]


@pytest.mark.parametrize("widen", [False, True])
def test_components_take_what_is_computed_once(widen: bool) -> None:
    bodies = components()
    lowered = load_time_graph.lower(bodies, is_wanted, rewrite, widen)
    assert lowered.bodies["plain"] is bodies["plain"]
    assert lowered.layers == {"one": {"product": 1}, "other": {"product": 1}}
    assert lowered.notes == {"one": ["a note on one"], "other": ["a note on other"]}
    tensors = results(lowered, bodies)
    assert [(tensor.dtype, list(tensor.shape)) for tensor in tensors] == [
        (torch.float32, [6, 8]),
        (torch.float32, [6, 1]),
    ]
    assert lowered.setup.takes == {"one": [0, 1], "other": [0, 1]}
    assert {name for _, name in lowered.setup.sources.values()} == {"weight_int8", "weight_scales"}
    for name in lowered.layers:
        (value,), (expected,) = lowered.bodies[name](X, *tensors), bodies[name](X)
        torch.testing.assert_close(value, expected)
        assert value.stride() == expected.stride()


@pytest.mark.parametrize("widen", [False, True])
def test_where_weights_are_widened_that_no_kernel_takes(widen: bool) -> None:
    bodies = components()
    lowered = load_time_graph.lower(
        bodies, is_wanted, lambda name, gm: load_time_graph.Rewritten(set(), {}, []), widen
    )
    stays = [node for node in lowered.bodies["one"].graph.nodes if qdq.dequantizes_weight(node)]
    assert bool(stays) != widen
    tensors = results(lowered, bodies)
    assert len(tensors) == widen
    torch.testing.assert_close(lowered.bodies["one"](X, *tensors)[0], bodies["one"](X)[0])
