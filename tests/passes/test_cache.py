"""Caching on small pipelines, against the same pipelines with hooks that cache module outputs."""

from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache
from torch import Tensor, fx

from diffopt.analysis.denoiser_structure import analyze_denoiser
from diffopt.caching import reuse_plan, step_map
from diffopt.caching.apply_plan import Reuse, Term, apply, find_loop
from diffopt.caching.policies import magcache
from diffopt.caching.policy import block_residuals, policy_names, transformer_blocks
from diffopt.core import Pipeline, Record
from diffopt.core.equivalence import difference
from diffopt.errors import DiffoptError, ToleranceError
from diffopt.execution import trajectories
from diffopt.ir.flops import flop_counter, graph_flops
from diffopt.ir.program import Program
from tests.hooks import hold_outputs
from tests.zoo import CASES, call, traced

STEPS = 6
RATIOS = (1.0, 1.0, 0.99, 0.98, 1.0, 0.96)
Pipe = Any


def inputs(name: str) -> dict[str, Any]:
    return {**CASES[name].inputs(0), "num_inference_steps": STEPS}


@cache
def unrolled(name: str, text: str = "unroll,hoist") -> Program:
    """Return a pipeline of the zoo as the pass gets it."""
    return Pipeline.parse(text).run(traced(name, num_inference_steps=STEPS))


def cached(name: str, text: str, before: str = "unroll,hoist") -> tuple[Program, Record]:
    program = Pipeline.parse(text).run(unrolled(name, before))
    return program, Record.from_json(next(r for r in program.history if "cache" in r["text"]))


def note(record: Record) -> dict[str, Any]:
    (report,) = step_map.step_map_reports([record])
    return dict(report.note)


def rows(record: Record) -> dict[str, str]:
    return dict(note(record)["map"])


def blocks(record: Record) -> dict[str, str]:
    """Return the rows of blocks, without those of layers before and after all blocks."""
    return {label: signs for label, signs in rows(record).items() if "blocks." in label}


def eager(name: str, prepare: Callable[[Pipe], None]) -> list[Tensor]:
    """Run the pipeline itself, after `prepare` has put hooks into it."""
    pipe = CASES[name].build()
    prepare(pipe)
    return call(pipe, inputs(name))


def hooks(computed: Collection[int], paths: Iterable[str]) -> Callable[[Pipe], None]:
    """Return what makes modules give their last output again, except in the steps computed."""

    def prepare(pipe: Pipe) -> None:
        net = denoiser(pipe)
        hold_outputs(net, map(net.get_submodule, paths), computed)

    return prepare


def denoiser(pipe: Pipe) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def layers(name: str, *ends: str) -> list[str]:
    """Return the modules of the denoiser whose names end so."""
    net = denoiser(CASES[name].build())
    return [path for path, _ in net.named_modules() if path.endswith(ends)]


def same(program: Program, name: str, expected: list[Tensor]) -> None:
    """Check that the program gives what the pipeline with hooks gave."""
    got = call(program, inputs(name))
    assert difference(got, expected)[1] < 1e-5
    assert difference(got, call(unrolled(name), inputs(name)))[1] > 1e-5, "nothing was cached"


# Each policy gives what the pipeline gives whose modules cache their outputs


@pytest.mark.parametrize(
    ("branch", "path"), [(0, "up_blocks.1.resnets.0"), (1, "up_blocks.0.upsamplers.0")]
)
def test_deepcache(branch: int, path: str) -> None:
    program, record = cached("sd", f"cache(deepcache,interval=3,branch={branch})")
    same(program, "sd", eager("sd", hooks([0, 3], [path])))
    table = rows(record)
    assert table["mid_block.resnets.0"] == table["down_blocks.1.resnets.0"] == "#--#--"
    assert table["up_blocks.1.resnets.0"] == ("#--#--" if branch == 0 else "######")
    assert table["up_blocks.1.resnets.1"] == "######"
    assert note(record)["bodies"] == 2


def test_deepcache_nonuniform() -> None:
    program, record = cached("sd", "cache(deepcache,interval=2,nonuniform=true,center=1,pow=1.2)")
    assert rows(record)["mid_block.resnets.0"] == "##-#--"
    same(program, "sd", eager("sd", hooks([0, 1, 3], ["up_blocks.1.resnets.0"])))


