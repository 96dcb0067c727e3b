"""Moves what follows from stored tensors alone out of components, to be computed on loading.

A lowering puts kernels in place of layers. What these need of the stored weights (turned, packed,
their sums) leaves the components for one graph, the setup, that runs when the engine is loaded; its
results are further arguments of the components:

    component: %turned: int8[8,16] = aten.t(%values)
               %y: int32[4,16] = aten._int_mm(%q, %turned)

    setup:     %turned: int8[8,16] = aten.t(%values)
    component: %y: int32[4,16] = aten._int_mm(%q, %setup_0)

So components share what is stored and what is made of it, and no kernel depends on a
weight's value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.ir import graph as g
from diffopt.ir import qdq, serialize
from diffopt.ir.allowed_operators import find_any
from diffopt.ir.cse import eliminate_common_subexpressions
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.nodes import is_pure
from diffopt.ir.propagation import propagate_layouts
from diffopt.ir.strides import restore_outputs
from diffopt.lowering.executor import set_device
from diffopt.lowering.target import EngineContents

aten = torch.ops.aten

log = logging.getLogger("diffopt")


@dataclass
class Setup:
    """What is computed from stored tensors once, when an engine is loaded.

    Attributes:
        gm: Computes it.
        sources: Where each of its tensors is, as a component and an attribute of it.
        takes: For each component, which of the results are its further arguments.
    """

    gm: fx.GraphModule = field(default_factory=lambda: g.new_body("setup"))
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    takes: dict[str, list[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the setup as JSON, without its tensors."""
        return {
            "nodes": serialize.graph_to_json(self.gm),
            "sources": self.sources,
            "takes": self.takes,
        }


def run_setup(
    data: Mapping[str, Any], tensor: Callable[[str, str], Tensor], device: str = "cpu"
) -> dict[str, list[Tensor]]:
    """Run what `Setup.to_json` gave; return each component's further arguments.

    Args:
        data: The setup.
        tensor: Returns a component's attribute, on the device.
        device: Where to compute.
    """
    tensors = {name: tensor(*source) for name, source in data["sources"].items()}
    gm = serialize.graph_from_json(data["nodes"], "setup", tensors, {}, find_any)
    set_device(gm, device)
    with torch.no_grad():
        results = gm(*[])
    return {name: [results[i] for i in own] for name, own in data["takes"].items()}


def rerun_setup(
    data: Mapping[str, Any], engine: EngineContents, changed: Set[str]
) -> dict[str, dict[int, Tensor]]:
    """Run what follows from some tensors of an engine, which have changed.

    Args:
        data: The setup.
        engine: The engine.
        changed: The keys of the tensors.

    Returns:
        For each component those of its further arguments that are others now, by position.
    """
    tensors = {name: engine.weight(*source) for name, source in data["sources"].items()}
    gm = serialize.graph_from_json(data["nodes"], "setup", tensors, {}, find_any)
    keys = {
        name: engine.graphs[c]["tensors"][part][0] for name, (c, part) in data["sources"].items()
    }
    reads = [n for n in gm.graph.find_nodes(op="get_attr") if keys[str(n.target)] in changed]
    following = g.descendants(reads)
    results = g.outputs(gm)
    with torch.no_grad():
        values = Interpreter(gm, [node for node in results if node in following]).values()
    return {
        name: {at: values[results[i]] for at, i in enumerate(own) if results[i] in values}
        for name, own in data["takes"].items()
    }


@dataclass(frozen=True)
class Rewritten:
    """What a lowering did to a body.

    Attributes:
        new_nodes: The nodes in the places of layers, whose memory layouts may be others.
        layers: How many layers run on what.
        notes: Why layers run on floats though kernels for something else were asked for.
    """

    new_nodes: set[fx.Node]
    layers: dict[str, int]
    notes: list[str]


