"""`diffopt.trace`: captures a call of a pipeline as a program."""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from diffopt.capture import challenges, followed_code, perturbation, value_tree, verification
from diffopt.capture.component_calls import ComponentCalls, Lifted
from diffopt.capture.dispatch_modes import Location
from diffopt.capture.find_modules import CalledModules
from diffopt.capture.input_recipes import RunInputs
from diffopt.capture.module_state import pipeline_digests
from diffopt.capture.real_reads import Answers, NeedsRun, ReadCounter, answers_of
from diffopt.capture.recorder import FAILURES, Recorder
from diffopt.capture.results import Result, is_plain_data
from diffopt.capture.same_program import check_same_operators, is_run_of
from diffopt.capture.torch_functions import TorchFunctionRecorder
from diffopt.capture.tracked_text import plain_texts
from diffopt.errors import CaptureError, DiffoptError, expect_type, first_line
from diffopt.host.arguments import leaves, place_text, replaced, short, value_at
from diffopt.host.guards import Guards
from diffopt.host.inputs import Computed, Host, InputStep
from diffopt.host.processors import load_component, save_component
from diffopt.host.schema import describe
from diffopt.host.text_reads import WHOLE, Derived, TextRead
from diffopt.ir import call_tags
from diffopt.ir import graph as g
from diffopt.ir.program import Program

log = logging.getLogger("diffopt")


def trace(
    pipeline: Callable[..., Any],
    /,
    *,
    dynamic: Sequence[str] | Literal["auto"] = (),
    components: Mapping[str, Any] | None = None,
    source: str = "",
    check: bool | None = None,
    **arguments: Any,
) -> Program:
    """Capture the call `pipeline(**arguments)` as a program.

    The pipeline's Python runs three times without computing its models, each of which is exported
    once per call signature. No adapter per pipeline is needed. Then the pipeline runs once for
    real, with other texts, pictures and seeds, and the program must give the same bits.

    Args:
        pipeline: A diffusers pipeline, or any callable.
        dynamic: Names of number arguments that become inputs of the program; Python's comparisons
            with them become guards. "auto": all floating-point numbers that can, those that the
            pipeline has by default as well; the others are bound, as the log says.
        components: Modules, tokenizers … by name; by default `pipeline.components`, or the modules
            that the pipeline calls where it has none.
        source: Where the pipeline came from, stored as provenance.
        check: Whether to compare the program with the pipeline; None: if that takes less than two
            minutes, else a warning says that it was not done.
        arguments: The call's arguments; texts, seeds, tensors, pictures and lists of numbers among
            them become inputs, all other values are bound.

    Returns:
        The program; `program(**arguments)` has the arguments and result of the pipeline.

    Raises:
        CaptureError: The pipeline does something that no graph can express (has the line), or the
            program differs from it.
    """
    if not callable(pipeline):
        kind = type(pipeline).__name__
        raise DiffoptError(f"the pipeline must be something that is called, got {kind}")
    if dynamic != "auto":
        expect_type("dynamic", dynamic, list, tuple, set, frozenset, wanted="a list of names")
    expect_type("components", components, Mapping, type(None), wanted="a dict of modules by name")
    expect_type("check", check, bool, type(None), wanted="True, False or None")
    expect_type("source", source, str, wanted="a text")
    session = Session(pipeline, components, () if dynamic == "auto" else dynamic, source, check)
    if dynamic == "auto":
        arguments = session.keep_numbers(arguments)
    return session.program(arguments, compare=True)


def trace_function(function: Callable[..., Any], *tensors: Tensor) -> Program:
    """Capture a function of tensors as a program; see `trace`."""
    arguments = {f"x{index}": tensor for index, tensor in enumerate(tensors)}

    def pipeline(**arguments: Tensor) -> Any:
        return function(*arguments.values())

    session = Session(pipeline, getattr(function, "components", {}))
    return session.program(arguments)


