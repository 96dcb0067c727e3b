"""Inputs for calls that measure a program: seeds count up, prompts or class labels take turns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from diffopt.errors import DiffoptError
from diffopt.host.arguments import value_at
from diffopt.host.inputs import (
    CallArguments,
    Draw,
    InputStep,
    Processor,
    TensorArgument,
    is_computed,
)
from diffopt.ir import graph as g
from diffopt.ir.op_sets import COPIES, VIEWS
from diffopt.ir.program import Program

aten = torch.ops.aten
log = logging.getLogger("diffopt")

# Operators whose result has no other values than their arguments have.
_MOVES = {*VIEWS, *COPIES, aten.cat.default, aten.repeat.default}


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a text file: one a line, empty lines left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DiffoptError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DiffoptError(f"{path}: is no text file; write one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DiffoptError(f"{path}: has no prompts; write one a line")
    return prompts


def requests(
    program: Program, prompts: Sequence[str] | None, count: int, seed: int = 0
) -> list[list[Tensor]]:
    """Return the flat inputs of `count` calls: seeds count up, the prompts take turns.

    Everything else that the caller gave at capture (pictures, embeddings, numbers, latents) keeps
    the value of then.

    Args:
        program: What will be run; not one that serves several requests at once.
        prompts: What to use as `prompt`; by default that of the capture. For a model that takes
            class labels instead: these, as text.
        count: How many calls.
        seed: Of the first call.
    """
    texts = prompts or ()
    labels = {} if not texts or "prompt" in program.host.inputs() else _labels(program)
    places = [step.generator or () for step in program.host.steps if isinstance(step, Draw)]
    width = 1 + max((k for place in places for k in place if isinstance(k, int)), default=0)
    calls = []
    for index in range(count):
        arguments: dict[str, Any] = {}
        if program.host.takes_seed():
            arguments["seed"] = seed + index * width
        if texts and not labels:
            arguments["prompt"] = _prompt(program, texts, index)
        tensors = _inputs(program, CallArguments(program.host, arguments))
        for at, rows in labels.items():
            values = [_label(text, rows) for text in _turn(texts, index, tensors[at].numel())]
            tensors[at] = torch.tensor(values, dtype=tensors[at].dtype).view_as(tensors[at])
        _check(program, tensors, arguments.get("prompt"))
        calls.append(tensors)
    return calls


def representative(
    what: str, program: Program, prompts: Sequence[str] | None, count: int, seed: int = 0
) -> list[list[Tensor]]:
    """Return `requests` that stand for all later ones to `what`; warn if they can hardly do so."""
    if not prompts and "prompt" in program.host.inputs():
        log.warning(
            "%s calibrates with the prompt of the capture alone, and what it finds may not hold for"
            " others: give prompts with --calibrate FILE, or prompts= in Python",
            what,
        )
    return requests(program, prompts, count, seed)


def _turn(texts: Sequence[str], index: int, size: int) -> list[str]:
    """Return the texts of a call that has `size` of them."""
    return [texts[k % len(texts)] for k in range(index * size, (index + 1) * size)]


def _prompt(program: Program, texts: Sequence[str], index: int) -> str | list[str]:
    """Return the prompt of a call, or its list of prompts if it was traced with one."""
    traced = program.host.call.get("prompt")
    many = isinstance(traced, list)
    turn = _turn(texts, index, len(traced) if isinstance(traced, list) else 1)
    return turn if many else turn[0]


def _label(text: str, rows: int) -> int:
    if not text.isdecimal() or int(text) >= rows:
        raise DiffoptError(
            f"'{text}' is no class label, and the program takes no prompt: calibrate with whole"
            f" numbers from 0 to {rows - 1}"
        )
    return int(text)


def _inputs(program: Program, call: CallArguments) -> list[Tensor]:
    """Return the inputs at capture, with the texts and draws of a new call."""
    tensors = list(program.sample)
    at = 0
    for step in program.host.steps:
        if isinstance(step, Draw) or (step.from_text and _is_at_hand(step, call)):
            tensors[at : at + step.count] = step.run(call)
        at += step.count
    return tensors


def _is_at_hand(step: InputStep, call: CallArguments) -> bool:
    """Tell whether a call has all that a step reads: a program does not keep pictures."""
    if isinstance(step, Processor) and is_computed(step.args):
        return False
    return all(value_at(call.arguments, place[:1]) is not None for place in step.places())


def _labels(program: Program) -> dict[int, int]:
    """Return the inputs that are class labels: by position, how many labels there can be."""
    steps = [step for step in program.host.steps for _ in range(step.count)]
    inputs = g.placeholders(program.root)
    rows = [
        _rows(program, n) if isinstance(s, TensorArgument) else None
        for s, n in zip(steps, inputs, strict=True)
    ]
    labels = {at: count for at, count in enumerate(rows) if count is not None}
    if not labels:
        known = ", ".join(sorted(program.host.inputs()))
        raise DiffoptError(
            "the program takes neither a prompt nor class labels to calibrate with (its inputs"
            f" are: {known}); leave the prompts out"
        )
    return labels


def _rows(program: Program, argument: fx.Node) -> int | None:
    """Return how many values an input may have that only picks rows of tables; else None."""
    rows: list[int] = []
    stack = [(program.root, argument)]
    while stack:
        gm, node = stack.pop()
        for user in node.users:
            if user.op == "call_module":
                body = g.attribute(gm, str(user.target))
                pairs = zip(g.placeholders(body), user.args, strict=True)
                stack += [(body, formal) for formal, actual in pairs if actual is node]
            elif user.target is aten.embedding.default and user.args[0] is not node:
                rows.append(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
            elif user.target in _MOVES:
                stack.append((gm, user))
            else:
                return None
    return min(rows, default=None)


def _check(program: Program, tensors: Sequence[Tensor], prompt: object) -> None:
    inputs = g.placeholders(program.root)
    for node, tensor, seen in zip(inputs, tensors, program.sample, strict=True):
        if tensor.shape != seen.shape:
            raise DiffoptError(
                f"the prompt {prompt!r} gives {node.name} the shape {list(tensor.shape)}; the"
                f" program was traced with one of {list(seen.shape)}: calibrate with prompts of as"
                " many tokens"
            )
    if program.guards:
        program.guards.check(tensors)