ENCODER = [
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.attentions.0",
    "mid_block",
]


def test_faster_diffusion_and_its_batched_decoders() -> None:
    program, record = cached("sd", "cache(faster-diffusion,key-steps=(0,2,3),prior-noise=0)")
    same(program, "sd", eager("sd", hooks([0, 2, 3], ENCODER)))
    table = rows(record)
    assert table["down_blocks.0"] == table["mid_block.resnets.0"] == "#-##--"
    assert table["up_blocks.0.resnets.0"] == "######"
    # Steps 4 and 5 are one call; step 1 is one by itself.
    assert record.notes["calls saved by batching decoders"] == 1
    assert note(record)["bodies"] == 3
    assert len([node for node in program.calls() if node.meta.get("tag")]) == 5 + others("sd")


def others(name: str) -> int:
    """Return how many tagged calls a program has beside those of its denoiser."""
    return len([n for n in unrolled(name).calls() if n.meta.get("tag")]) - STEPS


def test_fora() -> None:
    program, record = cached("dit", "cache(fora,interval=2,start=1)")
    paths = layers("dit", ".attn1", ".ff")
    assert len(paths) == 4
    same(program, "dit", eager("dit", hooks([0, 1, 3, 5], paths)))
    assert rows(record) == {
        "pos_embed.proj": "######",
        "transformer_blocks.0": "##-#-#",
        "transformer_blocks.1": "##-#-#",
        "proj_out_2": "######",
    }


def test_fora_on_a_unet_takes_the_layers_of_its_transformers() -> None:
    program, _ = cached("sd", "cache(fora)")
    paths = layers("sd", ".attn1", ".attn2", ".ff")
    same(program, "sd", eager("sd", hooks([0, 3], paths)))


def test_t_gate_leaves_out_the_calls_of_the_unconditional_branch() -> None:
    program, record = cached("wan", "cache(t-gate,gate=2)")

    def prepare(pipe: Pipe) -> None:
        number, kept = -1, dict[Any, Any]()
        run = pipe.transformer.forward

        def forward(*args: Any, **more: Any) -> Any:
            nonlocal number
            number += 1
            step, is_unconditional = divmod(number, 2)
            if step < 2 or not is_unconditional:
                kept["result"] = run(*args, **more)
            return kept["result"]

        def hook(module: Any, args: Any, output: Any) -> Any:
            if number < 4:
                kept[module, number % 2] = output
            return kept[module, number % 2]

        pipe.transformer.forward = forward
        for path in layers("wan", ".attn2"):
            pipe.transformer.get_submodule(path).register_forward_hook(hook)

    same(program, "wan", eager("wan", prepare))
    assert set(rows(record).values()) == {"##++++"}
    tags = [node.meta["tag"] for node in program.calls() if node.meta.get("tag")]
    component = next(tag.component for tag in tags if tag.step == STEPS - 1)
    assert [(tag.step, tag.branch) for tag in tags if tag.component == component] == [
        *((0, 0), (0, 1), (1, 0), (1, 1)),
        *((step, 0) for step in range(2, STEPS)),
    ]


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_taylorseer_is_that_of_diffusers(name: str) -> None:
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        max_order=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|attn2|ff)"],
    )

    def prepare(pipe: Pipe) -> None:
        apply_taylorseer_cache(pipe.transformer, config)
        _set_cache_context(pipe.transformer, CacheContext("all"))

    program, record = cached(name, "cache(taylorseer,order=2,interval=2,warm-up=2)")
    same(program, name, eager(name, prepare))
    assert set(blocks(record).values()) == {"##~#~#"}
    assert note(record)["bodies"] <= 4


def test_magcache_is_that_of_diffusers() -> None:
    config = MagCacheConfig(
        threshold=0.05, retention_ratio=0.3, num_inference_steps=STEPS, mag_ratios=list(RATIOS)
    )
    text = f"cache(magcache,ratios=({','.join(map(str, RATIOS))}),threshold=0.05,retain=0.3)"
    program, record = cached("flux", text)
    same(program, "flux", eager("flux", lambda pipe: pipe.transformer.enable_cache(config)))
    assert blocks(record) == {
        "transformer_blocks.0": "##--#-",
        "single_transformer_blocks.0": "##--#-",
    }


