"""Random sampling programs: a Python function of random arguments, made of random statements.

Each statement is a closure over a small environment: the arguments, the components and the value
`x` that the function returns. What a statement does is what pipelines do: calls of networks with
numbers that differ, draws, writes in place, hooks, buffers and weights that are written for a call,
branches on texts, numbers, pixels and what a network computes, numpy and PIL, autocast, gradients.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from tests.zoo import generator

Arguments = dict[str, Any]
Statement = Callable[[SimpleNamespace], None]


class Net(nn.Module):
    """A network with a buffer, an attribute that is read, and a cache of its last input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))
        self.reset()

    def reset(self) -> None:
        """Set what calls change to the values of the beginning."""
        self.float()
        self.shift.zero_()
        self.scale = 1.0
        self.last: Tensor | None = None
        self.options = {"nested": [1.0, {"deep": 2.0}]}

    def forward(self, x: Tensor, t: Any = 0.5, keep: bool = False) -> Tensor:
        out = self.linear(x) * self.scale + self.shift + self.options["nested"][1]["deep"]
        out = out + (t if isinstance(t, float) else torch.as_tensor(t).float() * 2)
        if self.last is not None:
            out = out + self.last
        self.last = x * 0.5 if keep else None
        return torch.tanh(out)


class Words:
    """A tokenizer: two numbers a text, whatever its length."""

    def __call__(self, texts: Any) -> dict[str, Tensor]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [[sum(map(ord, text)) % 97, len(text) % 50] for text in texts]
        return {"input_ids": torch.tensor(rows)}


@dataclass
class Sampler:
    """A callable with components, its arguments by a seed, and what it does."""

    statements: list[Statement]
    names: list[str]
    arguments: Callable[[random.Random], Arguments]
    components: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **arguments: Any) -> Any:
        env = SimpleNamespace(**self.components, a=arguments, x=torch.ones(2, 4))
        for statement in self.statements:
            statement(env)
        return env.x


def picture(r: random.Random, size: tuple[int, int] = (4, 2)) -> Image.Image:
    values = np.random.default_rng(r.randrange(1 << 30)).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(values.astype("uint8"))


WORDS = ("a red cat", "two dogs", "CAT", " the old  house ", "a cat and a dog", "xyz & more", "")

ONES = torch.ones(4)

# Arguments: by name, a value by a source of random numbers.
VALUES: dict[str, Callable[[random.Random], Any]] = {
    "latents": lambda r: torch.randn(2, 4, generator=generator(r.randrange(1000))),
    "pair": lambda r: [torch.randn(4, generator=generator(r.randrange(1000))) for _ in range(2)],
    "prompt": lambda r: r.choice(WORDS),
    "negative": lambda r: r.choice(WORDS),
    "prompts": lambda r: [r.choice(WORDS) for _ in range(2)],
    "options": lambda r: {
        "scale": r.choice((0.5, 0.9)),
        "mode": r.choice("ab"),
        "t": torch.ones(4),
    },
    "generator": lambda r: generator(r.randrange(1000)),
    "generators": lambda r: [generator(r.randrange(1000)) for _ in range(2)],
    "seed": lambda r: r.randrange(1000),
    "sigmas": lambda r: sorted((round(r.random(), 3) for _ in range(3)), reverse=True),
    "array": lambda r: np.random.default_rng(r.randrange(1000)).random((2, 4)).astype("float32"),
    "image": picture,
    "steps": lambda r: r.choice((1, 2)),
    "kind": lambda r: r.choice(("fast", "slow")),
}


def _set(function: Callable[[SimpleNamespace], Tensor]) -> Statement:
    def statement(env: SimpleNamespace) -> None:
        env.x = function(env)

    return statement


def _mean(tensor: Tensor) -> Tensor:
    return tensor.float().mean()


def _tokens(env: SimpleNamespace, texts: Any) -> Tensor:
    return env.embed(env.words(texts)["input_ids"]).sum(1)


def _slices(env: SimpleNamespace) -> None:
    env.x = env.x.clone()
    env.x[:, 1] = env.x[:, 0] * 2
    env.x[0].mul_(0.5)


def _argument_in_place(env: SimpleNamespace) -> None:
    env.a["latents"].mul_(0.5)
    env.x = env.x + env.a["latents"]


def _swapped_scale(env: SimpleNamespace) -> None:
    env.net.scale = 2.0
    env.x = env.net(env.x)
    env.net.scale = 1.0
    env.x = env.net(env.x)


def _deep_option(env: SimpleNamespace) -> None:
    env.x = env.net(env.x)
    env.net.options["nested"][1]["deep"] = -1.0
    env.x = env.net(env.x)
    env.net.options["nested"][1]["deep"] = 2.0


