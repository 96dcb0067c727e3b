"""How container files are mapped."""

import sys
from pathlib import Path

import pytest

from diffopt.storage import container


@pytest.mark.skipif(sys.platform != "linux", reason="other systems reserve as they like")
def test_a_file_may_be_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # of zeros, which take no room on the disk
    with path.open("rb") as file:
        memory = container.mapped(file.fileno())
    assert len(memory) == 1 << 40
    memory[5] = 1
    with path.open("rb") as file:
        assert file.read(8) == bytes(8)
    assert memory[:8] == bytes([0, 0, 0, 0, 0, 1, 0, 0])
    memory.close()
