"""What `recover` stands on: bodies with gradients, weights that are trained, calls in pairs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from diffopt.analysis.scope import choose_scope
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.execution import differentiable, straight_through, trajectories
from diffopt.execution.calibration_inputs import requests
from diffopt.execution.differentiable import DifferentiableBody, read_weights
from diffopt.ir import call_tags, qdq
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.training import call_pairs, distill, distillation_loss
from diffopt.training.distillation_loss import DistillationLoss
from diffopt.training.distributed import Workers
from diffopt.training.trainable_weights import TrainableWeights
from diffopt.transforms import request_dimension
from tests import loops
from tests.passes import build
from tests.passes.build import Builder, parameter, randn
from tests.zoo import traced

aten = torch.ops.aten
CPU = torch.device("cpu")
FORMATS = ["int8", "int4,rank=4", "int4,activations=none", "fp8,activations=rows"]


@cache
def captured(name: str) -> Program:
    return loops.program(steps=3) if name == "loop" else traced(name, num_inference_steps=3)


@cache
def program(name: str, text: str = "unroll,hoist") -> Program:
    return Pipeline.parse(text).run(captured(name))


def visits(traced: Program, name: str) -> list[list[Tensor]]:
    """Return the arguments of a component's calls."""
    calls = {(i, 0): call for i, call in enumerate(traced.calls(name))}
    return [v.arguments for v in trajectories.steps(traced, calls, requests(traced, (), 1)[0])]


# Bodies


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_body_returns_what_the_graph_does(name: str) -> None:
    traced = program(name)
    (loop,) = choose_scope(traced, ("loop",)).loop
    gm = traced.components[loop]
    weights = read_weights(gm)
    for arguments in visits(traced, loop)[:2]:
        expected = gm(*arguments)
        plain = DifferentiableBody(gm)
        values = plain(arguments, straight=False)
        assert all(torch.equal(values[n], t) for n, t in zip(plain.results, expected, strict=True))
        parametrized = DifferentiableBody(gm, weights)
        values = parametrized(arguments, weights)
        for node, tensor in zip(parametrized.results, expected, strict=True):
            torch.testing.assert_close(values[node], tensor, rtol=1e-4, atol=1e-5)


def test_a_body_keeps_what_is_asked_for_and_has_gradients() -> None:
    first, second = parameter(8, 6, seed=1), parameter(3, 8, seed=2)

    def make(b: Builder, x: Any) -> Any:
        y = b(aten.linear.default, x, first)
        return b(aten.linear.default, b(aten.silu.default, y), second)

    gm = build.body(make, randn(4, 6))
    silu = next(n for n in gm.graph.nodes if n.target is aten.silu.default)
    body = DifferentiableBody(gm, read_weights(gm), [silu])
    leaves = {n: t.detach().clone().requires_grad_() for n, t in read_weights(gm).items()}
    x = randn(4, 6, seed=5)
    values = body([x], leaves)
    values[body.results[0]].square().sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in (first, second)]
    inner = torch.nn.functional.silu(x @ copies[0].T)
    (inner @ copies[1].T).square().sum().backward()
    torch.testing.assert_close(values[silu], inner)
    for leaf, mine in zip(leaves.values(), copies, strict=True):
        torch.testing.assert_close(leaf.grad, mine.grad)


# Weights


def assert_alike(value: Tensor, stored: Tensor) -> None:
    """Where a weight is rounded twice, one that is halfway may go the other way."""
    value = value.detach()
    assert float(torch.isclose(value, stored, rtol=1e-5, atol=1e-6).float().mean()) > 0.99
    assert float((value - stored).abs().max()) <= 0.01 * float(stored.abs().max())


@pytest.mark.parametrize("how", FORMATS)
def test_weights_begin_as_they_are_stored(how: str) -> None:
    """Also those that are rounded twice, and 16-bit branches."""
    quantized = program("dit", f"unroll,hoist,quantize({how})")
    (name,) = choose_scope(quantized, ("loop",)).loop
    trained, gm = TrainableWeights(quantized, [name]), quantized.components[name]
    arguments = visits(quantized, name)[0]
    stored = DifferentiableBody(gm, (), trained.nodes[name])(arguments, straight=False)
    values = trained.values(name)
    assert len(values) > 10
    for node, value in values.items():
        assert_alike(value, stored[node])
    before = {key: t.clone() for key, t in g.named_tensors(gm)}
    copy = quantized.clone()
    trained.store(copy)
    for key, tensor in g.named_tensors(copy.components[name]):
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor.float(), before[key].float()), key


