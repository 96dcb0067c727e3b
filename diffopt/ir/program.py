"""The program: a whole sampling pipeline as a two-level torch.fx graph.

The root graph holds aten operators and calls of components; a component is a GraphModule with flat
tensor arguments and a flat tuple of tensors as its result. Weights are shared by reference.
"""

import contextlib
import dataclasses
import hashlib
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError, VerifyError, expect_path
from diffopt.host.arguments import leaves
from diffopt.host.guards import Guards, Mismatch, mismatch
from diffopt.host.inputs import Computed, Host
from diffopt.host.outputs import expect_convertible, pack, picture_sizes
from diffopt.ir import batching, call_tags, dynamic_sizes, serialize, weight_origins
from diffopt.ir import graph as g
from diffopt.ir.flat_inputs import FlatInputs
from diffopt.ir.flops import graph_flops
from diffopt.ir.interpreter import Interpreter
from diffopt.ir.printing import format_graph, graph_fingerprint
from diffopt.ir.strides import with_strides
from diffopt.ir.verifier import verify_call, verify_graph, verify_type
from diffopt.storage import container, program_file, signatures
from diffopt.storage.weight_digests import Sealed

log = logging.getLogger("diffopt")

FORMAT = 1

CONSTANT = "(constant "
"""How names begin of graphs that compute what is stored; a number and a bracket follow."""

_NO_ORIGINS: dict[str, Any] = {"weights": [], "closed": {}, "tensors": {}, "computed": {}}

ORIGIN = "origin/"
"""The prefix of keys of tensors that no graph has, but where weights come from."""

_MAX_SPREAD = 64
"""How many times more elements than it has a stored tensor may be spread over."""

MAX_VARIANTS = 8
"""How many programs for other numbers of tokens are kept; the oldest is evicted first."""