def delta(blocks: dict[int, list[int]]) -> Callable[[Pipe], None]:
    """Return hooks by which runs of blocks add, in some steps, what they added at the last full."""

    def prepare(pipe: Pipe) -> None:
        step = -1
        stack = pipe.transformer.transformer_blocks

        def count(*_: Any) -> None:
            nonlocal step
            step += 1

        pipe.transformer.register_forward_pre_hook(count)
        for number, block in enumerate(stack):
            run: Callable[..., Tensor] = block.forward
            kept: dict[str, Tensor] = {}

            def forward(
                x: Tensor,
                *args: Any,
                run: Any = run,
                kept: Any = kept,
                i: int = number,
                **more: Any,
            ) -> Tensor:
                if i in blocks.get(step, []):
                    return x + kept["delta"]
                y: Tensor = run(x, *args, **more)
                kept["delta"] = y - x
                return y

            block.forward = forward

    return prepare


def test_delta_dit() -> None:
    program, record = cached("pixart", "cache(delta-dit,bound=3,range=1)")
    same(program, "pixart", eager("pixart", delta({1: [1], 3: [0], 5: [0]})))
    assert blocks(record) == {
        "transformer_blocks.0": "###-#-",
        "transformer_blocks.1": "#-####",
    }


def test_mask_of_blocks_and_of_branches() -> None:
    program, record = cached("dit", "cache(mask,110010)")
    skipped = {step: [0, 1] for step in (2, 3, 5)}
    same(program, "dit", eager("dit", delta(skipped)))
    assert set(blocks(record).values()) == {"##--#-"}
    program, _ = cached("dit", "cache(mask,110010,branches)")
    same(program, "dit", eager("dit", hooks([0, 1, 4], layers("dit", ".attn1", ".ff"))))


def test_mask_on_a_unet_takes_deep_features() -> None:
    program, _ = cached("sd", "cache(mask,100100)")
    other, _ = cached("sd", "cache(deepcache,interval=3)")
    assert program.fingerprint() == other.fingerprint()


def test_smoothcache_and_magcache_measure_for_themselves() -> None:
    _, none = cached("dit", "cache(smoothcache,alpha=0)")
    _, all_ = cached("dit", "cache(smoothcache,alpha=9,calls=1)")
    assert set(blocks(all_).values()) == {"#---##"} or set(blocks(all_).values()) == {"#---#-"}
    assert not none.changed
    program = unrolled("dit")
    loop = find_loop(program)
    values = block_residuals(transformer_blocks(analyze_denoiser(loop.body, loop.loop_variant)))
    inputs = trajectories.requests(program, (), 2, 0)
    ratios = magcache.measure(loop, values, inputs).tolist()
    assert ratios[0] == 1.0
    visits = [
        next(v for v in trajectories.steps(program, loop.calls, tensors, values[0]) if v.step == at)
        for tensors in inputs
        for at in (2, 3)
    ]
    norms = [(v.values[values[0][0]] - v.values[values[0][1]]).norm(dim=-1) for v in visits]
    expected = [(norms[k + 1] / norms[k]).mean() for k in (0, 2)]
    assert ratios[3] == pytest.approx(float(sum(expected)) / 2, rel=1e-4)
    _, measured = cached("dit", "cache(magcache,threshold=99,retain=0.34)")
    assert set(blocks(measured).values()) == {"##---#"}


def test_one_prompt_is_told_to_be_few(caplog: pytest.LogCaptureFixture) -> None:
    cached("sd", "cache(auto,speedup=1.2,calls=1,trials=1,reach=2)")
    assert "cache(auto) calibrates with the prompt of the capture alone" in caplog.text
    caplog.clear()
    cached("sd", "cache(deepcache,interval=3)")
    cached("dit", "cache(smoothcache,alpha=0,calls=1)")
    assert not caplog.text


def test_smoothcache(tmp_path: Any) -> None:
    path = tmp_path / "errors.json"
    path.write_text('{"attention": [[0,0,0,0,0], [9,9,9,9]], "mlp": [[9,9,9,9,9], [0,9,9,9]]}')
    program, _ = cached("dit", f"cache(smoothcache,errors='{path}')")

    def prepare(pipe: Pipe) -> None:
        hooks([0, 2, 4, 5], layers("dit", ".attn1"))(pipe)
        hooks([0, 3, 4, 5], layers("dit", ".ff"))(pipe)

    same(program, "dit", eager("dit", prepare))