def _hooks(env: SimpleNamespace) -> None:
    for factor in (2.0, -1.0):
        handle = env.net.register_forward_hook(lambda m, i, o, factor=factor: o * factor)
        env.x = env.net(env.x)
        handle.remove()


def _pre_hook_closure(env: SimpleNamespace) -> None:
    factor = [1.0]
    handle = env.net.register_forward_pre_hook(lambda m, args: (args[0] * factor[0],))
    env.x = env.net(env.x)
    factor[0] = 3.0
    env.x = env.net(env.x)
    handle.remove()


def _forward_replaced(env: SimpleNamespace) -> None:
    original = env.net.linear.forward
    env.net.linear.forward = lambda x: original(x) * 0.25
    env.x = env.net(env.x)
    del env.net.linear.forward
    env.x = env.net(env.x)


def _buffer(env: SimpleNamespace) -> None:
    env.net.shift.add_(1.0)
    env.x = env.net(env.x)
    env.net.shift.zero_()
    env.x = env.net(env.x)


def _buffer_of_input(env: SimpleNamespace) -> None:
    env.net.shift.copy_(env.x[0])
    env.x = env.net(env.x)
    env.net.shift.zero_()


def _averaged_weights(env: SimpleNamespace) -> None:
    weight = env.net.linear.weight
    before = weight.data.clone()
    weight.data.copy_(before * 0.5)
    env.x = env.net(env.x)
    weight.data.copy_(before)
    env.x = env.net(env.x)


def _other_data(env: SimpleNamespace) -> None:
    weight = env.net.linear.weight
    before = weight.data
    weight.data = before * 0.5 + 1
    env.x = env.net(env.x)
    weight.data = before


def _double_precision(env: SimpleNamespace) -> None:
    env.net.double()
    env.x = env.net(env.x.double()).float()
    env.net.float()


def _kept(env: SimpleNamespace) -> None:
    env.x = env.net(env.x, keep=True)
    env.x = env.net(env.x)


def _loop(env: SimpleNamespace) -> None:
    for t in (0.9, 0.5, 0.1):
        env.x = env.net(env.x, t)


def _whole_loop(env: SimpleNamespace) -> None:
    for t in (9, 5):
        env.x = env.net(env.x, t)


def _tensor_loop(env: SimpleNamespace) -> None:
    for t in torch.linspace(1, 0, 3):
        env.x = env.net(env.x, t)


def _autocast(env: SimpleNamespace) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = env.net(env.x)
    env.x = env.net(env.x + y.float())


def _guided(env: SimpleNamespace) -> None:
    with torch.enable_grad():
        x = env.x.detach().requires_grad_()
        (grad,) = torch.autograd.grad((env.net(x) ** 2).sum(), x)
    env.x = env.x - grad.detach()


def _own_generator(env: SimpleNamespace) -> None:
    own = torch.Generator().manual_seed(env.a["seed"])
    env.x = env.x + torch.randn(2, 4, generator=own)
    env.x = env.x * torch.rand(4, generator=own)


def _seeds_all(env: SimpleNamespace) -> None:
    torch.manual_seed(env.a["seed"])
    env.x = env.x + torch.randn(2, 4)


def _fixed_generator(env: SimpleNamespace) -> None:
    env.x = env.x + torch.randn(2, 4, generator=torch.Generator().manual_seed(7))


def _distributions(env: SimpleNamespace) -> None:
    g = env.a["generator"]
    env.x = env.x + torch.empty(2, 4).normal_(1, 2, generator=g)
    env.x = env.x + torch.empty(4).exponential_(2, generator=g)
    env.x = env.x * torch.bernoulli(torch.full((4,), 0.5), generator=g)
    env.x = env.x[torch.randperm(2, generator=g)]


def _of_values(env: SimpleNamespace) -> None:
    g = env.a["generator"]
    env.x = env.x + torch.normal(env.x, 0.5, generator=g)
    env.x = env.x + torch.multinomial(env.x.softmax(-1), 1, generator=g)
    env.x = env.x * torch.bernoulli(env.x.sigmoid(), generator=g)


def _strided(env: SimpleNamespace) -> None:
    env.x = env.x + torch.empty(4, 2).t().normal_(generator=env.a["generator"])
    env.x = env.x + torch.randn_like(env.x)


def _reads_text(env: SimpleNamespace) -> None:
    if "cat" in env.a["prompt"]:
        env.x = env.x * 2
    env.x = env.x + _tokens(env, env.a["prompt"])


def _compares_texts(env: SimpleNamespace) -> None:
    env.x = env.x + _tokens(env, env.a["prompt"]) - _tokens(env, env.a["negative"])
    if env.a["prompt"] == env.a["negative"]:
        env.x = env.x * 3


def _template(env: SimpleNamespace) -> None:
    text = f"photo of {env.a['prompt'].strip().lower()}, {env.a['negative']}."
    env.x = env.x + _tokens(env, [text, env.a["prompt"]])


