"""The flat plan of an outer graph gives what the graph gives."""

import operator
import random

import pytest
import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.lowering.executor import SlotExecutor

aten = torch.ops.aten


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    result = graph.call_function(operator.getitem, (node, index))
    result.meta["val"] = node.meta["val"][index]
    return result


def finish(root: fx.GraphModule, outputs: list[fx.Node]) -> None:
    output = root.graph.output(tuple(outputs))
    output.meta["val"] = tuple(node.meta["val"] for node in outputs)
    root.recompile()


def random_graph(seed: int) -> fx.GraphModule:
    """Return a graph with results in tuples and lists, constants, dead values and keywords."""
    numbers = random.Random(seed)
    root = g.new_body("root")
    graph = root.graph
    values = []
    for index in range(2):
        values.append(graph.placeholder(f"x{index}"))
        values[-1].meta["val"] = g.fake(torch.zeros(2, 4))
    values.append(g.get_attr(root, "constant", torch.full((2, 4), 0.5)))
    for _ in range(12):
        a, b = numbers.choices(values, k=2)
        kind = numbers.randrange(5)
        if kind == 0:
            values.append(g.call(graph, aten.add.Tensor, a, b, alpha=2))
        elif kind == 1:
            values.append(g.call(graph, aten.mul.Tensor, a, 0.5))
        elif kind == 2:
            joined = g.call(graph, aten.cat.default, [a, b, a], 1)
            parts = g.call(graph, aten.split_with_sizes.default, joined, [4, 4, 4], 1)
            values += [item(graph, parts, i) for i in (2, 0, 2)]
        elif kind == 3:
            values.append(g.call(graph, aten.clamp.default, a, max=0.3))
        else:
            values.append(g.call(graph, aten.relu.default, b))
    finish(root, numbers.choices(values, k=3))
    return root


@pytest.mark.parametrize("seed", range(25))
def test_a_plan_gives_what_its_graph_gives(seed: int) -> None:
    root = random_graph(seed)
    plan = SlotExecutor(root, {})
    inputs = [torch.randn(2, 4), torch.randn(2, 4)]
    before = [tensor.clone() for tensor in inputs]
    for _ in range(2):  # a run leaves nothing for the next one
        for output, expected in zip(plan.run(inputs), root(*inputs), strict=True):
            assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_component_gets_a_list_and_gives_several_results() -> None:
    root = g.new_body("root")
    x = root.graph.placeholder("x")
    x.meta["val"] = g.fake(torch.zeros(3))
    root.add_module("body", torch.nn.Identity())
    call = root.graph.call_module("body", (x, x))
    call.meta["val"] = (x.meta["val"],) * 3
    finish(root, [item(root.graph, call, 2), item(root.graph, call, 0), x])
    seen = []

    def body(tensors: list[Tensor]) -> list[Tensor]:
        seen.append(len(tensors))
        return [tensors[0] + 1, tensors[0] + 2, tensors[0] + 3]

    tensor = torch.zeros(3)
    outputs = SlotExecutor(root, {"body": body}).run([tensor])
    assert [output[0].item() for output in outputs] == [3, 1, 0]
    assert seen == [2]
    assert outputs[2] is tensor


def test_a_value_is_dropped_after_its_last_use() -> None:
    root = g.new_body("root")
    x = root.graph.placeholder("x")
    x.meta["val"] = g.fake(torch.zeros(3))
    value = x
    for _ in range(3):
        value = g.call(root.graph, aten.neg.default, value)
    finish(root, [value])
    (steps,) = SlotExecutor(root, {})._sections
    assert [dead for *_, dead in steps] == [(0,), (1,), (2,)]


def test_the_outer_graph_computes_on_the_device_that_it_is_for() -> None:
    root = g.new_body("root")
    graph = root.graph
    x = graph.placeholder("x")
    x.meta["val"] = g.fake(torch.zeros(3))
    captured = {"device": torch.device("cpu"), "pin_memory": False}
    values = [
        x,
        g.get_attr(root, "constant", torch.ones(3)),
        g.call(graph, aten.full.default, [3], 2.0, **captured),
        g.call(graph, aten.arange.start_step, 0, 3, 1, dtype=torch.float32),
        g.call(graph, aten.zeros.default, [3], device=None),
        g.call(graph, aten._to_copy.default, x, dtype=torch.float64, device=torch.device("cpu")),
        g.call(graph, aten.new_full.default, x, [3], 1.0, **captured),
    ]
    total = values[0]
    for value in values[1:]:
        total = g.call(graph, aten.add.Tensor, total, value)
    finish(root, [total])
    (output,) = SlotExecutor(root, {}).run([torch.tensor([1.0, 2.0, 3.0])])
    assert output.tolist() == [6.0, 9.0, 12.0]
    (output,) = SlotExecutor(root, {}, "meta").run([torch.zeros(3, device="meta")])
    assert output.device.type == "meta"
