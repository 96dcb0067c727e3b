"""Removing units gives what zeros in their place give: random graphs, and the zoo's denoisers."""

import collections
import operator
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import diffopt
from diffopt.core import Pipeline
from diffopt.ir.program import Program
from diffopt.pruning.coupling import KINDS, Coupling, Unit, couple
from diffopt.pruning.removal import remove
from tests import masked
from tests.passes.build import Builder, body, program, randn
from tests.zoo import traced

aten = torch.ops.aten

SIZE = 4
"""Height and width of images; tokens are SIZE * SIZE."""


class Net:
    """Adds random layers; keeps every image [2, C, 4, 4] and every row of tokens [2, L, C]."""

    def __init__(self, b: Builder, pool: dict[Any, torch.nn.Parameter], image: fx.Node) -> None:
        self.b, self.pool = b, pool
        self.images = [image]
        self.tokens: list[fx.Node] = []

    def weight(self, *shape: int) -> fx.Node:
        """Return a weight; the last number is no size, but tells those of one shape apart."""
        if shape not in self.pool:
            tensor = randn(*shape[:-1], seed=len(self.pool)) / max(1, shape[:-1][-1]) ** 0.5
            self.pool[shape] = torch.nn.Parameter(tensor, requires_grad=False)
        return self.b.weight(self.pool[shape])

    def image(self, n: int) -> fx.Node:
        return self.images[-1 - n % min(3, len(self.images))]

    def token(self, n: int) -> fx.Node:
        if not self.tokens:
            self.flatten(n)
        return self.tokens[-1 - n % min(3, len(self.tokens))]

    # Images

    def conv(self, n: int) -> None:
        x = self.image(n)
        channels, out = x.meta["val"].shape[1], (4, 8, 12)[n % 3]
        kernel = 1 + 2 * (n % 2)
        args = [x, self.weight(out, channels, kernel, kernel, n % 4), self.weight(out, n % 5)]
        convolved = self.b(aten.conv2d.default, *args, [1, 1], [kernel // 2] * 2)
        self.images.append(self.b(aten.silu.default, convolved))

    def grouped(self, n: int) -> None:
        x = self.image(n)
        channels = x.meta["val"].shape[1]
        groups = channels if n % 2 or channels % 2 else 2
        weight = self.weight(channels, channels // groups, 3, 3, 1 + n % 3)
        args = [x, weight, self.weight(channels, n % 4), [1, 1], [1, 1], [1, 1], groups]
        self.images.append(self.b(aten.conv2d.default, *args))

    def residual(self, n: int) -> None:
        x = self.image(n)
        c = x.meta["val"].shape[1]
        groups = c // 2 if c % 2 == 0 else 1
        affine = self.weight(c, 1 + n % 3), self.weight(c, 4)
        y = self.b(aten.group_norm.default, x, groups, *affine, 1e-5)
        y = self.b(aten.conv2d.default, y, self.weight(8, c, 3, 3, n % 3), None, [1, 1], [1, 1])
        y = self.b(aten.relu.default, y)
        y = self.b(aten.conv2d.default, y, self.weight(c, 8, 3, 3, n % 3), None, [1, 1], [1, 1])
        self.images.append(self.b(aten.add.Tensor, x, y))

    def add_images(self, n: int) -> None:
        x = self.image(n)
        same = [y for y in self.images if y.meta["val"].shape == x.meta["val"].shape]
        target = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)[n % 3]
        self.images.append(self.b(target, x, same[(n // 3) % len(same)]))

    def concatenate(self, n: int) -> None:
        self.images.append(self.b(aten.cat.default, [self.image(n), self.image(n // 2)], 1))

    def part(self, n: int) -> None:
        x = self.image(n)
        c = x.meta["val"].shape[1]
        if n % 3 == 0 and c > 3:
            self.images.append(self.b(aten.slice.Tensor, x, 1, 1 + n % 2, c - 1))
        else:
            halves = self.b(aten.chunk.default, x, 2, 1)
            if len(halves.meta["val"]) == 1:
                return
            gate = self.b(aten.sigmoid.default, self.b(operator.getitem, halves, 1))
            half = self.b(operator.getitem, halves, 0)
            if half.meta["val"].shape == gate.meta["val"].shape:
                self.images.append(self.b(aten.mul.Tensor, half, gate))

    def shuffle(self, n: int) -> None:
        x = self.image(n)
        y = self.b(aten.pixel_unshuffle.default, x, 2)
        y = self.b(aten.conv2d.default, y, self.weight(8, y.meta["val"].shape[1], 1, 1, n % 2))
        self.images.append(self.b(aten.pixel_shuffle.default, y, 2))

    def resize(self, n: int) -> None:
        y = self.b(aten.avg_pool2d.default, self.image(n), [2, 2], [2, 2])
        self.images.append(self.b(aten.upsample_nearest2d.vec, y, None, [2.0, 2.0]))

    def scale(self, n: int) -> None:
        x = self.image(n)
        c = x.meta["val"].shape[1]
        pooled = self.b(aten.mean.dim, x, [2, 3])
        gate = self.b(aten.linear.default, pooled, self.weight(c, c, 1 + n % 2))
        gate = self.b(aten.view.default, gate, [2, c, 1, 1])
        self.images.append(self.b(aten.mul.Tensor, x, self.b(aten.add.Tensor, gate, 1)))

    # Between

    def flatten(self, n: int) -> None:
        x = self.image(n)
        c = x.meta["val"].shape[1]
        if n % 2:
            y = self.b(aten.permute.default, x, [0, 2, 3, 1])
            self.tokens.append(self.b(aten.reshape.default, y, [2, SIZE * SIZE, c]))
        else:
            y = self.b(aten.view.default, x, [2, c, SIZE * SIZE])
            self.tokens.append(self.b(aten.transpose.int, y, 1, 2))

    def unflatten(self, n: int) -> None:
        x = self.token(n)
        _, length, c = x.meta["val"].shape
        if length == SIZE * SIZE:
            y = self.b(aten.reshape.default, x, [2, SIZE, SIZE, c])
            self.images.append(self.b(aten.permute.default, y, [0, 3, 1, 2]))

    # Tokens

    def linear(self, n: int) -> None:
        x = self.token(n)
        c, out = x.meta["val"].shape[-1], (4, 8, 12)[n % 3]
        hidden = self.b(aten.linear.default, x, self.weight(out, c, n % 3), self.weight(out, n % 4))
        self.tokens.append(self.b(aten.gelu.default, hidden))

    def gated(self, n: int) -> None:
        x = self.token(n)
        c = x.meta["val"].shape[-1]
        y = self.b(aten.layer_norm.default, x, [c], self.weight(c, 5), self.weight(c, 6), 1e-5)
        y = self.b(aten.linear.default, y, self.weight(16, c, n % 3), self.weight(16, n % 2))
        a, b = (self.b(operator.getitem, self.b(aten.chunk.default, y, 2, -1), i) for i in (0, 1))
        y = self.b(aten.mul.Tensor, a, self.b(aten.gelu.default, b))
        y = self.b(aten.linear.default, y, self.weight(c, 8, n % 3))
        self.tokens.append(self.b(aten.add.Tensor, x, y))

    def modulated(self, n: int) -> None:
        x = self.token(n)
        c = x.meta["val"].shape[-1]
        mean = self.b(aten.mean.dim, x, [1])
        rows = self.b(aten.linear.default, mean, self.weight(3 * c, c, n % 2))
        rows = self.b(aten.view.default, rows, [2, 3, c])
        rows = self.b(aten.add.Tensor, rows, self.weight(3, c, 9))
        parts = self.b(aten.chunk.default, rows, 3, 1)
        shift, scale, gate = (self.b(operator.getitem, parts, i) for i in range(3))
        y = self.b(aten.rms_norm.default, x, [c])
        y = self.b(aten.add.Tensor, self.b(aten.mul.Tensor, y, scale), shift)
        y = self.b(aten.linear.default, y, self.weight(c, c, 3 + n % 2))
        self.tokens.append(self.b(aten.add.Tensor, x, self.b(aten.mul.Tensor, y, gate)))

    def attention(self, n: int) -> None:
        x, heads, wide = self.token(n), (1, 2, 4)[n % 3], 4
        c, inner = x.meta["val"].shape[-1], heads * wide
        if n % 2:
            whole = self.b(aten.linear.default, x, self.weight(3 * inner, c, n % 2))
            pieces = self.b(aten.split.Tensor, whole, inner, -1)
            parts = [self.b(operator.getitem, pieces, i) for i in range(3)]
        else:
            weights = [self.weight(inner, c, 4 + i) for i in range(3)]
            parts = [self.b(aten.linear.default, x, w) for w in weights]
        length = x.meta["val"].shape[1]
        form = [self.b(aten.view.default, p, [2, length, heads, wide]) for p in parts]
        q, k, v = (self.b(aten.transpose.int, p, 1, 2) for p in form)
        if n % 5 < 2:
            q = self.b(aten.rms_norm.default, q, [wide], self.weight(wide, 1))
            k = self.b(aten.mul.Tensor, k, self.b.weight(STRETCH))
        if n % 4 < 2:
            y = self.b(aten.scaled_dot_product_attention.default, q, k, v)
        else:
            scores = self.b(aten.matmul.default, q, self.b(aten.transpose.int, k, 2, 3))
            if length == SIZE * SIZE:
                scores = self.b(aten.add.Tensor, scores, self.b.weight(MASKS[heads // 2]))
            y = self.b(aten.matmul.default, self.b(aten.softmax.int, scores, -1), v)
        y = self.b(aten.reshape.default, self.b(aten.transpose.int, y, 1, 2), [2, length, inner])
        y = self.b(aten.linear.default, y, self.weight(c, inner, n % 3), self.weight(c, n % 3))
        self.tokens.append(self.b(aten.add.Tensor, x, y))

    def add_tokens(self, n: int) -> None:
        x = self.token(n)
        same = [y for y in self.tokens if y.meta["val"].shape == x.meta["val"].shape]
        other = same[(n // 2) % len(same)] if n % 2 else self.positions(x)
        self.tokens.append(self.b(aten.add.Tensor, x, other))

    def positions(self, x: fx.Node) -> fx.Node:
        _, length, c = x.meta["val"].shape
        rows = self.b(aten.arange.default, length, dtype=torch.float32)
        rows = self.b(aten.sin.default, self.b(aten.unsqueeze.default, rows, 1))
        return self.b(aten.expand.default, rows, [length, c])

    def join(self, n: int) -> None:
        x = self.token(n)
        same = [y for y in self.tokens if y.meta["val"].shape[-1] == x.meta["val"].shape[-1]]
        other = same[(n // 2) % len(same)]
        joined = self.b(aten.cat.default, [x, other], 1)
        c = x.meta["val"].shape[-1]
        projected = self.b(aten.linear.default, joined, self.weight(c, c, n % 2))
        self.tokens.append(projected)
        self.tokens.append(self.b(aten.slice.Tensor, projected, 1, 0, x.meta["val"].shape[1]))

    def adapted(self, n: int) -> None:
        x = self.token(n)
        c = x.meta["val"].shape[-1]
        base = self.b(aten.linear.default, x, self.weight(8, c, 1))
        low = self.b(aten.linear.default, x, self.weight(3, c, n % 2))
        high = self.b(aten.linear.default, low, self.weight(8, 3, n % 2))
        self.tokens.append(self.b(aten.add.Tensor, base, self.b(aten.mul.Tensor, high, 0.5)))

    def unknown(self, n: int) -> None:
        pair = self.b(aten.sort.default, self.token(n), -1)  # which no rule knows
        self.tokens.append(self.b(operator.getitem, pair, 0))


STRETCH = randn(2, 1, 1, 4, seed=90)
MASKS = [randn(1, 16, 16, seed=91), randn(2, 1, 1, seed=92), randn(4, 1, 1, seed=93)]
LAYERS = (
    *("conv", "grouped", "residual", "add_images", "concatenate", "part", "shuffle", "resize"),
    *("scale", "flatten", "unflatten", "linear", "gated", "modulated", "attention", "add_tokens"),
    *("join", "adapted", "unknown"),
)
Layers = list[tuple[str, int]]


def network(bodies: Sequence[Layers]) -> Program:
    """Return a program that calls each body once; they share weights."""
    pool: dict[Any, torch.nn.Parameter] = {}
    image = randn(2, 4, SIZE, SIZE, seed=7)

    def make(layers: Layers) -> Callable[..., Any]:
        def add(b: Builder, x: fx.Node) -> list[fx.Node]:
            net = Net(b, pool, x)
            net.conv(1)
            net.images = net.images[1:]  # what is added to an argument is picked, and hides less
            for name, n in layers:
                getattr(net, name)(n)
            last = net.images[-1]
            out = net.weight(4, last.meta["val"].shape[1], 3, 3, 7)
            results = [b(aten.conv2d.default, last, out, None, [1, 1], [1, 1])]
            if net.tokens:
                last = net.tokens[-1]
                out = net.weight(5, last.meta["val"].shape[-1], 7)
                results.append(b(aten.linear.default, last, out))
            return results

        return add

    parts = {f"body_{i}": body(make(layers), image) for i, layers in enumerate(bodies)}

    def root(b: Builder, x: fx.Node) -> list[fx.Node]:
        results = []
        for name in parts:
            x, *more = b.call(name, x)
            results += more
        return [x, *results]

    return program(root, image, **parts)


def some_units(coupling: Coupling, seed: int) -> list[Unit]:
    """Return random units of every group, but never all, nor all of a part."""
    source, units = random.Random(seed), []
    for group in coupling.groups:
        chosen = source.sample(group.units, source.randrange(len(group.units)))
        for part in group.keep_one_of:
            if part <= {unit.label for unit in chosen}:
                chosen = [unit for unit in chosen if unit.label != min(part)]
        units += chosen
    return units


def check(before: Program, seed: int, in_heads: bool = False) -> float:
    """Prune and compare with zeros in place; return the share of the weights that is left."""
    pruned = before.clone()
    coupling = couple(pruned, in_heads=in_heads)
    units = some_units(coupling, seed)
    expected = masked.run(pruned, coupling, units, before.sample)
    remove(pruned, coupling, units)
    pruned.refresh()
    pruned.verify()
    for got, wanted in zip(pruned.run(before.sample), expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=3e-4 * max(1, scale))
    return size(pruned) / size(before)


def size(program: Program) -> int:
    return sum(tensor.numel() for tensor in program.weights().values())


BODY = st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(0, 59)), min_size=3, max_size=14)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(BODY, min_size=1, max_size=2), st.integers(0, 99), st.booleans())
def test_random_graphs(bodies: list[Layers], seed: int, in_heads: bool) -> None:
    note(bodies)
    check(network(bodies), seed, in_heads)


def test_longer_random_graphs_with_units_of_all_kinds() -> None:
    source = random.Random(1)
    kinds: collections.Counter[str] = collections.Counter()
    left = []
    for seed in range(40):
        layers = [(source.choice(LAYERS), source.randrange(60)) for _ in range(12)]
        built = network([layers])
        in_heads = seed % 2 == 1
        left.append(check(built, seed, in_heads))
        kinds.update(group.kind for group in couple(built, in_heads=in_heads).groups)
    assert min(kinds[kind] for kind in KINDS) > 5
    assert sum(left) / len(left) < 0.75


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "flux", "sd3", "pixart", "wan", "sana"])
def test_the_zoo(name: str) -> None:
    before = traced(name)
    assert check(before, seed=1) < 0.9
    assert check(before, seed=2, in_heads=True) < 0.9


# Operators, as a network of two layers with a function of the hidden units between them


class Between(nn.Module):
    """Layers around a function of what is between them, which may have layers of its own."""

    def __init__(
        self, function: Callable[..., Tensor], inside: nn.Module | None = None, image: bool = False
    ) -> None:
        super().__init__()
        make = partial(nn.Conv2d, kernel_size=1) if image else nn.Linear
        self.first, self.last = make(8, 16), nn.LazyConv2d(8, 1) if image else nn.LazyLinear(8)
        self.function, self.inside = function, inside

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        between = (self.inside,) if self.inside is not None else ()
        return self.last(self.function(self.first(x), *between, *more))


class Heads(nn.Module):
    """Attention with some heads of keys and values, of which some parts come from outside."""

    def __init__(self, heads: int = 4, fewer: int = 4, **options: Any) -> None:
        super().__init__()
        self.heads, self.fewer, self.options = heads, fewer, options
        self.q, self.o = nn.Linear(16, heads * 4), nn.Linear(heads * 4, 16)
        self.k, self.v = nn.Linear(16, fewer * 4), nn.Linear(16, fewer * 4)

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        heads = (f(x).unflatten(-1, (self.fewer, 4)).transpose(1, 2) for f in (self.k, self.v))
        k, v = (new if old is None else old for new, old in zip(heads, (k, v), strict=True))
        y = nn.functional.scaled_dot_product_attention(q, k, v, **self.options)
        return self.o(y.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Queries, keys and values of one layer, apart in front of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Latents(nn.Module):
    """Attention whose queries are constant."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(randn(1, 4, 5, 4, seed=3))
        self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.q.expand(2, -1, -1, -1), k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """A layer along tokens that makes the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.back = nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x.transpose(1, 2)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, x, x, is_causal=True)
        return self.back(y.transpose(1, 2)).transpose(1, 2)


class Products(nn.Module):
    """Layers that are products with matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(randn(*s, seed=4) / 4) for s in ((16, 32), (32, 16)))
        self.bias = nn.Parameter(randn(32, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.bias, x.flatten(0, 1), self.up).relu()
        return (hidden @ self.down).unflatten(0, (2, 5))


def norm() -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(16)
    module.running_mean = randn(16, seed=6)
    module.running_var = randn(16, seed=7).abs() + 0.5
    return module


ROWS, PLACES = randn(2, 5, 8), randn(2, 8, 4, 4)
OUTSIDE = randn(2, 2, 5, 4, seed=8), randn(2, 2, 5, 4, seed=9)
pool = nn.functional.avg_pool1d
OPERATORS: dict[str, tuple[Between, tuple[Tensor, ...]]] = {
    "slice": (Between(lambda x: x * (1 + x[..., :2].mean(-1, keepdim=True))), (ROWS,)),
    "two slices": (Between(lambda x: x[..., :12] * x[..., 4:]), (ROWS,)),
    "pool of rows": (Between(lambda x: pool(x[0], 3, 1, 1)), (ROWS,)),
    "pool of places": (Between(lambda x: pool(x.mT, 3, 1, 1).mT), (ROWS,)),
    "sum of an einsum": (
        Between(lambda x, w: torch.einsum("bcd,ce->be", x, w.weight), nn.Linear(16, 5)),
        (ROWS,),
    ),
    "repeats": (
        Between(lambda x: x.repeat_interleave(torch.arange(16) % 3, -1, output_size=15)),
        (ROWS,),
    ),
    "squeeze": (
        Between(lambda x: x * x.mean((2, 3), keepdim=True).squeeze().view(1, -1, 1, 1), image=True),
        (PLACES[:1],),
    ),
    "batch norm": (Between(lambda x, norm: norm(x).relu(), norm(), image=True), (PLACES,)),
    "same padding": (
        Between(lambda x, f: f(x).relu(), nn.Conv2d(16, 16, 3, padding="same"), image=True),
        (PLACES,),
    ),
    "heads": (Between(lambda x, f: f(x), Heads()), (ROWS,)),
    "fewer heads": (Between(lambda x, f: f(x), Heads(4, 2, enable_gqa=True)), (ROWS,)),
    "one head": (Between(lambda x, f: f(x), Heads(4, 1, enable_gqa=True)), (ROWS,)),
    "heads of others": (
        Between(lambda x, f, k, v: f(x, k, v), Heads(4, 2, enable_gqa=True)),
        (ROWS, *OUTSIDE),
    ),
    "as many heads of others": (
        Between(lambda x, f, k, v: f(x, k, v), Heads(2, 2)),
        (ROWS, *OUTSIDE),
    ),
    "values of others": (Between(lambda x, f, v: f(x, v=v), Heads(2, 2)), (ROWS, OUTSIDE[0])),
    "causal": (Between(lambda x, f: f(x), Heads(is_causal=True)), (ROWS,)),
    "causal queries of a mixer": (Between(lambda x, f: f(x), Mixer()), (ROWS,)),
    "packed heads": (Between(lambda x, f: f(x), Packed()), (ROWS,)),
    "constant queries": (Between(lambda x, f: f(x), Latents()), (ROWS,)),
    "matrices": (Between(lambda x, f: f(x), Products()), (ROWS,)),
}


def program_of(name: str) -> Program:
    net, arguments = OPERATORS[name]
    torch.manual_seed(0)
    with torch.no_grad():
        net(*arguments)  # now that it knows its sizes
    net.eval().requires_grad_(False)
    inputs = {f"x{i}": tensor for i, tensor in enumerate(arguments)}
    return diffopt.trace(lambda **more: net(*more.values()), components={"net": net}, **inputs)


@pytest.mark.parametrize("in_heads", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, in_heads: bool) -> None:
    built = program_of(name)
    for before in (built, Pipeline.parse("simplify").run(built)):
        for seed in range(6):
            check(before, seed, in_heads)