@dataclasses.dataclass(eq=False, repr=False)
class Program:
    """A captured sampling program.

    Attributes:
        root: The pipeline graph; its submodules are the components, its buffers the constants.
        host: How the caller's arguments become the graph's inputs, and its outputs the result.
        sample: The flat inputs seen at capture, on which rewrites are checked.
        guards: What Python read of the inputs at capture; None if nothing.
        history: One record a pass that has run, oldest first, as JSON.
        source: What it was traced from, as text.
        digests: Of the weights at capture, by the name of the pipeline's module; see
            `weight_digests`.
        batch: The fewest and the most requests of one run, a leading dimension of all inputs and
            outputs; None: each run serves one, and there is no such dimension.
        lengths: Numbers of tokens that the inputs' shapes do not fix.
        check: How the capture was compared with the pipeline, as a sentence; empty: nobody knows.
        retrace: Capture again with other arguments; None where the pipeline is not at hand.
        borrowed: Weights whose memory is the pipeline's, by name.
        pipeline_weights: The names of all weights of the pipeline's modules.
        closed: Those of them whose change cannot be followed any more, since other tensors were
            computed of them, and which pass did that; see `weight_origins`.
        file: The file whose memory the weights are; None for a program that was traced here.
        variants: Programs for other numbers of tokens, captured by calls.
    """

    root: fx.GraphModule
    host: Host
    sample: list[Tensor]
    _: dataclasses.KW_ONLY
    guards: Guards | None = None
    history: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    source: str = ""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    batch: tuple[int, int] | None = None
    lengths: list[dynamic_sizes.Length] = dataclasses.field(default_factory=list)
    check: str = ""
    retrace: Callable[..., "Program"] | None = None
    borrowed: dict[str, Sealed] = dataclasses.field(default_factory=dict)
    pipeline_weights: list[str] = dataclasses.field(default_factory=list)
    closed: dict[str, str] = dataclasses.field(default_factory=dict)
    file: container.Archive | None = None
    variants: list["Program"] = dataclasses.field(default_factory=list, init=False)

    # Running

    def __call__(self, **arguments: Any) -> Any:
        """Run the program as the pipeline was called, and return what the pipeline returns.

        Texts of a number of tokens not seen before, where the pipeline does not fix it, are
        captured by their first call, while the pipeline is at hand.
        """
        if self.batch:
            return self.serve([arguments])[0]
        program, tensors = self._variant_for(arguments)
        return program.pack(program.run(tensors), arguments.get("output_type"))

    def serve(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run the program for several calls, as many at once as `batch` allows."""
        if not self.batch:
            return [self(**request) for request in requests]
        return self.serve_with(self.run, requests)

    def serve_with(
        self,
        run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        requests: Sequence[Mapping[str, Any]],
    ) -> list[Any]:
        """Return the result of each call where `run` executes the graph; see `serve`."""
        flat = [self.prepare(**request) for request in requests]
        outputs = batching.run_requests(run, flat, self.batch)
        return [
            self.pack(tensors, request.get("output_type"))
            for tensors, request in zip(outputs, requests, strict=True)
        ]

    def _variant_for(self, arguments: Mapping[str, Any]) -> tuple["Program", list[Tensor]]:
        """Return the program or variant for these texts' numbers of tokens, and its flat inputs."""
        try:
            return self, self.prepare(**arguments)
        except Mismatch as error:
            if not error.from_text or self.retrace is None or self.history:
                raise
        for variant in self.variants:
            with contextlib.suppress(Mismatch):
                return variant, variant.prepare(**arguments)
        variant = self.retrace(**{k: v for k, v in arguments.items() if k != "seed"})
        self.variants = [*self.variants[1 - MAX_VARIANTS :], variant]
        return variant, variant.prepare(**arguments)

    def prepare(self, /, **arguments: Any) -> list[Tensor]:
        """Return the flat inputs for a call with these arguments: those of one request.

        Where that raises, the generators' states are restored.
        """
        generators = [v for _, v in leaves(arguments) if isinstance(v, torch.Generator)]
        states = [(x, x.get_state()) for x in (torch.default_generator, *generators)]
        try:
            return self._prepare(arguments)
        except BaseException:
            for generator, state in states:
                generator.set_state(state)
            raise

    def _prepare(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        if "output_type" in arguments:
            self._expect_convertible(arguments["output_type"])
        tensors = self.host.prepare(arguments)
        is_text = [step.from_text for step in self.host.steps for _ in range(step.count)]
        inputs = zip(g.placeholders(self.root), tensors, is_text, strict=True)
        for index, (node, tensor, from_text) in enumerate(inputs):
            shape, traced = list(tensor.shape), list(node.meta["val"].shape)
            if self.batch:
                del traced[0]
            if len(shape) == len(traced):
                for axis in dynamic_sizes.free_axes(self.lengths, index):
                    traced[axis] = shape[axis]
            if shape == traced:
                continue
            if from_text:
                message = (
                    f"the text gives {node.name} the shape {shape}; the program was traced with "
                    f"one of {traced}: use a text of as many tokens, or trace it with this text"
                )
            else:
                message = (
                    f"input {node.name} has shape {shape}; the program was traced for {traced}: "
                    "trace it again with inputs of this size"
                )
            raise mismatch(message, from_text=from_text)
        for length in self.lengths:
            length.check([tensor.shape for tensor in tensors])
        if self.guards:
            self.guards.check(tensors)
        return tensors

    def converts(self, output_type: str) -> bool:
        """Tell whether the result can be had as this `output_type`."""
        try:
            self._expect_convertible(output_type)
        except DiffoptError:
            return False
        return True

    def _expect_convertible(self, output_type: Any) -> None:
        traced = self.host.traced_output_type()
        if output_type == traced:
            return
        expect_convertible(self.host.output, self._output_types(), traced, output_type)

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Return the width and height of each picture that a call returns."""
        return picture_sizes(self.host.output, self._output_types())

    def _output_types(self) -> list[Tensor]:
        """Return the fake flat outputs of one request."""
        types = [node.meta["val"] for node in g.outputs(self.root)]
        return [value[0] if self.batch else value for value in types]

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Execute the graph on flat inputs, and return its flat outputs."""
        if self.file:
            self.file.expect_unchanged()
        devices = {node.meta["val"].device.type for node in g.placeholders(self.root)}
        # Interpreted: any number of tokens will do.
        types = FlatInputs(self.root, self.batch, self.lengths, devices, limited=False)
        tensors = types.checked(tensors)
        with torch.no_grad():
            return Interpreter(self.root).run(*tensors)  # no code is made of a file's graph

    def expect_finite(self, run: Callable[[Sequence[Tensor]], Sequence[Tensor]], file: str) -> None:
        """Raise a `DiffoptError` where `run`, of a file, is not finite on the sample inputs."""
        for count in self.batch or (None,):
            for index, output in enumerate(run(self.sample_inputs(count))):
                if output.is_floating_point() and not output.isfinite().all():
                    raise DiffoptError(f"{file}: output {index} is not finite on the sample inputs")

    def pack(self, tensors: Sequence[Tensor], output_type: str | None = None) -> Any:
        """Return flat outputs as the pipeline returns them."""
        for check in self.host.checks:
            check.check(tensors)
        traced = self.host.traced_output_type()
        output_type = output_type if output_type != traced else None
        return pack(self.host.output, tensors, output_type, self.host.classes)

    def sample_inputs(self, count: int | None = None) -> list[Tensor]:
        """Return flat inputs for `run`: those seen at capture.

        Where a run serves several requests (`count`; by default the most that it can), these are
        the last, and the others differ from them.
        """
        if self.batch is None:
            return self.sample
        return batching.stack(self.sample, self.host, count or self.batch[1])

    def sample_outputs(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the part of the outputs of a run on `sample_inputs` that belongs to `sample`."""
        return [output[-1] if self.batch else output for output in outputs]

    # Inspecting

    @property
    def components(self) -> dict[str, fx.GraphModule]:
        """The components that the root graph calls, by name."""
        return {name: module for name, module in self.root._modules.items()}  # type: ignore[misc]

    @property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """The root graph, as "", and the components by name."""
        return {"": self.root, **self.components}

    def calls(self, component: str | None = None) -> list[fx.Node]:
        """Return the component calls in order: all, or one component's."""
        called = (n for n in self.root.graph.nodes if n.op == "call_module")
        return [n for n in called if component in (None, n.target)]

    def at(self, component: str, step: int, branch: int = 0) -> fx.Node | None:
        """Return the call with this tag: the same call one step earlier, say."""
        wanted = call_tags.Tag(component, step, branch)
        return next((node for node in self.calls() if call_tags.tag(node) == wanted), None)

    def weights(self) -> dict[int, Tensor]:
        """Return every distinct weight and constant by identity."""
        return {id(t): t for gm in self.graphs.values() for _, t in g.named_tensors(gm)}

    def flops(self) -> int:
        """Return the floating point operations of one run."""
        costs = {name: graph_flops(gm) for name, gm in self.components.items()}
        return graph_flops(self.root, costs)

    def releasable(self) -> list[str]:
        """Return the weights that no component called more than once reads, as "component.name".

        They are read only before or after the loop, so a runtime may release them there.
        """
        counts: dict[str, int] = {}
        for node in self.calls():
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
        loop = {
            id(t)
            for n, gm in self.components.items()
            if counts.get(n, 0) > 1
            for _, t in g.named_tensors(gm)
        }
        once = [(n, gm) for n, gm in self.components.items() if counts.get(n, 0) == 1]
        return [
            f"{n}.{key}" for n, gm in once for key, t in g.named_tensors(gm) if id(t) not in loop
        ]

    def fingerprint(self) -> str:
        """Return a hash of all graphs; weights count by identity and version."""
        parts = [
            graph_fingerprint(self.root),
            *(n + graph_fingerprint(m) for n, m in sorted(self.components.items())),
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def __str__(self) -> str:
        bodies = [
            f"component {name}:\n{_indent(format_graph(gm))}"
            for name, gm in self.components.items()
        ]
        return "\n\n".join([f"program:\n{_indent(format_graph(self.root))}", *bodies])

    # Rewriting

    def clone(self) -> "Program":
        """Return a copy whose graphs can be changed; weights are shared by reference."""
        root = g.clone(self.root)
        for name, gm in self.components.items():
            root._modules[name] = g.clone(gm)
        return dataclasses.replace(
            self,
            root=root,
            sample=list(self.sample),
            history=list(self.history),
            digests=dict(self.digests),
            lengths=list(self.lengths),
            closed=dict(self.closed),
        )

    def add_component(self, name: str, body: fx.GraphModule) -> str:
        """Add a component under a free name near `name`; return that name."""
        base, count = name, 1
        while hasattr(self.root, name):
            count += 1
            name = f"{base}_{count}"
        self.root.add_module(name, body)
        return name

    def insert_call(
        self, component: str, arguments: Sequence[Any], tag: call_tags.Tag | None = None
    ) -> list[fx.Node]:
        """Insert a call of a component at the root graph's insertion point; return its results.

        `tag` is that of the call which it replaces.
        """
        node = self.root.graph.call_module(component, tuple(arguments))
        if tag is not None:
            node.meta["tag"] = tag
        node.meta["val"] = tuple(n.meta["val"] for n in g.outputs(self.components[component]))
        return [
            g.call(self.root.graph, operator.getitem, node, i) for i in range(len(node.meta["val"]))
        ]

    def refresh(self) -> None:
        """Drop dead nodes and unused tensors and recompile every graph; a pass need not call it."""
        g.prune_unused(self.root)
        for gm in [*self.components.values(), self.root]:
            g.prune_unused(gm)
            gm.recompile()

    # Checking

    def expect_weights(self) -> None:
        """Raise a `DiffoptError` where the pipeline's weights have changed since the capture.

        They are not copied, so that the program's have changed with them.
        """
        ours = self.weights()
        for name, sealed in self.borrowed.items():
            if id(sealed.tensor) in ours and not sealed.is_intact():
                raise DiffoptError(
                    f"the weight {name} of the pipeline has changed since it was traced (an adapter"
                    " was fused or taken off, say): trace it again"
                )

    def verify(self) -> None:
        """Check the invariants of the IR; a broken one is a `VerifyError`.

        Graphs are well formed; values' recorded shapes and dtypes are those that operators infer;
        every call names a component and passes arguments of its types; tags are those of a loop
        (see `call_tags`); the sample inputs have the types of the placeholders.
        """
        for name, gm in self.graphs.items():
            verify_graph(name or "program", gm, is_root=not name)
        for node in self.calls():
            verify_call(node, self.components[str(node.target)])
        call_tags.verify(self.root)
        if self.batch:
            batching.batch_axes(self.root, self.batch[1])
        if self.lengths:
            dynamic_sizes.bounds(self.root, self.lengths)
        placeholders = g.placeholders(self.root)
        if (count := len(placeholders)) != len(self.sample):
            raise VerifyError(f"program: {count} placeholders for {len(self.sample)} inputs")
        for node, tensor in zip(placeholders, self.sample_inputs(), strict=True):
            verify_type(f"program: input {node.name}", node.meta["val"], tensor)

    # Saving

    def to_members(self) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
        """Return the program as JSON, distinct tensors by key, and asset files by path."""
        self.expect_weights()
        for name in self.host.without_files():
            log.warning(
                "no file can hold %r, which makes inputs of the arguments, as it has no"
                " save_pretrained: what is loaded runs on tensors alone",
                name,
            )
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        graphs = {}
        bodies = self.graphs
        if self.guards:
            bodies["(guards)"] = self.guards.body
        recipes = self._recipes() if self.pipeline_weights else {}
        bodies |= {f"{CONSTANT}{i})": recipe.graph for i, recipe in enumerate(recipes.values())}
        for number, computed in enumerate(self.host.computed):
            bodies[f"(computed {number})"] = computed.body
        for name, gm in bodies.items():
            table = {}
            for attribute, tensor in g.named_tensors(gm):
                if id(tensor) not in keys:
                    keys[id(tensor)] = f"{name}.{attribute}" if name else attribute
                    tensors[keys[id(tensor)]] = tensor.detach()
                parameter = isinstance(tensor, torch.nn.Parameter)
                table[attribute] = [keys[id(tensor)], list(tensor.stride()), parameter]
            serialize.expect_allowed(gm)
            graphs[name] = {"nodes": serialize.graph_to_json(gm), "tensors": table}
        tensors.update({f"sample/{i}": t.detach() for i, t in enumerate(self.sample)})
        origins = self._origins(keys, tensors, recipes) if self.pipeline_weights else None
        data = {
            "format": FORMAT,
            "graphs": graphs,
            "host": self.host.to_json(),
            "guards": [self.guards.expected, self.guards.where, self.guards.from_text]
            if self.guards
            else None,
            "computed": [computed.inputs for computed in self.host.computed],
            "samples": len(self.sample),
            "history": self.history,
            "source": self.source,
            "digests": self.digests,
            "check": self.check,
            "batch": self.batch,
            "lengths": [dataclasses.asdict(length) for length in self.lengths],
            **({"origins": origins} if origins else {}),
        }
        assets = {
            f"{name}/{file}": b for name, fs in self.host.assets.items() for file, b in fs.items()
        }
        return data, tensors, assets

    def _recipes(self) -> dict[int, weight_origins.Computed]:
        """Return of each tensor that calls of components would compute how, by identity."""
        result = {}
        for identity, tensor in self.weights().items():
            origin = weight_origins.origin_of(tensor)
            if isinstance(origin, weight_origins.Computed):
                called = {n.target for n in origin.graph.graph.find_nodes(op="call_module")}
                if called <= self.components.keys():
                    result[identity] = origin
        return result

    def _origins(
        self,
        keys: dict[int, str],
        tensors: dict[str, Tensor],
        recipes: dict[int, weight_origins.Computed],
    ) -> dict[str, Any]:
        """Return where the stored tensors come from, as JSON; add what that takes to `tensors`.

        `keys` has the key of each stored tensor by identity, `recipes` the graphs that are stored.
        """
        keys = dict(keys)
        closed = dict(self.closed)
        rows = {}

        def key_of(tensor: Tensor) -> str:
            if id(tensor) not in keys:
                keys[id(tensor)] = f"{ORIGIN}{len(keys)}"
                tensors[keys[id(tensor)]] = tensor
            return keys[id(tensor)]

        for identity, tensor in self.weights().items():
            origin = weight_origins.origin_of(tensor)
            unknown = weight_origins.unknown_names(origin)
            if isinstance(origin, weight_origins.Computed) and identity not in recipes:
                unknown |= origin.names
            for name in sorted(unknown):
                closed.setdefault(name, "a pass")
            if weight_origins.weights(origin):
                rows[keys[identity]] = weight_origins.to_json(origin, key_of)
        by_pass: dict[str, list[str]] = {}
        for name, text in sorted(closed.items()):
            by_pass.setdefault(text, []).append(name)
        computed = {keys[i]: sorted(recipe.names) for i, recipe in recipes.items()}
        return {
            "weights": self.pipeline_weights,
            "closed": by_pass,
            "tensors": rows,
            "computed": computed,
        }

    @staticmethod
    def from_members(
        data: Mapping[str, Any], tensors: Mapping[str, Tensor], assets: Mapping[str, bytes]
    ) -> "Program":
        """Rebuild a program from what `to_members` returned.

        Other data of the structure of `file_schema.ProgramData` is an error of several types.
        """
        shared: dict[str, Tensor] = {}

        def table(graph: Mapping[str, Any]) -> dict[str, Tensor]:
            for key, stride, parameter in graph["tensors"].values():
                if key not in shared:
                    tensor = _placed(tensors[key], stride)
                    shared[key] = (
                        torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
                    )
            return {name: shared[key] for name, (key, _, _) in graph["tensors"].items()}

        graphs = data["graphs"]
        bodies = {
            name: serialize.graph_from_json(graph["nodes"], name, table(graph), {})
            for name, graph in graphs.items()
            if name
        }
        guards = Guards(bodies.pop("(guards)"), *data["guards"]) if data["guards"] else None
        computed = [
            Computed(bodies.pop(f"(computed {number})"), inputs)
            for number, inputs in enumerate(data.get("computed", ()))
        ]
        origins = data.get("origins") or _NO_ORIGINS
        recipes = [bodies.pop(f"{CONSTANT}{i})") for i in range(len(origins["computed"]))]
        root = serialize.graph_from_json(graphs[""]["nodes"], "program", table(graphs[""]), bodies)
        files: dict[str, dict[str, bytes]] = {}
        for path, content in assets.items():
            component, _, file = path.partition("/")
            files.setdefault(component, {})[file] = content
        sample = [tensors[f"sample/{i}"] for i in range(data["samples"])]
        _record_origins(origins, recipes, shared, tensors)
        host = Host.from_json(data["host"], files)
        host.computed = computed
        made, taken = sum(step.count for step in host.steps), len(g.placeholders(root))
        if host.steps and made != taken:
            raise ValueError(f"the host makes {made} inputs of a graph that takes {taken}")
        return Program(
            root,
            host,
            sample,
            guards=guards,
            history=data["history"],
            source=data["source"],
            digests=data.get("digests") or {},  # engines of earlier versions have none
            batch=tuple(data["batch"]) if data.get("batch") else None,
            check=data.get("check", ""),
            lengths=[dynamic_sizes.Length.from_json(row) for row in data.get("lengths", ())],
            pipeline_weights=origins["weights"],
            closed={name: text for text, names in origins["closed"].items() for name in names},
        )

    def save(self, path: str | os.PathLike[str], compress: int | None = None) -> None:
        """Write the program to one file, atomically.

        `compress` is the level of zstandard, 1 to 22, for parts that get smaller; None: no part.
        """
        expect_path("path", path)
        program_file.write(path, *self.to_members(), compress)

    @staticmethod
    def load(
        path: str | os.PathLike[str], *, trusted_keys: signatures.Keys | None = None
    ) -> "Program":
        """Read a program that `save` wrote; another file, or a damaged one, is a `DiffoptError`.

        `trusted_keys`: as for `diffopt.load`.
        """
        expect_path("path", path)
        file = program_file.read(path)
        signatures.verify(file, trusted_keys)
        data, tensors, assets = program_file.members(file)
        if data["format"] != FORMAT:
            raise DiffoptError(
                f"{os.fspath(path)}: format {data['format']}, this diffopt reads {FORMAT}; "
                "trace the model again"
            )
        with file.making("member program.json"):
            program = Program.from_members(data, tensors, assets)
        program.file = file
        return program


def _record_origins(
    origins: Mapping[str, Any],
    recipes: Sequence[fx.GraphModule],
    shared: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Say where the tensors of a file come from.

    Args:
        origins: Of `Program.to_members`.
        recipes: The graphs of what is computed.
        shared: The graphs' tensors by key.
        tensors: All that are stored.
    """
    for (key, names), recipe in zip(origins["computed"].items(), recipes, strict=True):
        if key in shared:
            shape = tuple(shared[key].shape)
            origin = weight_origins.Computed(frozenset(names), shape, recipe)
            weight_origins.record(shared[key], origin)
    for key in origins["tensors"].keys() & shared.keys():
        row = weight_origins.from_json(origins["tensors"][key], tensors)
        weight_origins.record(shared[key], row)


def _placed(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a file's tensor with other strides, which take no more memory than a graph's may."""
    extent = 1 + sum(
        (size - 1) * step for size, step in zip(tensor.shape, stride, strict=True) if size
    )
    if extent > max(_MAX_SPREAD * tensor.numel(), 1 << 20):
        raise ValueError(f"the strides {list(stride)} take {extent} elements of memory")
    return with_strides(tensor, stride)


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