class Session:
    """Captures calls of one pipeline, and exports each signature of a component once for all.

    Args:
        pipeline: A diffusers pipeline, or any callable.
        components: As in `trace`.
        dynamic: As in `trace`.
        source: As in `trace`.
        check: As in `trace`.
    """

    def __init__(
        self,
        pipeline: Callable[..., Any],
        components: Mapping[str, Any] | None = None,
        dynamic: Sequence[str] = (),
        source: str = "",
        check: bool | None = None,
    ) -> None:
        self.pipeline, self.dynamic, self.source = pipeline, tuple(dynamic), source
        self.check = check
        self._answers: Answers | None = None
        if components is None:
            components = getattr(pipeline, "components", None)
        self._found = None if components is not None else CalledModules(pipeline)
        self._set(components or {})

    def _set(self, components: Mapping[str, Any]) -> None:
        modules = {name: c for name, c in components.items() if isinstance(c, torch.nn.Module)}
        self.component_calls = ComponentCalls(modules)
        self.digests = pipeline_digests(modules)
        self.processors: dict[str, Any] = {
            name: c
            for name, c in components.items()
            if not isinstance(c, (torch.nn.Module, str, int, float, type(None))) and callable(c)
        }

    def keep_numbers(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Make all floating-point numbers of the call inputs that can be; return its arguments.

        Those that are left out have the pipeline's defaults. Models are exported once.
        """
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(self.pipeline).parameters.items()
            if type(parameter.default) is float
        }
        call = {**defaults, **arguments}
        kinds = {name: (int, float) if name in defaults else (float,) for name in call}
        names = [name for name, value in call.items() if type(value) in kinds[name]]
        if not names or self._obstacle(names, call) is None:
            return call
        kept: list[str] = []
        for name in names:
            if (reason := self._obstacle([*kept, name], call)) is None:
                kept.append(name)
            else:
                log.warning("%s stays %s: %s", name, short(call[name]), reason)
        self.dynamic = tuple(kept)
        return {n: v for n, v in call.items() if n in arguments or n in kept}

    def _obstacle(self, names: Sequence[str], arguments: Mapping[str, Any]) -> str | None:
        """Say why these numbers cannot be inputs; None if they can, and now are."""
        self.dynamic = tuple(names)
        try:
            self.program(arguments)
        except (CaptureError, ValueError, TypeError) as error:
            return first_line(error)
        return None

    def program(self, arguments: Mapping[str, Any], *, compare: bool = False) -> Program:
        """Capture one call; `compare` it with the pipeline as `check` says, or not at all."""
        self.component_calls.weights.begin()
        self._answers = None
        while True:
            try:
                check = self.check if compare else False
                program, probe = self._program(arguments, tried=check is not False)
                return self._compared(program, probe, arguments, check)
            except Lifted:
                continue  # a number became an input; other exports are kept
            except NeedsRun as error:
                log.info("%s: the pipeline runs for real, for which way it goes", error)
                with self.component_calls.restored():
                    run = partial(verification.run_for_real, self.pipeline, arguments)
                    self._answers = answers_of(run)
            except CaptureError as error:
                for reason in self.component_calls.inlined.values():
                    error.add_note(reason)
                raise

    def _compared(
        self, program: Program, probe: RunInputs, arguments: Mapping[str, Any], check: bool | None
    ) -> Program:
        """Compare a program with the pipeline, and note in it whether that was done."""
        needed = 0.0 if check is not None else verification.seconds(program)
        if check or (check is None and needed <= verification.LIMIT):
            with self.component_calls.restored():
                others = perturbation.inputs_of(program.host, probe.arguments)
                program.check = verification.compare(
                    self.pipeline, program, replaced(dict(arguments), others), arguments
                )
        else:
            program.check = "not compared with the pipeline's own result"
        if check is None and needed > verification.LIMIT:
            log.warning(
                "the program was not compared with the pipeline, which would take about %.0f "
                "minutes: `--check` (check=True in Python) does",
                needed / 60,
            )
        return program

    def _program(self, arguments: Mapping[str, Any], *, tried: bool) -> tuple[Program, RunInputs]:
        """Capture one call, `tried` with other texts; return the run with other values, too."""
        scout = self._scout(arguments)
        try:
            return self._probed(arguments, scout, tried)
        except (CaptureError, ValueError, TypeError, IndexError, KeyError, RuntimeError):
            if not scout.used_lists and not scout.tokens:
                raise
        # Of a list that Python reads as well, the values are bound.
        scout = self._inputs(perturbation.separated(arguments), None, lists=False)
        self._run(scout, seed=1)
        return self._probed(arguments, scout, tried)

    def _scout(self, arguments: Mapping[str, Any]) -> RunInputs:
        """Run with the caller's arguments; the first time, find components if none are named."""
        if self._found is not None:
            found = self._found
            with found.watching():
                scout = self._inputs(perturbation.separated(arguments), None)
                self._run(scout, seed=1)
            self._found = None
            if not found.modules:
                return scout
            self._set(found.named())
            self.component_calls.weights.begin()
        scout = self._inputs(perturbation.separated(arguments), None)
        self._run(scout, seed=1)
        return scout

    def _inputs(
        self, arguments: Mapping[str, Any], earlier: RunInputs | None, **options: bool
    ) -> RunInputs:
        return RunInputs(arguments, self.processors, earlier, self.dynamic, **options)

    def _probed(
        self, arguments: Mapping[str, Any], scout: RunInputs, tried: bool
    ) -> tuple[Program, RunInputs]:
        """Capture the call, which the scout has run, by a run with other values and a final one."""
        probe, recorder, other = self._probe(scout)
        try:
            return self._final(arguments, probe, recorder, other, tried), probe
        except CaptureError:
            # Where the number of tokens is not fixed, the probe's texts must have as many.
            changed = perturbation.same_lengths(scout, probe)
            if changed is None:
                raise
        probe = self._inputs(changed, scout, lists=scout.lists)
        recorder, other = self._run(probe, seed=2)
        return self._final(arguments, probe, recorder, other, tried), probe

    def _final(
        self,
        arguments: Mapping[str, Any],
        probe: RunInputs,
        probed: Recorder,
        other: Any,
        tried: bool,
    ) -> Program:
        """Run with the caller's arguments and return the program; `other` is the probe's result."""
        copies = perturbation.separated(arguments)
        final = self._inputs(copies, probe, final=True, lists=probe.lists)
        recorder, result = self._run(final, seed=1)
        check_same_operators(recorder, probed)
        returned = Result(plain_texts(result), recorder, final.array_recorder)
        returned.expect_same(plain_texts(other))
        output, checks = returned.structure(), returned.checks()
        steps, computed, sample = final.finish(recorder)
        host = self._host(arguments, final, steps, computed, output)
        host.classes = returned.classes
        host.checks = checks
        root = recorder.root
        guards = _guards(recorder, probed, steps)
        g.prune_unused(root)
        call_tags.assign(root)
        for gm in root.modules():
            if isinstance(gm, fx.GraphModule):
                gm.recompile()
        program = Program(
            root,
            host,
            sample,
            guards=guards,
            source=self.source,
            digests=dict(self.digests),
            retrace=self._retrace(arguments),
            borrowed=self.component_calls.weights.seal(),
            pipeline_weights=self.component_calls.weights.record_origins(),
            closed=dict.fromkeys(sorted(recorder.used_weights), "the capture"),
        )
        if tried:
            self._challenge(program, arguments, final, recorder)
        return program

    def _challenge(
        self, program: Program, arguments: Mapping[str, Any], final: RunInputs, recorder: Recorder
    ) -> None:
        """Run with other texts that the program takes; bind the texts where it goes another way.

        Args:
            program: The program.
            arguments: Of the call that it captures.
            final: The run with these.
            recorder: Of that run.
        """
        host = program.host
        bound = {r.text.place for r in host.text_reads if r.text.steps == ((WHOLE, ()),)}
        inputs = sorted(host.input_places() - bound, key=repr)
        places = [place for place in inputs if isinstance(value_at(arguments, place), str)]
        if not places:
            return
        for name in followed_code.without_source(self.pipeline):
            log.warning(
                "the source of %s is not at hand: what it reads of texts that it composes, or by "
                "functions of C, is not seen, and not compared with later texts; define it in a "
                "file",
                name,
            )
        for text in challenges.texts(self.pipeline):
            changed = replaced(dict(arguments), dict.fromkeys(places, text))
            try:
                values = program.prepare(**perturbation.separated(changed))
            except Exception:  # it refuses this text, or the tokenizer does
                continue
            other = self._inputs(
                perturbation.separated(changed), final.earlier, final=True, lists=final.lists
            )
            other.templates = dict(final.templates)
            try:
                _, result = self._run(other, seed=1)
            except (Lifted, NeedsRun):
                raise
            except CaptureError:
                is_same = False
            except Exception:  # the pipeline does not take this text
                continue
            else:
                is_same = is_run_of(program, values, recorder, other, result)
            if not is_same:
                log.warning(
                    "texts are bound: of %s the pipeline makes something else, and by what it"
                    " tells them apart is not seen",
                    short(text),
                )
                host.text_reads += [
                    TextRead(Derived(p, ((WHOLE, ()),)), value_at(arguments, p), "the pipeline")
                    for p in places
                ]
                return

    def _host(
        self,
        arguments: Mapping[str, Any],
        final: RunInputs,
        steps: list[InputStep],
        computed: list[Computed],
        output: Any,
    ) -> Host:
        plain = {name: value for name, value in arguments.items() if is_plain_data(value)}
        host = Host(steps, output, plain, computed=computed)
        host.token_reads = final.token_reads()
        used = sorted(host.used_assets())
        host.assets = {name: self._files(name, final) for name in used}
        host.components = {name: self.processors[name] for name in used}
        host.schema = {name: describe(value) for name, value in arguments.items()}
        host.defaults = _defaults(self.pipeline, arguments)
        host.objects = {p: v for p, v in leaves(arguments) if "object" in describe(v, shallow=True)}
        for place in (place for place, value in host.objects.items() if callable(value)):
            log.warning(
                "%s is called by the capture alone, and what it computes is captured: the program"
                " does not call it",
                place_text(place),
            )
        host.text_reads, host.array_reads = final.reads_to_check(host.input_places())
        return host

    def _files(self, name: str, final: RunInputs) -> dict[str, bytes]:
        """Return the files of a host component; none where what is loaded would differ."""
        files = save_component(self.processors[name])
        if not files:
            return files
        state = value_tree.describe(vars(self.processors[name]))
        if any(other != state for other in final.states(name)):
            reason = "the pipeline changes it between its calls"
        else:
            try:
                if final.is_like(name, load_component(name, files)):
                    return files
                reason = "what is loaded gives other results"
            except Exception as error:  # of transformers, which raise any kind
                reason = f"what is saved cannot be loaded: {error}".partition("\n")[0]
        log.warning("no file will hold %r, as %s", name, reason)
        return {}

    def _probe(self, scout: RunInputs) -> tuple[RunInputs, Recorder, Any]:
        """Run with other texts, pictures and seeds; strings such as "pt" prove not to be texts."""
        texts, seeds = perturbation.texts(scout), perturbation.seeds(scout)
        while True:
            changed = perturbation.disturb(scout, perturbation.other_values(scout, texts, seeds))
            probe = self._inputs(changed, scout, lists=scout.lists)
            failure: Exception | None = None
            try:
                recorder, result = self._run(probe, seed=2)
            except (CaptureError, Lifted, NeedsRun):
                raise
            except Exception as error:  # of the pipeline, for a text that it does not take
                failure = error
            found = perturbation.reached(probe, texts), perturbation.seeded(probe, seeds)
            if failure is not None and (named := perturbation.named_in(failure, probe, texts)):
                texts = [place for place in texts if place not in named]
            elif found != (texts, seeds):
                texts, seeds = found
            elif failure is None:
                return probe, recorder, result
            elif texts or seeds:
                texts, seeds = [], []  # it fails on some of them: they are bound
            else:
                raise failure

    def _run(self, sources: RunInputs, seed: int) -> tuple[Recorder, Any]:
        recorder = Recorder(self.component_calls.weights, sources, self._answers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(_SEEDS + seed)
            stack.enter_context(sources.watching(self.pipeline))
            stack.enter_context(self.component_calls.recording(recorder, seed))
            stack.enter_context(TorchFunctionRecorder(recorder, sources))
            stack.enter_context(recorder)
            FAILURES.clear()
            try:
                result = self.pipeline(**sources.start(recorder))
            except Exception as error:
                error.args = plain_texts(error.args)
                raise
        if FAILURES:  # which the pipeline has caught
            raise FAILURES[0]
        return recorder, result

    def _retrace(self, arguments: Mapping[str, Any]) -> Callable[..., Program]:
        def retrace(*, scheduler: Any = None, compare: bool = False, **changes: Any) -> Program:
            """Capture again with other arguments, and with another scheduler where one is given."""
            with _swapped(self.pipeline, "scheduler", scheduler):
                # Captures share the graphs of components: what passes rewrite must not be these.
                return self.program({**arguments, **changes}, compare=compare).clone()

        retrace.pipeline = self.pipeline  # type: ignore[attr-defined]
        return retrace


# Of the default generator in a run: seeds that a pipeline would not set itself.
_SEEDS = 0x5EED_0F0F_0000


def _defaults(pipeline: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of the callable's defaults of the arguments that are not given."""
    try:
        parameters = inspect.signature(pipeline).parameters
    except (TypeError, ValueError):
        return {}
    rows = {name: p.default for name, p in parameters.items() if name not in arguments}
    return {name: describe(v) for name, v in rows.items() if v is not inspect.Parameter.empty}


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Any:
    if value is None:
        yield
        return
    old = vars(owner)[name]
    vars(owner)[name] = value
    try:
        yield
    finally:
        vars(owner)[name] = old


def _guards(final: Recorder, probe: Recorder, steps: Sequence[InputStep]) -> Guards | None:
    """Return guards of what Python read of the caller's values; None if it read nothing.

    A question about texts alone needs no guard where the probe got the other answer: it ran the
    same operators.
    """
    formals = g.placeholders(final.root)
    texts = [step.from_text for step in steps for _ in range(step.count)]
    texts_only = {node for node, is_text in zip(formals, texts, strict=True) if is_text}
    body = g.new_body("guards")
    env: dict[fx.Node, fx.Node] = {}
    g.copy_nodes(formals, final.root, body, env)
    values, expected, where, from_text = [], [], [], []
    others = dict(_numbered((place, value) for _, value, place in probe.reads))
    reads = _numbered((place, (node, value)) for node, value, place in final.reads)
    for key, (node, value) in reads:
        needed = g.ancestors([node])
        only_text = {n for n in needed if n.op == "placeholder"} <= texts_only
        if only_text and isinstance(value, bool) and others.get(key) is (not value):
            continue
        g.copy_nodes([n for n in final.root.graph.nodes if n in needed], final.root, body, env)
        values.append(env[node])
        expected.append(value)
        where.append(str(key[0]))
        from_text.append(only_text)
    if not values:
        return None
    body.graph.output(tuple(values))
    g.set_outputs(body, values)
    body.recompile()
    return Guards(body, expected, where, from_text)


def _numbered(rows: Iterable[tuple[Location, Any]]) -> Iterator[tuple[tuple[Location, int], Any]]:
    """Number what has been read at the same line of the pipeline."""
    counter = ReadCounter()
    for place, value in rows:
        yield counter.next(place), value