def _words_counted(env: SimpleNamespace) -> None:
    count = len(env.a["prompt"].split())
    env.x = env.x * count + _tokens(env, env.a["prompt"])


def _table(env: SimpleNamespace) -> None:
    style = {"CAT": 2.0}.get(env.a["prompt"], 1.0)
    env.x = env.x * style + _tokens(env, env.a["prompt"])


def _text_alone(env: SimpleNamespace) -> None:
    if env.a["kind"] == "slow":
        env.x = env.net(env.x)


def _option(env: SimpleNamespace) -> None:
    options = env.a["options"]
    env.x = env.x * options["scale"] + options["t"]
    if options["mode"] == "a":
        env.x = env.x + 1


def _sigmas(env: SimpleNamespace) -> None:
    for sigma in torch.tensor(env.a["sigmas"]):
        env.x = env.x - sigma * env.net(env.x)


def _sigmas_read(env: SimpleNamespace) -> None:
    env.x = env.x * env.a["sigmas"][0] + torch.tensor(env.a["sigmas"]).sum()


def _array(env: SimpleNamespace) -> None:
    env.x = env.x + torch.from_numpy(env.a["array"])


def _image(env: SimpleNamespace) -> None:
    values = torch.from_numpy(np.array(env.a["image"]).astype(np.float32) / 255.0)
    env.x = env.x + values.mean(-1)


def _image_size(env: SimpleNamespace) -> None:
    width, height = env.a["image"].size
    env.x = env.x * (width / height)


def _pasted(env: SimpleNamespace) -> None:
    frame = Image.new("RGB", (6, 4), (9, 8, 7))
    frame.paste(env.a["image"].resize((3, 2)), (1, 1))
    frame = frame.filter(ImageFilter.BoxBlur(1)).convert("L").crop((0, 0, 4, 2))
    env.x = env.x + torch.tensor(np.array(frame)) / 255


def _masked(env: SimpleNamespace) -> None:
    values = np.asarray(env.a["image"].resize((4, 2)), dtype=np.float32).mean(axis=-1) / 255
    values[values < 0.5] = 0
    values *= 2
    env.x = env.x + torch.from_numpy(np.where(values > 1.2, values, 1 - values))


def _bright(env: SimpleNamespace) -> None:
    values = np.array(env.a["image"].resize((4, 2)).convert("L"))
    if values.max() > 220 and not (values == 0).any():
        env.x = env.x * 2
    env.x = env.x + torch.from_numpy(values)


def _corner(env: SimpleNamespace) -> None:
    if env.a["image"].getpixel((0, 0))[0] > 128:
        env.x = env.x - 1


def _box(env: SimpleNamespace) -> None:
    image = env.a["image"].convert("L").point(lambda value: 255 if value > 120 else 0)
    box = image.getbbox() or (0, 0, 1, 1)
    env.x = env.x + torch.from_numpy(np.array(env.a["image"].crop(box))).float().mean()


def _rows(env: SimpleNamespace) -> None:
    total = sum(float(row.sum()) > 1.5 for row in env.a["array"])
    env.x = env.x * total + torch.from_numpy(np.stack([row[::-1] for row in env.a["array"]]))


def _array_in_place(env: SimpleNamespace) -> None:
    env.a["array"][:, 0] = 0.5
    env.a["array"] += env.a["array"].max(axis=0)
    env.x = env.x + torch.as_tensor(env.a["array"])


def _array_read(env: SimpleNamespace) -> None:
    if np.any(env.a["array"] > 0.9):
        env.x = env.x * 3


def _limited(env: SimpleNamespace) -> None:
    y = env.net(env.x) * 1.2
    if torch.any(y > 1.0):
        y = y / y.abs().max()
    env.x = y


def _until(env: SimpleNamespace) -> None:
    for _ in range(3):
        env.x = env.net(env.x) - 0.6
        if (env.x > 0).sum() < 4:
            break


def _counted(env: SimpleNamespace) -> None:
    y = env.net(env.x)
    env.x = y * int((y > 0).sum()) + sum(number for number in (y[0] > 0.5).long().tolist())


def _steps(env: SimpleNamespace) -> None:
    for _ in range(env.a["steps"]):
        env.x = env.net(env.x)


def _reads_argument(env: SimpleNamespace) -> None:
    if env.a["latents"].mean().item() > 0:
        env.x = env.x + 1
    env.x = env.x + env.a["latents"]


def _alias(env: SimpleNamespace) -> None:
    first, second = env.a["pair"]
    env.x = env.x + first * 2 - second


def _generators(env: SimpleNamespace) -> None:
    env.x = env.x + torch.stack([torch.randn(4, generator=g) for g in env.a["generators"]])


