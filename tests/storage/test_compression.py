"""Compressed engine and program files, and what weights take next to float16."""

from pathlib import Path

import pytest
import torch

from diffopt.analysis import weight_memory
from diffopt.engine.engine import build, load
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.storage import container
from tests import loops, sampler
from tests.command import Run
from tests.quantized import quantized

KIND = "application/x-test"
TEXT, NOISE = b"again and " * 5000, torch.randint(0, 256, (4096,), dtype=torch.uint8)


def written(path: Path, compress: int | None) -> container.Archive:
    members = {"text": [TEXT[:100], TEXT[100:]], "noise": [container.raw_bytes(NOISE)], "empty": []}
    container.write(path, KIND, {}, members, compress)
    return container.Archive(path, KIND, "a test", "")


@pytest.mark.parametrize("level", [None, 1, 22])
def test_members_come_back(level: int | None, tmp_path: Path) -> None:
    opened = written(tmp_path / "x", level)
    opened.verify()
    assert bytes(opened.read("text")) == TEXT
    assert bytes(opened.read("noise")) == bytes(container.raw_bytes(NOISE))
    assert bytes(opened.read("empty")) == b""
    assert sorted(opened.names()) == ["empty", "manifest.json", "mimetype", "noise", "text"]
    # What does not shrink is stored as it is.
    small = [name for name, entry in opened.manifest["members"].items() if "zstd" in entry]
    assert small == ([] if level is None else ["text"])
    assert ((tmp_path / "x").stat().st_size < len(TEXT) // 2) == (level is not None)


def test_compressed_tensors_are_aligned_and_can_be_written_to(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(64, 64), "b": torch.ones(32, dtype=torch.bfloat16)}
    container.write(tmp_path / "x", KIND, {}, {"w": container.pack_tensors(tensors)}, 3)
    loaded = container.Archive(tmp_path / "x", KIND, "a test", "").tensors("w")
    assert all(t.data_ptr() % container.ALIGNMENT == 0 for t in loaded.values())
    loaded["a"].add_(1.0)
    assert torch.equal(loaded["b"], tensors["b"])


@pytest.mark.parametrize("at", [0, 5, 20, -1])
def test_a_damaged_member_is_one_line(at: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    opened = written(path, 3)
    start, size = opened._spans["text"]
    content = bytearray(path.read_bytes())
    content[start + at % size] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(DiffoptError) as caught:
        container.Archive(path, KIND, "a test", "").verify()
    text = str(caught.value)
    assert text == f"{path}: member text is damaged; copy it again, or build it again"


def test_a_member_cut_short_or_too_long_is_damaged() -> None:
    frame = container._compressed([TEXT], 3)
    assert frame is not None
    for size in (len(TEXT) - 1, len(TEXT) + 1):
        with pytest.raises(EOFError):
            container._decompress(memoryview(frame), size)


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    build(sampler.program(), "eager", path, compress=3)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DiffoptError, match=r"truncated, only \d+ bytes of it are here"):
        load(path)


@pytest.mark.parametrize("level", [0, 23, -1])
def test_wrong_level(level: int, tmp_path: Path) -> None:
    with pytest.raises(DiffoptError) as caught:
        written(tmp_path / "x", level)
    assert str(caught.value) == f"compress={level}: wants a level from 1 (fast) to 22 (small)"
    assert not list(tmp_path.iterdir())


def test_compressed_engines_and_programs_give_the_same(tmp_path: Path) -> None:
    program = quantized(loops.program(), "int4", "static")
    expected = program.run(program.sample)[0]
    sizes = {}
    for level in (None, 19):
        path = tmp_path / f"{level}.engine"
        engine = build(program, "eager", path, compress=level)
        assert torch.equal(engine.run(program.sample)[0], expected)
        assert str(load(path).program) == str(program)
        program.save(tmp_path / f"{level}.program", level)
        loaded = Program.load(tmp_path / f"{level}.program")
        assert torch.equal(loaded.run(loaded.sample)[0], expected)
        sizes[level] = path.stat().st_size, (tmp_path / f"{level}.program").stat().st_size
        assert sum(engine.parts.values()) < path.stat().st_size
    assert all(small < large / 2 for small, large in zip(sizes[19], sizes[None], strict=True))


# Sizes


def test_footprint_counts_quantized_weights_next_to_float16() -> None:
    program = loops.program()
    weights = 2 * (16 * 8 + 5 * 64 + 4 * 8)  # of layers, in float16
    plain = weight_memory.of_program(program)
    assert plain.fp16 == 2 * plain.elements["float32"] + sum(
        size for name, size in plain.bytes.items() if name != "float32"
    )
    for number, size in (("int8", 1.0), ("int4", 0.5), ("fp8", 1.0)):
        memory = weight_memory.of_program(quantized(program, number, None))  # type: ignore[arg-type]
        assert memory.fp16 == plain.fp16
        assert memory.elements[number] == weights // 2
        assert memory.bytes[number] == size * weights // 2
        assert memory.bytes["scales"] == 4 * (16 + 6 * 8)
        assert memory.elements["scales"] == 0
        layers = 4 * weights // 2
        assert memory.total == plain.total - layers + memory.bytes[number] + memory.bytes["scales"]
    assert str(plain).startswith("weights 0.0 MB, ")


def test_a_weight_that_some_steps_keep_counts_once() -> None:
    program = loops.program()
    small = quantized(program, "int8", None)
    both = program.clone()
    both.add_component("quantized", small.components["denoiser"])
    assert weight_memory.of_program(both).fp16 == weight_memory.of_program(program).fp16


def test_command_line(diffopt: Run, tmp_path: Path) -> None:
    model = "tests.sampler:Sampler"
    done = diffopt(
        "optimize", model, "-p", "simplify", "-t", "eager", "-o", "a.engine", "--compress", 19
    )
    assert done.code == 0, done.err
    assert "MB), weights 0.0 MB, 200 % of fp16" in " ".join(done.err.split())
    printed = diffopt("inspect", "a.engine").out
    assert "weights 0.0 MB, 200 % of fp16" in printed
    assert "float32" in printed
    assert "program" in printed