# What it costs, and what it is combined with


@pytest.mark.parametrize("text", ["cache(deepcache,interval=2)", "cache(mask,101010)"])
def test_flops_and_memory(text: str) -> None:
    _, record = cached("sd", text)
    before, after = (note(record)["flops"][key] for key in ("before", "measured"))
    assert record.before.flops - record.after.flops == before - after
    full = graph_flops(unrolled("sd").components["unet"])
    assert before == STEPS * full
    shallow = (2 * after - before) // STEPS
    assert 0 < shallow < full / 2
    assert note(record)["peak cache bytes"] == 2 * 8 * 8 * 8 * 4  # of up_blocks.1.resnets.0


class Counter(fx.Interpreter):
    """Runs a program on real values, and counts the FLOPs of some calls."""

    def __init__(self, program: Program, calls: Collection[fx.Node]) -> None:
        super().__init__(program.root)
        self.calls = calls
        self.flops = 0

    def run_node(self, n: fx.Node) -> Any:
        counter = flop_counter()
        with counter:
            result = super().run_node(n)
        self.flops += counter.get_total_flops() if n in self.calls else 0
        return result


@pytest.mark.parametrize(
    ("name", "text", "difference"),
    [
        ("sd", "cache(deepcache)", 0),
        ("dit", "cache(taylorseer,order=2,interval=2,warm-up=2)", 0),
        # The first convolution of the batched decoders reads what all of them have in common.
        ("sd", "cache(faster-diffusion,key-steps=(0,2,3))", -1),
        # The calls without the prompt go.
        ("wan", "cache(t-gate,gate=2)", -1),
    ],
)
def test_flops_that_are_predicted_and_measured(name: str, text: str, difference: int) -> None:
    program, record = cached(name, text)
    flops = note(record)["flops"]
    component = find_loop(unrolled(name)).name
    tagged = [call for call in program.calls() if call.meta.get("tag")]
    counter = Counter(program, {c for c in tagged if c.meta["tag"].component == component})
    with torch.no_grad():
        counter.run(*program.sample_inputs(), enable_io_processing=False)
    assert flops["measured"] == counter.flops
    assert flops["before"] > flops["predicted"] > 0
    assert (flops["measured"] < flops["predicted"]) == (difference < 0)
    assert (flops["measured"] == flops["predicted"]) == (difference == 0)


def test_a_map_says_what_stands_for_a_block_that_is_not_computed() -> None:
    program = unrolled("sd").clone()
    loop = find_loop(program)
    parts = analyze_denoiser(loop.body, loop.loop_variant)
    deep = parts.middle
    assert deep is not None
    terms = {2: (Term(1),), 3: (Term(0, -1.0), Term(1, 2.0)), 4: (Term(2),), 5: (Term(3),)}
    plan = {step: [Reuse(deep, which)] for step, which in terms.items()}
    plan[2].append(Reuse(parts.branches[-1].value, (Term(0, 0.5), Term(1, 0.5))))
    steps = reuse_plan.resolve(loop, plan)
    apply(program, loop, plan)
    table = step_map.step_map(loop, steps, step_map.work_by_call(program, loop))
    # A step that takes a value from one that took it as a sum takes that sum.
    assert table["mid_block.attentions.0"] == table["mid_block.resnets.1"] == "##-~-~"
    assert table["down_blocks.0"] == "######", "skip connections read it"
    assert table["up_blocks.1.resnets.1"] == "##+###", "its shortcut is computed"