def _dot_data(env: SimpleNamespace) -> None:
    env.x = env.x.data * 2 + env.x.detach()


def _default_draw(env: SimpleNamespace) -> None:
    env.x = env.x + torch.rand(2, 4)


# By name: the arguments that a statement reads, and the statement.
STATEMENTS: dict[str, tuple[str, Statement]] = {
    "net": ("", _set(lambda env: env.net(env.x))),
    "positional": ("", _set(lambda env: env.net(env.x, 0.25, True))),
    "latents": ("latents", _set(lambda env: env.x + env.a["latents"])),
    "slices": ("", _slices),
    "argument in place": ("latents", _argument_in_place),
    "attribute": ("", _swapped_scale),
    "deep attribute": ("", _deep_option),
    "hooks": ("", _hooks),
    "closure of a hook": ("", _pre_hook_closure),
    "forward replaced": ("", _forward_replaced),
    "buffer": ("", _buffer),
    "buffer of an input": ("", _buffer_of_input),
    "averaged weights": ("", _averaged_weights),
    "other data": ("", _other_data),
    "double": ("", _double_precision),
    "kept": ("", _kept),
    "loop": ("", _loop),
    "whole loop": ("", _whole_loop),
    "tensor loop": ("", _tensor_loop),
    "autocast": ("", _autocast),
    "guided": ("", _guided),
    "own generator": ("seed", _own_generator),
    "seeds all": ("seed", _seeds_all),
    "fixed generator": ("", _fixed_generator),
    "distributions": ("generator", _distributions),
    "of values": ("generator", _of_values),
    "strided": ("generator", _strided),
    "reads text": ("prompt", _reads_text),
    "compares texts": ("prompt negative", _compares_texts),
    "template": ("prompt negative", _template),
    "words counted": ("prompt", _words_counted),
    "table": ("prompt", _table),
    "prompts": ("prompts", _set(lambda env: env.x + _tokens(env, env.a["prompts"]))),
    "text alone": ("kind", _text_alone),
    "option": ("options", _option),
    "sigmas": ("sigmas", _sigmas),
    "sigmas read": ("sigmas", _sigmas_read),
    "array": ("array", _array),
    "image": ("image", _image),
    "image size": ("image", _image_size),
    "pasted": ("image", _pasted),
    "masked": ("image", _masked),
    "bright": ("image", _bright),
    "corner": ("image", _corner),
    "box": ("image", _box),
    "rows": ("array", _rows),
    "array in place": ("array", _array_in_place),
    "array read": ("array", _array_read),
    "limited": ("", _limited),
    "until": ("", _until),
    "counted": ("", _counted),
    "steps": ("steps", _steps),
    "reads argument": ("latents", _reads_argument),
    "alias": ("pair", _alias),
    "generators": ("generators", _generators),
    "data": ("", _dot_data),
    "default draw": ("", _default_draw),
}


def sampler(seed: int) -> Sampler:
    """Return the random sampler of a seed: two to five statements, all arguments they read."""
    r = random.Random(seed)
    names = r.choices(list(STATEMENTS), k=r.randint(2, 5))
    read = sorted({argument for name in names for argument in STATEMENTS[name][0].split()})

    def arguments(r: random.Random) -> Arguments:
        return {name: VALUES[name](r) for name in read}

    parts = {"net": Net().eval(), "embed": nn.Embedding(100, 4), "words": Words()}
    return Sampler([STATEMENTS[name][1] for name in names], names, arguments, parts)


def changed(arguments: Arguments, r: random.Random) -> Arguments:
    """Return arguments of another call: other values, and sometimes of another kind."""
    new = {name: VALUES[name](r) for name in arguments if r.random() < 0.7}
    result = {**arguments, **new}
    if not result or r.random() < 0.6:
        return result
    name = r.choice(list(result))
    result[name] = _odd(result[name], r)
    return result


def _odd(value: Any, r: random.Random) -> Any:
    """Return a value like another, but of another type, length or identity."""
    if isinstance(value, list):
        return r.choice([tuple(value), value[:1], [*value, value[0]], [value[0]] * len(value), []])
    if isinstance(value, dict):
        return r.choice([{**value, "scale": 0.7}, {**value, "more": 1}, {"t": value["t"]}])
    if isinstance(value, Tensor):
        return r.choice([value.double(), value[:1], value.numpy(), value.t().contiguous().t()])
    if isinstance(value, np.ndarray):
        return r.choice([value.astype("float64"), value[:1], torch.from_numpy(value)])
    if isinstance(value, Image.Image):
        return r.choice([picture(r, (8, 4)), value.convert("L"), np.array(value)])
    if isinstance(value, bool | int):
        return r.choice([float(value), value + 1, str(value)])
    if isinstance(value, str):
        return r.choice([[value], value.upper(), None])
    return r.choice([None, 3])
