"""Optional packages: what is said where they are missing or broken."""

import sys
from pathlib import Path

import pytest

from diffopt import optional
from diffopt.errors import DiffoptError


def test_a_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchmetrics", "torchmetrics.image.kid"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DiffoptError) as caught:
        optional.require("torchmetrics.image.kid", "measuring quality", "diffopt[quality]")
    assert str(caught.value) == "measuring quality needs torchmetrics: pip install diffopt[quality]"
    assert optional.module_or_reason("torchmetrics") == "is not installed"


def test_a_broken_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_broken_one.py").write_text("raise OSError('libx.so is missing\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = optional.module_or_reason("a_broken_one")
    assert reason == "cannot be imported: libx.so is missing"


def test_modules_of_an_extra() -> None:
    assert optional.lacks("torch", "json", extra="onnx") is None
    with pytest.raises(DiffoptError) as caught:
        optional.check("torch", "not_a_module", extra="onnx")
    assert str(caught.value) == (
        "not-a-module is not installed; install it with `pip install diffopt[onnx]`"
    )
