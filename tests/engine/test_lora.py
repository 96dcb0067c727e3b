"""LoRA of a loaded engine: the pipeline with the same LoRA is the reference."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from diffopt.capture.trace import Session
from diffopt.core import Pipeline
from diffopt.engine.engine import Engine, build
from diffopt.engine.lora_names import Names
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from tests.command import Run
from tests.zoo import CASES, call, generator, traced

EXACT = "unroll,hoist,simplify,fuse"
UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1")
TEXT = ("q_proj", "v_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Adapter:
    """A LoRA with random factors, of the networks and layers of these names."""

    layers: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"unet": UNET})
    rank: int = 3
    alpha: float = 6.0
    seed: int = 0

    def add_to(self, pipe: Any) -> None:
        """Add it to a pipeline, as PEFT does."""
        for name, targets in self.layers.items():
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=list(targets),
                rank_pattern={"to_q": self.rank + 2},
                init_lora_weights=False,
            )
            network = getattr(pipe, name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                inject_adapter_in_model(config, network)

    def tensors(self, case: str) -> dict[str, Tensor]:
        """Return its factors by the names of diffusers."""
        pipe = CASES[case].build()
        self.add_to(pipe)
        return {
            f"{name}.{key.replace('.default.', '.')}": tensor.detach()
            for name in self.layers
            for key, tensor in getattr(pipe, name).named_parameters()
            if ".lora_" in key
        }

    @property
    def about(self) -> dict[str, Any]:
        """Return the configuration that diffusers writes beside the factors."""
        shared = {"r": self.rank, "lora_alpha": self.alpha}
        return {f"{name}.{key}": v for name in self.layers for key, v in shared.items()}

    def save(self, path: Path, case: str) -> Path:
        about = {LORA_ADAPTER_METADATA_KEY: json.dumps(self.about)}
        save_file(self.tensors(case), path, about)
        return path


def fused(case: str, *adapters: tuple[Adapter, float]) -> Any:
    """Return a pipeline with adapters in its weights: W + scale · alpha / rank · B A."""
    pipe = CASES[case].build()
    for adapter, scale in adapters:
        tensors = adapter.tensors(case)
        for key, down in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            layer = key.removesuffix(".lora_A.weight")
            component, _, path = layer.partition(".")
            weight = getattr(pipe, component).get_parameter(f"{path}.weight")
            up = tensors[f"{layer}.lora_B.weight"]
            factor = scale * adapter.alpha / len(down)
            with torch.no_grad():
                weight += factor * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return pipe


@cache
def rewritten(case: str, passes: str) -> Program:
    program = traced(case)
    return Pipeline.parse(passes).run(program, compare=False) if passes else program


def rewritten_from(pipe: Any, case: str, passes: str) -> Program:
    program = Session(pipe, check=False).program(CASES[case].inputs(0))
    return Pipeline.parse(passes).run(program, compare=False)


def images(function: Any, case: str) -> Tensor:
    return call(function, CASES[case].inputs(0) | {"generator": generator(1)})[0]


def built(case: str, passes: str, target: str, folder: Path) -> Engine:
    return build(rewritten(case, passes), target, folder / "x.engine")


def weights(engine: Engine) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in engine.tensors.items()}


def refusal(engine: Engine, path: Path, **options: Any) -> str:
    before = weights(engine)
    with pytest.raises(DiffoptError) as caught:
        engine.load_lora(path, **options)
    assert all(torch.equal(engine.tensors[key], tensor) for key, tensor in before.items())
    assert engine.loras == {}
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{path}", "FILE")


# The pipeline with the same LoRA

CACHED = "unroll,hoist,cache(deepcache,interval=2),simplify,fuse"
RUNS = [
    ("eager", ""),
    ("eager", EXACT),
    ("eager", CACHED),
    ("cpu", EXACT),
    ("cpu(pack=false)", EXACT),
    ("openvino", EXACT),
    ("onnxruntime", EXACT),
]


@pytest.mark.parametrize(("target", "passes"), RUNS)
def test_an_engine_is_the_pipeline_with_the_same_lora(
    target: str, passes: str, tmp_path: Path
) -> None:
    adapter = Adapter({"unet": UNET, "text_encoder": TEXT})
    path = adapter.save(tmp_path / "style.safetensors", "sd")
    engine = built("sd", passes, target, tmp_path)
    before, plain = weights(engine), images(engine, "sd")
    engine.load_lora(path, 0.8)
    assert engine.loras == {"style": 0.8}
    changed, pipe = images(engine, "sd"), fused("sd", (adapter, 0.8))
    expected = images(rewritten_from(pipe, "sd", passes) if passes == CACHED else pipe, "sd")
    assert (changed - plain).abs().max() > 0.01
    torch.testing.assert_close(changed, expected, atol=2e-5, rtol=1e-4)
    engine.unload_lora()
    assert engine.loras == {}
    assert torch.equal(images(engine, "sd"), plain)
    assert all(torch.equal(engine.tensors[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("target", ["eager", "cpu", "openvino"])
def test_an_engine_in_bfloat16_is_what_the_fused_pipeline_would_have_been_built_to(
    target: str, tmp_path: Path
) -> None:
    passes, adapter = f"{EXACT},cast(bf16,islands=none)", Adapter()
    path = adapter.save(tmp_path / "style.safetensors", "sd")
    engine = built("sd", passes, target, tmp_path)
    plain = images(engine, "sd")
    engine.load_lora(path)
    changed = images(engine, "sd")
    expected = images(rewritten_from(fused("sd", (adapter, 1.0)), "sd", passes), "sd")
    assert (changed - expected).norm() < 0.1 * (plain - expected).norm()
    engine.unload_lora()
    assert torch.equal(images(engine, "sd"), plain)


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("flux", {"transformer": ("to_q", "to_k", "to_v", "add_q_proj", "proj_mlp", "proj_out")}),
        ("pixart", {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")}),
        ("sdxl", {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT}),
    ],
)
def test_other_networks(case: str, layers: dict[str, Sequence[str]], tmp_path: Path) -> None:
    adapter = Adapter(layers)
    engine = built(case, EXACT, "eager", tmp_path)
    plain = images(engine, case)
    engine.load_lora(adapter.save(tmp_path / "style.safetensors", case), 0.7)
    changed = images(engine, case)
    assert (changed - plain).abs().max() > 0.001
    expected = images(fused(case, (adapter, 0.7)), case)
    torch.testing.assert_close(changed, expected, atol=5e-5, rtol=1e-4)


def test_several_requests_in_one_run(tmp_path: Path) -> None:
    adapter = Adapter({"unet": UNET, "text_encoder": TEXT})
    engine = built("sd", f"{EXACT},batch(max=2)", "eager", tmp_path)
    engine.load_lora(adapter.save(tmp_path / "style.safetensors", "sd"))
    expected = images(fused("sd", (adapter, 1.0)), "sd")
    torch.testing.assert_close(images(engine, "sd"), expected, atol=2e-5, rtol=1e-4)


def test_a_pipeline_that_has_an_adapter_takes_another(tmp_path: Path) -> None:
    engine = built("sd-lora", EXACT, "eager", tmp_path)
    plain, adapter = images(engine, "sd-lora"), Adapter({"unet": ("to_q", "ff.net.2")})
    engine.load_lora(adapter.save(tmp_path / "style.safetensors", "sd"))
    pipe = CASES["sd-lora"].build()
    for key, tensor in adapter.tensors("sd").items():
        if key.endswith("lora_A.weight"):
            up = adapter.tensors("sd")[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            layer = pipe.unet.get_submodule(path)
            layer = getattr(layer, "base_layer", layer)
            with torch.no_grad():
                layer.weight += adapter.alpha / len(tensor) * up @ tensor
    changed = images(engine, "sd-lora")
    assert not torch.equal(changed, plain)
    torch.testing.assert_close(changed, images(pipe, "sd-lora"), atol=2e-5, rtol=1e-4)


# Several, and their scales


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return built("sd", EXACT, "eager", tmp_path_factory.mktemp("lora"))


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return Adapter().save(tmp_path / "style.safetensors", "sd")


def test_several_add_up_and_each_has_its_scale(engine: Engine, style: Path, tmp_path: Path) -> None:
    first, second = Adapter(), Adapter({"unet": ("to_q", "conv1")}, rank=2, seed=1)
    other = second.save(tmp_path / "other.safetensors", "sd")
    before = weights(engine)
    engine.load_lora(style, 0.5)
    only_first = weights(engine)
    engine.load_lora(other, 0.25, name="b")
    engine.set_lora_scale("b", -0.75)
    assert engine.loras == {"style": 0.5, "b": -0.75}
    expected = images(fused("sd", (first, 0.5), (second, -0.75)), "sd")
    torch.testing.assert_close(images(engine, "sd"), expected, atol=2e-5, rtol=1e-4)
    engine.unload_lora("b")
    assert all(torch.equal(engine.tensors[key], tensor) for key, tensor in only_first.items())
    engine.unload_lora("style")
    assert all(torch.equal(engine.tensors[key], tensor) for key, tensor in before.items())


def test_a_pickled_engine_has_the_same_adapters(engine: Engine, style: Path) -> None:
    engine.load_lora(style, 0.5)
    copy = pickle.loads(pickle.dumps(engine))
    assert copy.loras == {"style": 0.5}
    assert torch.equal(images(copy, "sd"), images(engine, "sd"))
    engine.unload_lora()


def test_names_are_of_one_lora_each(engine: Engine, style: Path) -> None:
    engine.load_lora(style)
    with pytest.raises(DiffoptError, match="a LoRA 'style' is loaded already: give this one"):
        engine.load_lora(style)
    engine.unload_lora()
    with pytest.raises(DiffoptError, match="there is no LoRA 'style'; loaded: none"):
        engine.set_lora_scale("style", 1.0)
    with pytest.raises(DiffoptError, match="there is no LoRA 'x'; loaded: none"):
        engine.unload_lora("x")
    with pytest.raises(DiffoptError, match="scale='a lot': must be a finite number"):
        engine.load_lora(style, "a lot")  # type: ignore[arg-type]


# How files name layers


def kohya(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}
    result = {}
    for key, tensor in tensors.items():
        component, _, path = key.partition(".")
        layer, _, part = path.rpartition(".lora_")
        name = f"{prefixes[component]}_{layer.replace('.', '_')}"
        which = {"A.weight": "down", "B.weight": "up"}[part]
        result[f"{name}.lora_{which}.weight"] = tensor
        result[f"{name}.alpha"] = torch.tensor(alpha)
    return result


def renamed(tensors: Mapping[str, Tensor], down: str, up: str) -> dict[str, Tensor]:
    pairs = ((key.replace("lora_A", down).replace("lora_B", up), t) for key, t in tensors.items())
    return dict(pairs)


def processors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {}
    for key, tensor in tensors.items():
        name = key.replace(".to_out.0.", ".to_out.").replace(".to_", ".processor.to_")
        name = name.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")
        names[name] = tensor
    return names


BOTH = Adapter({"unet": UNET, "text_encoder": TEXT})
ATTENTION = Adapter({"unet": ("to_q", "to_k", "to_v", "to_out.0")})


@pytest.mark.parametrize(
    ("adapter", "convention"),
    [
        (BOTH, lambda t: kohya(t, BOTH.alpha)),
        (BOTH, lambda t: renamed(t, "lora_linear_layer.down", "lora_linear_layer.up")),
        (BOTH, lambda t: renamed(t, "lora.down", "lora.up")),
        (ATTENTION, processors),
    ],
    ids=["kohya", "linear_layer", "lora", "processors"],
)
def test_files_of_other_conventions(
    engine: Engine, adapter: Adapter, convention: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = convention(adapter.tensors("sd"))
    save_file(tensors, path)
    engine.load_lora(path)
    changed = weights(engine)
    engine.unload_lora()
    # Without an alpha it is the rank.
    rank_alpha = (
        Adapter(adapter.layers, alpha=3.0) if "alpha" not in str(list(tensors)) else adapter
    )
    plain = dict(adapter.tensors("sd"))
    if rank_alpha is not adapter:
        save_file(plain, tmp_path / "y.safetensors")
        engine.load_lora(tmp_path / "y.safetensors")
    else:
        engine.load_lora(adapter.save(tmp_path / "y.safetensors", "sd"))
    assert all(torch.equal(engine.tensors[key], tensor) for key, tensor in changed.items())
    engine.unload_lora()


@pytest.mark.parametrize("is_root", [False, True])
def test_a_folder_of_peft_has_its_configuration(
    engine: Engine, is_root: bool, tmp_path: Path
) -> None:
    adapter = Adapter({"unet": ("to_q", "to_k")})
    tensors = {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in adapter.tensors("sd").items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 3, "lora_alpha": 6, "use_rslora": is_root, "alpha_pattern": {"attn1.to_k": 1.5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = weights(engine)
    engine.load_lora(tmp_path, 2.0, name="x")
    part = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{}.lora_{}.weight"
    for which, alpha in (("q", 6), ("k", 1.5)):
        down, up = (adapter.tensors("sd")[part.format(which, end)] for end in "AB")
        rank = len(down) ** 0.5 if is_root else len(down)
        wanted = 2 * alpha / rank * up @ down
        # Merged: q is the first of q, k and v.
        key = next(k for k in before if "mid_block" in k and "attn1_to_q_folded_merged_weight" in k)
        rows = slice(0, 16) if which == "q" else slice(16, 32)
        got = engine.tensors[key][rows] - before[key][rows]
        scale = got.norm() / wanted.norm()
        assert got.shape == wanted.shape
        assert scale > 0.2
    engine.unload_lora()


def test_names_of_stability_are_those_of_diffusers() -> None:
    weights = [f"{name}.{key}" for name, key in _unet_weights("sdxl")]
    names = Names(weights)
    for stability, diffusers in {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
        "middle_block_1_proj_out": "mid_block.attentions.0.proj_out",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_1_1_transformer_blocks_0_attn1_to_q": (
            "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
        ),
        "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_2_0_in_layers_2": "up_blocks.1.resnets.0.conv1",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "out_2": "conv_out",
    }.items():
        assert names.find(f"lora_unet_{stability}") == f"unet.{diffusers}.weight", stability


def _unet_weights(case: str) -> list[tuple[str, str]]:
    return [("unet", key) for key, _ in CASES[case].build().unet.named_parameters()]


def test_a_layer_may_be_of_two_networks() -> None:
    names = Names(["a.x.weight", "b.x.weight", "b.y.weight"])
    assert names.find("x") is None
    assert names.find("a.x") == "a.x.weight"
    assert names.find("base.y") is None
    assert names.find("y") == "b.y.weight"


def test_layers_that_the_engine_never_reads(
    engine: Engine, style: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = {
        "vae.encoder.conv_in.lora_A.weight": torch.ones(1, 3, 3, 3),
        "vae.encoder.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1),
    }
    save_file(encoder, tmp_path / "x.safetensors")
    assert refusal(engine, tmp_path / "x.safetensors") == (
        "FILE: changes vae.encoder.conv_in.weight, which the engine never reads"
    )
    save_file(Adapter().tensors("sd") | encoder, tmp_path / "x.safetensors")
    engine.load_lora(tmp_path / "x.safetensors")
    engine.unload_lora()
    assert "changes vae.encoder.conv_in.weight, which the engine never reads" in caplog.text


def test_the_command_line(diffopt: Run, engine: Engine, style: Path, tmp_path: Path) -> None:
    words = ("run", engine.path, "-o", "x.pt", "--prompt", "a red cat", "--set", "output_type=pt")
    assert diffopt(*words, "--lora", f"{style}:0.5", "--lora", style).code == 0
    (got,) = torch.load(tmp_path / "x.pt").unsqueeze(0)
    engine.load_lora(style, 0.5, name="a")
    engine.load_lora(style, 1.0, name="b")
    wanted = engine(prompt="a red cat", seed=0, output_type="pt").images
    engine.unload_lora()
    assert torch.equal(got.reshape(wanted.shape), wanted)
    missing = diffopt(*words, "--lora", "no:0.5")
    assert (missing.code, missing.err) == (2, "diffopt: error: no: no such file\n")
    engine.program.save(tmp_path / "x.program")
    refused = diffopt("run", "x.program", *words[2:], "--lora", style)
    assert refused.err == (
        f"diffopt: error: --lora {style}: a program takes no LoRA; build an engine of it\n"
    )


# What is refused


def test_layers_that_the_pipeline_lacks(engine: Engine, tmp_path: Path) -> None:
    tensors = Adapter().tensors("sd")
    for name in ("unet.other", "lora_unet_input_blocks_1_1_proj_in", "x", "y"):
        tensors[f"{name}.lora_A.weight"] = torch.zeros(2, 8)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(8, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    assert refusal(engine, tmp_path / "x.safetensors") == (
        "FILE: lora_unet_input_blocks_1_1_proj_in, unet.other, x and 1 more: the engine's pipeline"
        " has no such layers"
    )


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("down", "up"), [((2, 8), (16, 2)), ((2, 16), (16, 3)), ((2, 16), (8, 2)), ((2,), (16, 2))]
)
def test_factors_that_do_not_fit(
    engine: Engine, down: tuple[int, ...], up: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(down), f"{LAYER}.lora_B.weight": torch.ones(up)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert refusal(engine, tmp_path / "x.safetensors") == (
        f"FILE: {LAYER}: factors of the shapes {list(up)} and {list(down)} for a weight [16, 16]"
    )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{LAYER}.lora_magnitude_vector", "of DoRA, which"),
        (f"{LAYER}.dora_scale", "of DoRA, which"),
        ("lora_unet_x.hada_w1_a", "of LoHa, which"),
        ("lora_unet_x.lokr_w1", "of LoKr, which"),
        (f"{LAYER}.lora_B.bias", "of a LoRA with biases, which"),
        ("something", "of no LoRA that"),
    ],
)
def test_other_adapters(engine: Engine, key: str, kind: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2)}, tmp_path / "x.safetensors")
    assert refusal(engine, tmp_path / "x.safetensors") == (
        f"FILE: {key} is {kind} an engine cannot load: fuse it into the pipeline and build the"
        " engine again"
    )


def test_files_that_are_none(engine: Engine, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.bin")
    assert refusal(engine, tmp_path / "x.bin") == (
        "FILE: a LoRA is read of a .safetensors file alone; others may run code"
    )
    assert refusal(engine, tmp_path / "no") == "FILE: no such file"
    (tmp_path / "y.safetensors").write_bytes(b"nothing of that kind")
    assert refusal(engine, tmp_path / "y.safetensors").startswith("FILE: is no safetensors file (")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert refusal(engine, folder) == "FILE: has 0 safetensors files; name the one to load"
    save_file({}, tmp_path / "z.safetensors")
    assert refusal(engine, tmp_path / "z.safetensors") == "FILE: has no LoRA"


def test_a_weight_that_constants_were_computed_of(engine: Engine, tmp_path: Path) -> None:
    adapter = Adapter({"unet": ("to_q", "linear_1")})  # of the timestep's embedding
    path = adapter.save(tmp_path / "x.safetensors", "sd")
    assert refusal(engine, path) == (
        "FILE: changes unet.time_embedding.linear_1.weight, of which unroll has computed something"
        " else: build an engine without that, or fuse the LoRA into the pipeline and build it again"
    )
    plain = built("sd", "hoist,fuse", "eager", tmp_path)
    plain.load_lora(path)
    expected = images(fused("sd", (adapter, 1.0)), "sd")
    torch.testing.assert_close(images(plain, "sd"), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "step", ["quantize(int8,activations=none)", "prune(ratio=0.5)", "low-rank(rank=2)"]
)
def test_weights_that_passes_have_replaced(step: str, style: Path, tmp_path: Path) -> None:
    engine = built("sd", f"{EXACT},{step}", "eager", tmp_path)
    text = refusal(engine, style)
    assert f", of which {step.partition('(')[0]}" in text


def test_an_engine_whose_kernels_hold_the_weights(style: Path, tmp_path: Path) -> None:
    engine = built("sd", EXACT, "eager", tmp_path)
    engine.manifest["holds_weights"] = True  # as cpu(freeze=true) writes
    assert refusal(engine, style) == (
        f"{tmp_path}/x.engine: target eager has the weights in its kernels, and so takes no LoRA;"
        " see `diffopt targets eager`, or fuse it into the pipeline and build the engine again"
    )


def test_an_engine_that_does_not_say_where_weights_come_from(style: Path, tmp_path: Path) -> None:
    program = rewritten("sd", "").clone()
    program.pipeline_weights = []
    engine = build(program, "eager", tmp_path / "x.engine")
    assert "does not say which weights of the pipeline it has" in refusal(engine, style)
