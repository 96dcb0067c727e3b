"""Random operators as steps that the host repeats with another generator."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from diffopt.capture.recorder import Recorder, fail
from diffopt.host.arguments import Place
from diffopt.host.inputs import DRAWS, FILLS, Draw

aten = torch.ops.aten

_CREATED = {"randn_like": "randn", "rand_like": "rand", "randint_like": "randint"}
_NUMBERS = {**DRAWS, "normal": DRAWS["normal_"]}
"""By operator: its arguments that a `Draw` keeps."""


def step(
    func: Any, args: Any, kwargs: Any, out: Tensor, generator: Place | None, stream: int
) -> Draw:
    """Return the step that draws what a random operator has drawn.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Its named arguments.
        out: Its result.
        generator: The place of the generator or seed among the caller's arguments.
        stream: See `Draw`.
    """
    packet = func._schema.name.split("::")[1]
    name = _CREATED.get(packet, packet)
    if name not in _NUMBERS:
        _refuse(packet, "use torch.randn or rand")
    named = _named(func, args, kwargs)
    extra = [named[key] for key in _NUMBERS[name] if named.get(key) is not None]
    if name == "randint" and len(extra) == 1:
        extra = [0, *extra]
    if name == "normal":  # of two numbers and a size
        name = "normal_"
    for created, fill in FILLS.items():
        if name == fill and extra == [0, 1] and created != "randint":
            name, extra = created, []
    stride = None if out.is_contiguous() else tuple(out.stride())
    dtype = str(out.dtype).removeprefix("torch.")
    numbers = tuple(float(number) for number in extra)
    return Draw(f"aten.{name}", tuple(out.shape), dtype, numbers, generator, stride, stream)


def expect_repeatable(draw: Draw, state: Tensor, out: Tensor) -> None:
    """Raise a `CaptureError` where a step does not draw what the pipeline drew from this state."""
    generator = torch.Generator()
    generator.set_state(state)
    again = draw.sample(generator)
    if again.stride() != out.stride() or not torch.equal(again, out):
        _refuse(draw.op.removeprefix("aten."), "use torch.randn or rand")


def _refuse(operator: str, advice: str) -> NoReturn:
    fail(f"{operator} draws random numbers in a way that can't be repeated outside", advice)


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return an operator's arguments by name, with its defaults."""
    named = {}
    for index, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        named[argument.name] = (
            args[index] if index < len(args) else kwargs.get(argument.name, default)
        )
    return named


# Samplers that are a function of noise and of tensors

Composition = Callable[..., Tensor]


def composition(func: Any) -> Composition | None:
    """Return a function of an operator's arguments that draws noise and computes with it, or None.

    Each gives the bits of the operator; `compose` checks them.
    """
    return _COMPOSED.get(func)


def compose(recorder: Recorder, composed: Composition, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Record the composition of a random operator, and compare it with the operator itself."""
    named = _named(func, args, kwargs)
    generator = torch.default_generator if named["generator"] is None else named["generator"]
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    values = [value.clone() if isinstance(value, Tensor) else value for value in args]
    expected = func(*values, **{**kwargs, "generator": twin})
    with recorder:
        out = composed(**named)
    if not torch.equal(expected, out):
        _refuse(
            func._schema.name.split("::")[1],
            "draw with torch.randn or rand, and compute with the noise",
        )
    return out


def _normal(mean: Any, std: Any, generator: Any) -> Tensor:
    parts = [part for part in (mean, std) if isinstance(part, Tensor)]
    shape = torch.broadcast_tensors(*parts)[0].shape  # type: ignore[no-untyped-call]
    noise = torch.empty(shape, dtype=parts[0].dtype)
    if isinstance(std, Tensor):
        noise = noise.normal_(generator=generator)
        return torch.add(noise * std, mean)
    return torch.add(noise.normal_(0, std, generator=generator), mean)


def _bernoulli(self: Tensor, generator: Any, p: Any = None) -> Tensor:
    chance = self if p is None else p
    if not isinstance(chance, Tensor):
        return torch.empty_like(self).bernoulli_(chance, generator=generator)
    noise = torch.empty(self.shape, dtype=chance.dtype).uniform_(generator=generator)
    return (noise < chance).to(self.dtype)


def _bernoulli_into(self: Tensor, generator: Any, p: Tensor) -> Tensor:
    return self.copy_(_bernoulli(self, generator, p))


def _multinomial(self: Tensor, num_samples: int, replacement: bool, generator: Any) -> Tensor:
    if replacement and num_samples > 1:
        _refuse("multinomial with replacement", "draw one sample at a time")
    ratio = self / torch.empty_like(self).exponential_(1, generator=generator)
    if num_samples == 1:
        return ratio.argmax(-1, keepdim=True)
    return ratio.topk(num_samples, -1).indices


_COMPOSED: dict[Any, Composition] = {
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.normal.Tensor_Tensor: _normal,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    aten.bernoulli_.Tensor: _bernoulli_into,
    aten.multinomial.default: _multinomial,
}
