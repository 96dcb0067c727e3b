"""The table of TensorRT plans: its document from made-up numbers, and runs that are stopped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.study.document import BEGIN, END
from examples.targets import __main__ as command
from examples.targets import document, measure, programs

STEPS = {"gemm fp16": 3, "attention fp16": 1, "other": 7}


def component(size: int = 1_000_000, **devices: Any) -> dict[str, Any]:
    plan = {"bytes": size, "weight": 20_000, "activation": 1, "steps": STEPS, "seconds": 0.4}
    return {
        "nodes": 5,
        "operators": 9,
        "export seconds": 2.0,
        "devices": {device: plan for device in document.DEVICES} | devices,
    }


def test_rows_say_what_is_whole_and_reasons_what_is_not() -> None:
    det = {"refused": "vae: TensorRT cannot take Det (vae/Det_1): there is no such operator in it"}
    lost = {"nodes": 3, "not exported": "no ONNX function for aten.det"}
    refused = {
        "rtx3090": "in unet the input of l is in fp8, and rtx3090 has no fp8 products; do so"
    }
    data = {
        "models": {
            "sd": {
                "fp16": {
                    "refused": {},
                    "components": {"unet": component(), "vae": component(3_400_000)},
                },
                "fp8": {"refused": refused, "components": {"unet": component(rtx3090={})}},
                "fp32": {
                    "refused": {},
                    "components": {"unet": component(), "vae": component(rtx5090=det)},
                },
                "bf16": {"refused": {}, "components": {"unet": component(), "vae": lost}},
                "int8": {"done": {"unet": component()}},
            }
        }
    }
    text = document.section(data)
    lines = [line for line in text.splitlines() if line.startswith(("| Stable", "- "))]
    tiny, products = "| Stable Diffusion 1 (tiny)", "2 attention fp16, 6 gemm fp16"
    assert lines == [
        f"{tiny} | fp32 | 2 | rtx3090, rtx4090 | 2.0 | 0.04 | 4 | 0.8 | {products} |",
        f"{tiny} | fp16 | 2 | all | 4.4 | 0.04 | 4 | 0.8 | {products} |",
        f"{tiny} | bf16 | 2 | none | - | - | 2 | - | - |",
        f"{tiny} | fp8 | 1 | rtx4090, rtx5090 | 1.0 | 0.02 | 2 | 0.4 |"
        " 1 attention fp16, 3 gemm fp16 |",
        "- TensorRT cannot take Det (vae/Det_1): there is no such operator in it (sd vae in fp32)",
        "- not exported: no ONNX function for aten.det (sd vae in bf16)",
        "- rtx3090, fp8: rtx3090 has no fp8 products",
    ]


def test_every_model_has_formats() -> None:
    assert programs.formats("sd3") == ["fp16"]
    assert programs.formats("fashion-sd") == [*programs.FORMATS]
    assert programs.formats("flux") == [*programs.FORMATS][:-1]


def test_a_run_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(name: str, gm: Any, devices: list[str]) -> dict[str, Any]:
        if len(built) == 1:
            built.append("stopped")
            raise KeyboardInterrupt
        built.append(name)
        return component()

    stub_program = SimpleNamespace(components={"unet": None, "vae": None})
    monkeypatch.setattr(command, "make", lambda model, number, work: stub_program)
    monkeypatch.setattr(measure, "refused", lambda program, devices: {})
    monkeypatch.setattr(measure, "component", build)
    paper = tmp_path / "targets.md"
    paper.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    words = ["--only", "sd", "--work", str(tmp_path), "--document", str(paper)]
    with pytest.raises(KeyboardInterrupt):
        command.main(words)
    command.main([*words, "--minutes", "-1"])
    assert "Stable" not in paper.read_text()
    command.main(words)
    command.main(words)
    assert built == ["unet", "stopped", "vae"]
    assert "| Stable Diffusion 1 (tiny) | fp16 | 2 | all | 2.0 |" in paper.read_text()
    command.main([*words, "--again"])
    assert built[3:] == ["unet", "vae"]