@pytest.mark.parametrize("how", FORMATS)
def test_what_is_stored_is_what_was_trained(how: str) -> None:
    quantized = program("dit", f"unroll,hoist,quantize({how})")
    (name,) = choose_scope(quantized, ("loop",)).loop
    trained = TrainableWeights(quantized, [name])
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in trained.leaves:
            leaf += 0.03 * torch.randn(leaf.shape, generator=source)
    copy = quantized.clone()
    trained.store(copy)
    copy.refresh()
    copy.verify()
    arguments = visits(quantized, name)[0]
    kept = {n.name for n in trained.nodes[name]}
    new = copy.components[name]
    nodes = [n for n in new.graph.nodes if n.name in kept]
    stored = DifferentiableBody(new, (), nodes)(arguments, straight=False)
    expected = {n.name: value for n, value in trained.values(name).items()}
    for node in nodes:
        assert_alike(expected[node.name], stored[node])


def test_rounded_weights_have_gradients() -> None:
    """The identity within the range, nothing where a weight is clipped; scales get the rest."""
    quantized = program("dit", "unroll,hoist,quantize(int4)")
    (name,) = choose_scope(quantized, ("loop",)).loop
    trained = TrainableWeights(quantized, [name])
    layer = next(x for x in qdq.layers(quantized.components[name]) if qdq.weight(x.weight))
    index = list(trained.nodes[name]).index(layer.weight)
    exact, growth = trained.leaves[2 * index], trained.leaves[2 * index + 1]
    with torch.no_grad():
        exact[0, 0] = 100.0  # far beyond the largest number
    value = trained.values(name)[layer.weight]
    value.sum().backward()
    assert exact.grad is not None
    assert growth.grad is not None
    assert float(exact.grad[0, 0]) == 0
    assert float(exact.grad[0, 1]) == 1
    assert float(growth.grad.abs().sum()) > 0


def test_tables_and_scales_of_activations_stay() -> None:
    quantized = program("dit", "unroll,hoist,quantize(int8)")
    (name,) = choose_scope(quantized, ("loop",)).loop
    nodes = {
        str(n.target) for n in TrainableWeights(quantized, [name]).nodes[name] if n.op == "get_attr"
    }
    assert nodes
    assert not any("scales" in key or "zeros" in key or "table" in key for key in nodes)


def test_weights_that_are_read_twice_are_one() -> None:
    weight = parameter(4, 4)

    def make(b: Builder, x: Any) -> Any:
        return b(aten.linear.default, b(aten.linear.default, x, weight), weight)

    body = build.body(make, randn(2, 4), name="body")
    other = build.body(make, randn(2, 4), name="other")

    def root(b: Builder, x: Any) -> Any:
        return b.call("other", *b.call("body", x))

    sharing = build.program(root, randn(2, 4), body=body, other=other)
    trained = TrainableWeights(sharing, ["body", "other"])
    assert len(trained.leaves) == 1
    with torch.no_grad():
        trained.leaves[0] += 1
    for name in ("body", "other"):
        (value,) = trained.values(name).values()
        assert torch.equal(value, weight + 1)
    trained.store(sharing)
    parts = sharing.components.values()
    (one,) = {id(t): t for gm in parts for _, t in g.named_tensors(gm)}.values()
    assert torch.equal(one, weight + 1)
    assert isinstance(one, torch.nn.Parameter)


# Pairs


def pairs_of(
    student: Program, reference: Program, student_leads: bool = False
) -> list[call_pairs.CallPair]:
    names = choose_scope(student, ("loop",)).loop
    mine, other = call_pairs.pair_programs(student, names, reference, CPU)
    return call_pairs.gather_pairs(
        mine, other, requests(student, (), 1)[0], 0, program_leads=student_leads
    )


def test_a_program_beside_itself() -> None:
    traced = program("sd")
    for student_leads in (False, True):
        for pair, arguments in zip(
            pairs_of(traced, traced, student_leads), visits(traced, "unet"), strict=True
        ):
            for one, other, third in zip(
                pair.arguments, pair.reference_arguments, arguments, strict=True
            ):
                assert torch.equal(one, other)
                torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-5)


