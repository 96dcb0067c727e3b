"""Let a program serve texts of any number of tokens, up to a largest one.

Before (captured with a prompt of five tokens):

    %words: int64[1,5]
    %2: float32[1,5,2,8] = aten.view(%1, [1, 5, 2, 8])

After `lengths(max=64)`:

    %words: int64[1,5]                                  # of 1 to 64 tokens
    %2: float32[1,5,2,8] = aten.reshape(%1, [1, -1, 2, 8])

The pipeline is captured again with longer texts, the same passes run on these captures, and what
differs between them becomes a size that the graph reads from its inputs (see
`diffopt.transforms.token_dimension`). The new program must give what each of these captures gives.

Not rewritten when the pipeline pads or cuts every text to a fixed number of tokens. Refused is
- a program that is not captured in this run: other texts cannot be captured for a saved one;
- a pipeline that does something else for a longer text than what it does for a shorter one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffopt.core import Context, Pass, Pipeline, option
from diffopt.core.equivalence import difference
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.host.inputs import CallArguments
from diffopt.ir import dynamic_sizes
from diffopt.ir import graph as g
from diffopt.ir.dynamic_sizes import Length
from diffopt.ir.printing import format_type
from diffopt.ir.program import Program
from diffopt.transforms.token_dimension import unify

SPREADS = ((0, 5), (1, 3))
"""How many tokens beyond the most to capture, and by how many captures differ.