def test_a_map_tells_where_half_of_a_batch_is_computed() -> None:
    _, record = cached("pixart", "cache(t-gate,gate=4)")
    assert rows(record)["pos_embed.proj"] == "####++"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sd", "cache(deepcache)"),
        ("sd", "cache(faster-diffusion,key-steps=(0,3))"),
        ("dit", "cache(taylorseer,order=2,interval=2,warm-up=1)"),
        ("pixart", "cache(delta-dit)"),
        ("pixart", "cache(t-gate,gate=2)"),
    ],
)
@pytest.mark.parametrize(("before", "after"), [("unroll", ""), ("unroll,hoist", "simplify,fuse")])
def test_in_any_order_it_gives_the_same(name: str, text: str, before: str, after: str) -> None:
    program, record = cached(name, ",".join(filter(None, [text, after])), before)
    straight, _ = cached(name, text)
    results = [call(each, inputs(name)) for each in (program, straight)]
    assert difference(*results)[1] < 1e-5
    assert 0 < record.relative < 1
    assert not record.exact
    assert note(record)["bodies"] <= 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sd", "cache(deepcache,interval=1)"),
        ("dit", "cache(fora,interval=1)"),
        ("dit", "cache(taylorseer,interval=1)"),
        ("pixart", "cache(delta-dit,interval=1)"),
        ("dit", "cache(mask,111111)"),
        ("dit", "cache(magcache,ratios=(2))"),
    ],
)
def test_computing_everything_changes_nothing(name: str, text: str) -> None:
    _, record = cached(name, text)
    assert not record.changed
    assert record.relative == 0
    (component,) = (w.partition(":")[0] for w in record.skipped)
    assert component in unrolled(name).components


def test_the_error_is_measured_and_a_budget_refuses_it() -> None:
    _, record = cached("sd", "cache(deepcache,budget=0.9)")
    assert 0 < record.relative < 0.9
    with pytest.raises(ToleranceError) as caught:
        cached("sd", "cache(deepcache,budget=1e-6)")
    assert str(caught.value) == (
        f"cache(deepcache,budget=1e-06) added a relative error of {record.relative:.3g}, "
        "its budget is 1e-06"
    )


# Refusals


def fitting(*not_these: str) -> str:
    *most, last = (name for name in policy_names() if name not in not_these)
    return f"{', '.join(most)} or {last}"


UNET_ONLY = ("deepcache", "faster-diffusion")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "dit",
            "cache",
            "cache wants a policy, as in cache(deepcache,interval=3); there are "
            + ", ".join(policy_names()),
        ),
        (
            "dit",
            "cache(deepcache)",
            "deepcache needs skip connections, and transformer has none; it has 2 transformer "
            f"blocks and 4 attention or MLP branches: use {fitting(*UNET_ONLY, 't-gate')}",
        ),
        (
            "sd",
            "cache(delta-dit)",
            "delta-dit needs transformer blocks, and unet has none; it has 4 skip connections, "
            "12 attention or MLP branches and 4 cross-attention: use "
            + fitting("delta-dit", "magcache"),
        ),
        (
            "dit",
            "cache(t-gate)",
            "t-gate needs cross-attention, and transformer has none; it has 2 transformer "
            f"blocks and 4 attention or MLP branches: use {fitting(*UNET_ONLY, 't-gate')}",
        ),
        (
            "sd",
            "cache(deepcache,branch=4)",
            "branch=4: unet has 4 skip connections, 0 to 3",
        ),
        (
            "sd",
            "cache(faster-diffusion,key-steps=(0,6))",
            "key-steps has 6: the loop has 6 steps, 0 to 5",
        ),
        ("pixart", "cache(delta-dit,range=3)", "range=3: transformer has 2 transformer blocks"),
        (
            "pixart",
            "cache(t-gate,gate=6)",
            "gate=6: the loop has 6 steps, so no step is after the gate",
        ),
        ("dit", "cache(mask,101)", "the mask has 3 digits, and the loop has 6 steps"),
        ("dit", "cache(mask)", "the mask has 0 digits, and the loop has 6 steps"),
        (
            "dit",
            "cache(mask,101010,deep)",
            "transformer has no values=deep; it has blocks, branches",
        ),
        (
            "dit",
            "cache(fora,max-cache-mb=0.01)",
            "cache(fora,max-cache-mb=0.01) keeps up to 0.0156 MB of values for later steps, over "
            "max-cache-mb=0.01",
        ),
    ],
)
def test_refusals(name: str, text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        cached(name, text)
    assert str(caught.value) == message


def test_a_program_that_is_not_unrolled_is_refused() -> None:
    with pytest.raises(DiffoptError) as caught:
        cached("dit", "cache(fora)", before="simplify")
    assert "transformer is not unrolled" in str(caught.value)
    assert "run `unroll` first" in str(caught.value)