@dataclass
class Lowered:
    """Components whose quantized layers are kernels.

    Attributes:
        bodies: The components; those that were left alone are as they were.
        setup: What is to be run on loading.
        layers: For each component that is lowered, how many layers run on what.
        notes: See `Rewritten`, by component.
    """

    bodies: dict[str, fx.GraphModule] = field(default_factory=dict)
    setup: Setup = field(default_factory=Setup)
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def about(self, name: str, kernel: str) -> dict[str, Any]:
        """Return what the manifest says about a component, and log its notes."""
        for note in self.notes.get(name, []):
            log.warning("%s: %s", name, note)
        layers = {"layers": self.layers[name]} if name in self.layers else {}
        return {"kernel": kernel, **layers}


def lower(
    components: Mapping[str, fx.GraphModule],
    wanted: Callable[[fx.GraphModule], bool],
    rewrite: Callable[[str, fx.GraphModule], Rewritten],
    widen: bool,
) -> Lowered:
    """Return components with kernels for their layers, and what these need on loading.

    Args:
        components: Components by name.
        wanted: Tells which to rewrite.
        rewrite: Puts kernels in place of the layers of a copy.
        widen: Whether quantized weights that no kernel takes are widened on loading, once, and not
            in every call, which takes memory for them all.
    """
    result = Lowered()
    moved: dict[str, list[fx.Node]] = {}
    for name, gm in components.items():
        result.bodies[name] = gm
        if not wanted(gm):
            continue
        body = result.bodies[name] = g.clone(gm)
        known = set(body.graph.nodes)
        before = [node.meta["val"] for node in g.outputs(body)]
        done = rewrite(name, body)
        propagate_layouts(body, set(done.new_nodes))
        restore_outputs(body, before)
        g.prune_unused(body)
        body.recompile()
        result.layers[name] = done.layers
        if done.notes:
            result.notes[name] = done.notes
        moved[name] = _move(name, body, known, result.setup, widen)
    _finish(result.setup, moved)
    return result


def _move(
    name: str, gm: fx.GraphModule, known: set[fx.Node], setup: Setup, widen: bool
) -> list[fx.Node]:
    """Move what follows from stored tensors alone into the setup; return its results there.

    That is everything that is not among the `known` nodes, with what it reads; if weights are to be
    widened, also what widens them and what else is read by new nodes.
    """
    constant: set[fx.Node] = set()
    needs: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if is_pure(node) and constant.issuperset(node.all_input_nodes):
            constant.add(node)
            near = [node, *node.users] if widen else [node]
            widens = widen and qdq.dequantizes_weight(node)
            begins = node.op != "get_attr" and (widens or not known.issuperset(near))
            if begins or not needs.isdisjoint(node.all_input_nodes):
                needs.add(node)
    ends = [n for n in gm.graph.nodes if n in needs and not constant.issuperset(n.users)]
    above = g.ancestors(ends)
    env: dict[fx.Node, fx.Node] = {}
    g.copy_nodes([n for n in gm.graph.nodes if n in above], gm, setup.gm, env)
    for node in gm.graph.find_nodes(op="get_attr"):  # in order: a set's is another in each process
        if node in above:
            setup.sources.setdefault(str(env[node].target), (name, str(node.target)))
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for index, node in enumerate(ends):
        with gm.graph.inserting_before(first):
            taken = gm.graph.placeholder(f"setup_{index}")
        taken.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(taken)
    g.prune_unused(gm)
    gm.recompile()
    return [env[node] for node in ends]


def _finish(setup: Setup, moved: Mapping[str, list[fx.Node]]) -> None:
    """Let the setup return what components take, each equal result once."""
    gm = setup.gm
    ends = list({node: None for nodes in moved.values() for node in nodes})
    gm.graph.output(tuple(ends))
    g.set_outputs(gm, ends)
    places = {name: [ends.index(node) for node in nodes] for name, nodes in moved.items()}
    eliminate_common_subexpressions(gm)
    distinct = list(dict.fromkeys(g.outputs(gm)))
    index = [distinct.index(node) for node in g.outputs(gm)]
    setup.takes = {name: [index[i] for i in own] for name, own in places.items()}
    g.set_outputs(gm, distinct)
    gm.recompile()