With more than one a size that does not grow evenly shows. The second is for pipelines where a
number of tokens of the first happens to be another size, so that two calls share a component.
"""

Texts = dict[str, Any]
"""Arguments: texts, and lists of texts."""

Axis = tuple[int, int]
"""Of an input, its number, and the axis."""


@dataclass(frozen=True)
class Lengths(Pass):
    """Let a program serve texts of any number of tokens, up to a largest one."""

    atol = 1e-5
    rtol = 1e-4
    tolerance_reason = "a matrix product over another number of tokens sums in another order"

    max: int = option(64, "the most tokens of a text, with those of the pipeline's template")

    def __post_init__(self) -> None:
        if self.max < 2:
            raise DiffoptError(f"max={self.max}: wants at least 2 tokens")

    def run(self, program: Program, ctx: Context) -> None:
        """Capture longer texts, and rewrite the program into one for all."""
        texts = _texts(program)
        axes = {name: grown for name in texts if (grown := _free_axes(program, texts, name))}
        if not axes:
            ctx.skip("the program", "every text has a fixed number of tokens" + _reads(program))
            return
        if program.retrace is None:
            raise DiffoptError(
                "lengths captures the pipeline again with longer texts, and a saved program has no "
                "pipeline: give the model itself"
            )
        captures = _rewrite(program, texts, axes, self.max, ctx)
        for capture in captures if ctx.compare else ():
            self._compare(program, capture)
        # The shapes to record are those that the inputs seen at capture give.
        dynamic_sizes.infer_values(
            program.root, [g.fake(tensor) for tensor in program.sample], record=True
        )
        ctx.note("tokens", {n.text: f"{n.low} to {n.high}" for n in program.lengths})

    def _compare(self, program: Program, capture: Program) -> None:
        """Check that the program gives what a capture gives for its own texts."""
        expected = capture.run(capture.sample)
        largest, _ = difference(program.run(capture.sample), expected)
        scale = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
        if not largest <= self.atol + self.rtol * scale:
            shapes = ", ".join(format_type(t) for t in capture.sample)
            raise ToleranceError(
                f"{self} changed the output by {largest:.3g} for other texts, with inputs {shapes}"
            )


def _rewrite(
    program: Program, texts: Texts, axes: Mapping[str, Sequence[Axis]], most: int, ctx: Context
) -> list[Program]:
    """Rewrite a program into one for all lengths; return the captures that it unifies."""
    errors = []
    for spread in SPREADS:
        rows = _longer(program, texts, axes, most, spread)
        captures = [_capture(program, row, ctx) for row in rows]
        grown, captures = _that_grow(captures, list(axes))
        try:
            if len({str(capture.host.to_json()["steps"]) for capture in captures}) > 1:
                raise DiffoptError("what is drawn or tokenized differs for texts of other lengths")
            root, guards = unify(captures)
            lengths = dynamic_sizes.lengths([p.root for p in captures], grown)
        except DiffoptError as error:
            errors.append(error)
            continue
        program.root, program.guards = root, guards
        program.lengths = _bounded(program, lengths, texts, most)
        program.refresh()
        return captures
    raise errors[0]


def _reads(program: Program) -> str:
    """Return a sentence on where Python branches on the texts; empty if it does not."""
    guards = program.guards
    places = zip(guards.where, guards.from_text, strict=True) if guards else ()
    location = next((place for place, from_text in places if from_text), None)
    return f", but a new one must give what is read at {location.rstrip(':')}" if location else ""


def _texts(program: Program) -> Texts:
    """Return the texts of the captured call."""
    names = [
        str(place[0]) for step in program.host.steps if step.from_text for place in step.places()
    ]
    call = program.host.call
    return {name: call[name] for name in dict.fromkeys(names) if _is_text(call.get(name))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _with_more(value: Any, more: str) -> Any:
    """Return a text, or each of several, with another behind it."""
    return value + more if isinstance(value, str) else [text + more for text in value]


def _shapes(program: Program, texts: Texts) -> dict[int, list[int]]:
    """Return the shapes of the inputs that are computed from texts alone, by input number."""
    call, index = CallArguments(program.host, dict(texts)), 0
    shapes: dict[int, list[int]] = {}
    for step in program.host.steps:
        names = {str(place[0]) for place in step.places()}
        if step.from_text and names and names <= texts.keys():
            tensors = step.run(call)
            shapes |= {index + k: list(tensor.shape) for k, tensor in enumerate(tensors)}
        index += step.count
    return shapes


def _free_axes(program: Program, texts: Texts, name: str) -> list[Axis]:
    """Return the axes of the inputs that grow with a text."""
    before = _shapes(program, texts)
    more = " a" * (4 * max((max(shape) for shape in before.values()), default=0))
    after = _shapes(program, {**texts, name: _with_more(texts[name], more)})
    return [
        (index, axis)
        for index, shape in before.items()
        for axis, (size, other) in enumerate(zip(shape, after[index], strict=True))
        if size != other
    ]


def _count(program: Program, texts: Texts, axes: Sequence[Axis]) -> int:
    shapes = _shapes(program, texts)
    return max(shapes[index][axis] for index, axis in axes)


def _filled(program: Program, texts: Texts, name: str, axes: Sequence[Axis], wanted: int) -> Any:
    """Return a text extended to `wanted` tokens, or a few less."""
    text = texts[name]
    for more in (" the", " a", "a"):  # the last adds the one token that may be missing
        for _ in range(wanted):
            longer = _with_more(text, more)
            if _count(program, {**texts, name: longer}, axes) > wanted:
                break
            text = longer
    return text


def _longer(
    program: Program,
    texts: Texts,
    axes: Mapping[str, Sequence[Axis]],
    most: int,
    spread: tuple[int, int],
) -> list[Texts]:
    """Return texts to capture: some, then for each text these with that one longer.

    No two of a call have equally many tokens, and the order of their lengths is kept: two of one
    length would share a component, and passes choose by size.
    """
    base = dict(texts)
    beyond, step = spread
    highest = most + beyond + 2 * step * (len(axes) - 1)
    for name, grown in axes.items():  # the tokenizer may cut
        endless = _with_more(texts[name], " a" * 2 * highest)
        highest = min(highest, _count(program, {**texts, name: endless}, grown))
    levels = {name: highest - 2 * step * k for k, name in enumerate(axes)}
    for name, level in levels.items():
        if (count := _count(program, texts, axes[name])) > most:
            raise DiffoptError(
                f"lengths(max={most}): {name!r} gives {count} tokens at capture; give a larger "
                "max, or trace with a shorter text"
            )
        base[name] = _filled(program, texts, name, axes[name], level - step)
    longer = {
        name: _filled(program, base, name, axes[name], level) for name, level in levels.items()
    }
    return [base, *({**base, name: longer[name]} for name in axes)]


def _capture(program: Program, texts: Texts, ctx: Context) -> Program:
    """Capture the pipeline with other texts, and run the passes that have run; none is checked."""
    assert program.retrace is not None
    ctx.progress("capturing the pipeline with longer texts")
    new = program.retrace(**texts)
    new.refresh()
    for step in Pipeline.parse(",".join(record["text"] for record in program.history)).passes:
        step.run(new, replace(ctx, inputs=new.sample_inputs(), skipped=[], notes={}))
        new.refresh()
    return new


def _that_grow(captures: list[Program], texts: Sequence[str]) -> tuple[list[str], list[Program]]:
    """Drop texts that change no shape: of several padded to the longest, all others."""
    shapes = [[t.shape for t in capture.sample] for capture in captures]
    kept = [k for k, shapes_of in enumerate(shapes) if k == 0 or shapes_of != shapes[0]]
    return [texts[k - 1] for k in kept[1:]], [captures[k] for k in kept]


def _bounded(program: Program, lengths: Sequence[Length], texts: Texts, most: int) -> list[Length]:
    """Bound each length by the shortest text and by `most`."""
    shortest = _shapes(program, {name: _emptied(text) for name, text in texts.items()})
    bounded = []
    for length in lengths:
        index, axis, _ = length.axes[0]
        low, size = shortest[index][axis], program.sample[index].shape[axis]
        if size < 2:
            raise DiffoptError(f"{length.text!r} has one token at capture: trace with a longer one")
        bounded.append(replace(length, low=max(1, min(low, size)), high=min(most, length.high)))
    return bounded


def _emptied(value: Any) -> Any:
    return "" if isinstance(value, str) else ["" for _ in value]
