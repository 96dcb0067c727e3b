"""Keys of the cache."""

import shutil
from pathlib import Path

import pytest

from diffopt.ir import serialize
from diffopt.lowering import compile_inputs
from diffopt.lowering.compile_inputs import source_hash


def test_a_key_depends_on_what_a_lowering_is_written_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowering = tmp_path / "lowering.py"
    lowering.write_text("a = 1\n")
    before = source_hash([lowering])
    assert source_hash([lowering]) == before
    copy = shutil.copytree(Path(serialize.__file__).parent, tmp_path / "ir")
    monkeypatch.setattr(compile_inputs.serialize, "__file__", str(copy / "serialize.py"))
    assert source_hash([lowering]) == before
    with (copy / "qdq.py").open("a") as file:
        file.write("# another\n")
    assert source_hash([lowering]) != before
    monkeypatch.undo()
    lowering.write_text("a = 2\n")
    assert source_hash([lowering]) != before