def test_bodies_with_other_arguments() -> None:
    """The latents are the reference's; what `unroll` and `hoist` made of the rest is their own."""
    raw, hoisted = program("dit", "simplify"), program("dit")
    for pair in pairs_of(hoisted, raw):
        assert len(pair.arguments) != len(pair.reference_arguments)
        (result,) = hoisted.components[pair.name](*pair.arguments)
        torch.testing.assert_close(result, pair.targets[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("student_leads", [False, True])
def test_whose_latents_they_are(student_leads: bool) -> None:
    reference = program("dit")
    student = Pipeline.parse("quantize(int4)").run(reference)
    calls = visits(student if student_leads else reference, "transformer")
    for pair, expected in zip(pairs_of(student, reference, student_leads), calls, strict=True):
        # One argument is the latents; others, such as rows of scales, are of one of them alone.
        mine = next(t for t in pair.arguments if t.dim() == 4)
        other = next(t for t in pair.reference_arguments if t.dim() == 4)
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(mine, next(t for t in expected if t.dim() == 4))
        (target,) = reference.components["transformer"](*pair.reference_arguments)
        torch.testing.assert_close(pair.targets[0], target)


def test_features_are_blocks_of_both() -> None:
    gm = program("sd").components["unet"]
    taps = call_pairs.matching_blocks(gm, gm)
    assert len(taps) > 5
    assert all(tap.node is tap.reference and tap.axis is None for tap in taps)
    assert not {tap.node for tap in taps} & set(g.outputs(gm))


def test_features_of_fewer_channels() -> None:
    """What is left of the channels is found again, in its order, by its values."""

    def block(count: int) -> Callable[..., Any]:
        up, down = parameter(6, 4, seed=1)[:count], parameter(6, 6, seed=2)[:count, :count]

        def make(b: Builder, x: Any) -> Any:
            y = b(aten.linear.default, x, up.clone())
            z = b(aten.linear.default, b(aten.silu.default, y), down.clone() * 0.1)
            both = b(aten.add.Tensor, y, z)
            return b(aten.linear.default, both, parameter(4, 6, seed=3)[:, :count].clone())

        return make

    large, small = (build.body(block(n), randn(16, 4)) for n in (6, 4))
    (tap,) = call_pairs.matching_blocks(small, large)
    assert tap.axis == 1
    wanted = randn(16, 6, seed=9)
    left = torch.tensor([0, 2, 3, 5])
    features = wanted[:, left] + 0.3 * randn(16, 4, seed=8)
    alignment = tap.aligned(features, wanted)
    assert alignment.index is not None
    assert torch.equal(alignment.index, left)
    assert torch.equal(alignment.targets(wanted[None])[0], wanted[:, left])


def test_latents_that_differ() -> None:
    """Both return one tensor of the same size a step; one is the noise, the other the latents."""

    def denoiser(b: Builder, x: Any) -> Any:
        return b(aten.linear.default, x, WEIGHT)

    def step(b: Builder, x: Any) -> Any:
        noise = b(aten.linear.default, x, WEIGHT)
        return b(aten.sub.Tensor, b(aten.mul.Tensor, x, 2.0), noise)

    def sampler(is_whole: bool) -> Callable[..., Any]:
        def root(b: Builder, x: Any) -> Any:
            for _ in range(3):
                (result,) = b.call("body", x)
                x = result if is_whole else b(aten.sub.Tensor, b(aten.mul.Tensor, x, 2.0), result)
            return x

        return root

    programs = []
    for make, is_whole in ((denoiser, False), (step, True)):
        body = build.body(make, randn(2, 4), name="body")
        one = build.program(sampler(is_whole), randn(2, 4), body=body)
        call_tags.assign(one.root)
        programs.append(one)
    with pytest.raises(DiffoptError) as error:
        pairs_of(programs[1], programs[0])
    assert error.value.message.endswith(
        "body and the reference's body read other latents: their calls mean different things;"
        " recover in front of `fuse`"
    )


WEIGHT = parameter(4, 4, seed=3)


# Training


def test_the_learning_rate() -> None:
    shares = [distill._rate_factor(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(1.0)
    assert shares[:10] == sorted(shares[:10])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.02, abs=0.01)
    assert distill._rate_factor(0, 1) == pytest.approx(1.0)


def test_a_batch_for_all_processes() -> None:
    class Two(Workers):
        @property
        def count(self) -> int:
            return 2

    traced = program("loop")
    with pytest.raises(DiffoptError) as error:
        distill.recover(
            distill.Task(traced, traced, requests(traced, (), 2), ["denoiser"]),
            distill.Settings(1, batch=1),
            workers=Two(),
        )
    assert error.value.message == (
        "recover(batch=1) is too small for 2 processes: give each at least one call"
    )


# Several calls at once


def matching_of(
    student: Program, reference: Program
) -> tuple[DistillationLoss, TrainableWeights, list[call_pairs.CallPair]]:
    names = choose_scope(student, ("loop",)).loop
    pairs, trained = pairs_of(student, reference), TrainableWeights(student, names)
    return DistillationLoss(student, reference, pairs, trained, 1.0, CPU), trained, pairs


def gradients_of(
    matching: DistillationLoss, trained: TrainableWeights, chunks: list[list[call_pairs.CallPair]]
) -> Any:
    for leaf in trained.leaves:
        leaf.grad = None
    losses = [matching.losses(chunk) for chunk in chunks]
    torch.cat(losses).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in trained.leaves]
    errors = torch.cat([matching.errors(chunk) for chunk in chunks])
    return torch.cat(losses).detach(), errors, torch.cat([t.flatten() for t in gradients])


@pytest.mark.parametrize("name", ["sd", "dit"])
@pytest.mark.parametrize("how", ["prune(channels)", "quantize(int8)", "quantize(int4,rank=4)"])
def test_calls_at_once_are_calls_one_by_one(name: str, how: str) -> None:
    reference = program(name, "unroll")
    student = Pipeline.parse(how).run(reference)
    matching, trained, pairs = matching_of(student, reference)
    assert matching.blocks > 1
    together = [*matching.chunks(pairs)]
    assert len(together) == 1
    at_once = gradients_of(matching, trained, together)
    one_by_one = gradients_of(matching, trained, [[pair] for pair in pairs])
    # Sums in another order: a value between two levels may then be rounded to the other.
    rtol = 1e-3 if "quantize" in how else 1e-4
    for batched, other in zip(at_once, one_by_one, strict=True):
        assert float((batched - other).norm()) < rtol * float(other.norm())


def test_calls_that_cannot_be_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those whose rounding would have no gradient any more."""
    reference = program("dit", "unroll")
    student = Pipeline.parse("quantize(int8)").run(reference)
    monkeypatch.setattr(request_dimension, "batch_body", unbatchable)
    matching, trained, pairs = matching_of(student, reference)
    one = gradients_of(matching, trained, [*matching.chunks(pairs)])
    monkeypatch.undo()
    matching, trained, pairs = matching_of(student, reference)
    other = gradients_of(matching, trained, [*matching.chunks(pairs)])
    for a, b in zip(one, other, strict=True):
        assert float((a - b).norm()) < 1e-4 * float(b.norm())


def unbatchable(*_: object) -> None:
    raise request_dimension.Unbatchable("no rule")


@pytest.mark.parametrize("activations", ["static", "dynamic", "rows"])
def test_roundings_stay(activations: str) -> None:
    """Or calls are run one by one: gradients go straight through what is known as a rounding."""
    quantized = program("dit", f"unroll,hoist,quantize(int8,activations={activations})")
    (name,) = choose_scope(quantized, ("loop",)).loop
    gm = quantized.components[name]
    batched = differentiable._batched(gm)
    count = straight_through.roundings(gm.graph.nodes)
    assert count
    assert batched is None or straight_through.roundings(batched.graph.graph.nodes) == count


def test_only_so_many_calls_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = program("dit", "unroll,hoist")
    _, _, pairs = matching_of(traced, traced)
    body = traced.components[pairs[0].name]
    values = [n.meta["val"] for n in body.graph.nodes if n.op == "call_function"]
    size = sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    for room, counts in ((2 * size, [2, 1]), (size // 2, [1, 1, 1])):
        monkeypatch.setattr(distillation_loss, "TOGETHER", room)
        matching, _, _ = matching_of(traced, traced)
        assert [len(chunk) for chunk in matching.chunks(pairs)] == counts
