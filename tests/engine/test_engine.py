"""The engine file, its errors and the object that runs it; targets have tests of their own."""

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from diffopt.cli import inspect as inspect_command
from diffopt.core import Pipeline, Progress
from diffopt.engine import engine_file
from diffopt.engine.engine import Engine, build, load
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering import aoti
from diffopt.lowering.executor import ComponentFunction
from diffopt.lowering.hardware import hardware_names
from diffopt.lowering.target import (
    EngineContents,
    Lowered,
    Target,
    find_target,
    parse_target,
    target_names,
)
from diffopt.storage import container
from tests.sampler import program

ROOT = Path(__file__).parents[2]
MEMBERS = ["program.json", "weights.safetensors", "manifest.json", "assets/note/a.txt"]


@pytest.fixture(scope="module")
def captured() -> Program:
    captured = program()
    captured.host.assets["note"] = {"a.txt": b"something that a tokenizer needs"}
    return captured


@pytest.fixture(scope="module")
def whole(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "whole.engine"
    build(captured, "eager", path)
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DiffoptError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(path), "FILE")


def places(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield where each member's content begins and ends."""
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            with file.open(info) as member:
                start = member._orig_compress_start  # type: ignore[attr-defined]
                yield info.filename, start, start + info.file_size


def rewrite(path: Path, to: Path, **changes: Any) -> Path:
    """Write an engine again with another manifest."""
    opened = container.Archive(path, engine_file.KIND, "an engine", "")
    members = {name: [opened.read(name)] for name in opened.manifest["members"]}
    container.write(to, engine_file.KIND, opened.manifest | changes, members)
    return to


# What an engine gives


def test_engine_gives_what_the_program_gives(captured: Program, whole: Path) -> None:
    opened = load(whole)
    for seed in range(3):
        expected = captured(seed=seed)["images"]
        assert torch.equal(opened(seed=seed)["images"], expected)
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(opened(generator=generator)["images"], expected)
    assert torch.equal(opened.run(captured.sample_inputs())[0], captured(seed=0)["images"])


def test_engine_gives_images_arrays_or_tensors(whole: Path) -> None:
    opened = load(whole)
    tensor = opened(seed=0, output_type="pt")["images"]
    assert tensor.shape == (2, 3, 4, 4)
    assert not tensor.requires_grad
    assert opened(seed=0, output_type="np")["images"].shape == (2, 4, 4, 3)
    assert [image.size for image in opened(seed=0, output_type="pil")["images"]] == [(4, 4)] * 2


def test_engine_says_what_it_is(whole: Path) -> None:
    opened = load(whole)
    assert opened.inputs == {"noise": "float32[2,8]"}
    assert opened.manifest["source"] == "tests.sampler:Sampler"
    assert opened.manifest["target"] == "eager"
    assert opened.manifest["releasable"] == ["vae.out_weight", "vae.out_bias"]
    assert repr(opened) == (
        f"<Engine {whole}: target eager, passes none, 0.0 MB, takes generator, seed>"
    )
    opened.verify()


def test_the_program_can_be_had_from_an_engine(captured: Program, whole: Path) -> None:
    program = load(whole).program
    program.verify()
    assert str(program) == str(captured)
    assert program.host.assets == captured.host.assets


def test_two_builds_of_a_program_are_the_same_file(captured: Program, tmp_path: Path) -> None:
    for name in "ab":
        build(captured, "eager", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_are_mapped_aligned_and_private_to_the_process(whole: Path) -> None:
    opened, before = load(whole), whole.read_bytes()
    expected = opened(seed=0)["images"]
    weight = opened.tensors["unet.first_weight"]
    assert weight.data_ptr() % container.ALIGNMENT == 0
    weight.add_(1.0)
    assert not torch.equal(opened(seed=0)["images"], expected)
    assert whole.read_bytes() == before
    assert torch.equal(load(whole)(seed=0)["images"], expected)


def test_weights_are_a_safetensors_file(whole: Path) -> None:
    with zipfile.ZipFile(whole) as file:
        tensors = safetensors.torch.load(file.read("weights.safetensors"))
    opened = load(whole)
    assert tensors.keys() == opened.tensors.keys()
    assert all(torch.equal(tensors[name], opened.tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", list(container._DTYPES), ids=str)
def test_tensors_of_every_dtype_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "odd": torch.arange(3).to(dtype),
        "transposed": torch.arange(6).view(2, 3).to(dtype).t(),
    }
    container.write(tmp_path / "x", "kind", {}, {"w": container.pack_tensors(tensors)})
    loaded = container.Archive(tmp_path / "x", "kind", "a file", "").tensors("w")
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert loaded[name].tolist() == tensor.tolist()


def test_an_engine_runs_without_the_libraries_of_the_model(whole: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'tests.sampler'): sys.modules[name] = None\n"
        "from diffopt.engine.engine import load\n"
        f"print(load({str(whole)!r})(seed=0)['images'].sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(load(whole)(seed=0)["images"].sum().item())


# What is wrong with a file


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.engine") == "FILE: no such file"


def test_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "FILE: is a directory, not an engine file"


@pytest.mark.parametrize("content", [b"", b"PK", b"some text\n" * 99, b"PK\3\4" + bytes(999)])
def test_not_an_engine(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(content)
    assert refusal(path) == (
        "FILE: not an engine file; build one with `diffopt optimize MODEL -o FILE.engine`"
    )


def test_program_file(captured: Program, tmp_path: Path) -> None:
    path = tmp_path / "x.program"
    captured.save(path)
    assert refusal(path) == (
        "FILE: not an engine file; build one with `diffopt optimize MODEL -o FILE.engine`"
    )


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_truncated(part: float, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    size = int(part * whole.stat().st_size)
    path.write_bytes(whole.read_bytes()[:size])
    assert refusal(path) == (
        f"FILE: truncated, only {size} bytes of it are here; copy it again, or build it again"
    )


@pytest.mark.parametrize("member", MEMBERS)
def test_flipped_bit_names_the_member(member: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    ((start, end),) = [place[1:] for place in places(whole) if place[0] == member]
    for at in (start, (start + end) // 2, end - 1):
        content = bytearray(whole.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)
        message = f"FILE: member {member} is damaged; copy it again, or build it again"
        assert refusal(path) == message


def test_any_flipped_bit_is_an_error_or_harmless(whole: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "x.engine", whole.read_bytes()
    expected = load(whole)(seed=0)["images"]
    numbers = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        path.write_bytes(damaged)
        try:
            opened = load(path)
        except DiffoptError:
            continue
        assert torch.equal(opened(seed=0)["images"], expected)


def test_removed_member(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if info.filename != "weights.safetensors":
                new.writestr(info.filename, old.read(info))
    message = "FILE: member weights.safetensors is damaged; copy it again, or build it again"
    assert refusal(path) == message


def test_other_format(whole: Path, tmp_path: Path) -> None:
    assert refusal(rewrite(whole, tmp_path / "x", format="9.9")) == (
        f"FILE: engine format 9.9, this diffopt reads {engine_file.FORMAT};"
        " build it again with this version"
    )


def test_unknown_target(whole: Path, tmp_path: Path) -> None:
    text = "abacus(beads=9)"
    path = rewrite(whole, tmp_path / "x", target=text, lowering="abacus")
    known = ", ".join(sorted({*target_names(), *hardware_names()}))
    assert refusal(path) == (
        f"FILE: built for target {text}, and there is no target 'abacus'; there are {known};"
        ' install what adds it, or load the engine with target="eager"'
    )
    assert load(path, target="eager")(seed=0)["images"].shape == (2, 3, 4, 4)


def test_an_engine_that_does_not_name_its_lowering(whole: Path, tmp_path: Path) -> None:
    assert load(whole).target.name == "eager"
    assert load(rewrite(whole, tmp_path / "y", lowering=None)).target.name == "eager"
    # With its lowering, the text of a device tells what runs it.
    path = rewrite(whole, tmp_path / "x", target="cpu-amx:eager")
    assert load(path, target="eager").target.device == "cpu-amx"


def test_target_that_did_not_build_it(whole: Path) -> None:
    assert refusal(whole, target="cpu") == (
        "FILE: built for target eager, not cpu; build it again for cpu"
    )


def test_verify_can_be_left_out(whole: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "x.engine", bytearray(whole.read_bytes())
    (end,) = [place[2] for place in places(whole) if place[0] == "weights.safetensors"]
    content[end - 1] ^= 1
    path.write_bytes(content)
    opened = load(path, verify=False)
    message = "member weights.safetensors is damaged; copy it again, or build it again"
    with pytest.raises(DiffoptError) as caught:
        opened.verify()
    assert str(caught.value) == f"{path}: {message}"


# Building


@dataclass(frozen=True)
class Picky(Target):
    """Take nothing."""

    name = "picky"

    def refuses(self, program: Program) -> str | None:
        return "it is Monday"

    def compile(self, program: Program, progress: Progress) -> Lowered:
        raise AssertionError("compiled what it refuses")


@dataclass(frozen=True)
class Far(Target):
    """Be another machine."""

    name = "eager"  # stands in for a target that is installed, so that the engine can be loaded

    def compile(self, program: Program, progress: Progress) -> Lowered:
        return Lowered(requires={"machine": "far"}, holds_weights=True)

    def unfit(self, requires: Mapping[str, Any]) -> str | None:
        return f"it was built for {requires['machine']}, this is near"

    def load(self, image: EngineContents) -> dict[str, ComponentFunction]:
        raise AssertionError("loaded what does not fit")


def test_refused_program(captured: Program, tmp_path: Path) -> None:
    with pytest.raises(DiffoptError) as caught:
        build(captured, Picky(), tmp_path / "x")
    assert str(caught.value) == "target picky cannot take this program: it is Monday"
    assert not list(tmp_path.iterdir())


def test_machine_that_does_not_fit(
    captured: Program, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_file, "parse_target", lambda text: Far())
    path = rewrite(whole, tmp_path / "x", requires={"machine": "far"})
    assert refusal(path) == (
        "FILE: it was built for far, this is near; build it again for this machine,"
        ' or load it with target="eager"'
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/x.engine", "FILE: there is no folder FOLDER/no"),
        (".", "FILE: is a directory; name the engine file to write"),
    ],
)
def test_place_to_write(name: str, message: str, captured: Program, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(DiffoptError) as caught:
        build(captured, "eager", path)
    text = str(caught.value).replace(f"{path}:", "FILE:").replace(str(tmp_path), "FOLDER")
    assert text == message


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.engine"
    path.write_text("old")

    def interrupted(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(captured, "eager", path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.engine"]
    assert path.read_text() == "old"


def test_a_full_disk_is_one_line(
    captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiffoptError) as caught:
        build(captured, "eager", tmp_path / "x")
    assert str(caught.value) == f"{tmp_path}/x: cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())


def test_progress_says_what_is_done(captured: Program, tmp_path: Path) -> None:
    seen: list[str] = []
    build(captured, "eager", tmp_path / "x", progress=lambda what, fraction: seen.append(what))
    assert seen == ["writing"]


def test_the_manifest_is_readable_json(whole: Path) -> None:
    with zipfile.ZipFile(whole) as file:
        assert file.namelist()[0] == "mimetype"
        assert file.read("mimetype") == b"application/x-diffopt-engine"
        manifest = json.loads(file.read("manifest.json"))
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
    assert manifest == Engine(whole).manifest


# Targets by name


def test_targets_by_name() -> None:
    assert {"cpu", "eager"} <= set(target_names())
    for name in target_names():
        assert find_target(name).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpv", "there is no target 'cpv'; did you mean 'cpu'?\n  cpv\n  ^^^"),
        ("cpu,eager", f"wants one target, got 'cpu,eager'; there are {', '.join(target_names())}"),
        ("", f"wants one target, got ''; there are {', '.join(target_names())}"),
        (
            "cpu(freze=true)",
            "cpu has no option 'freze'; did you mean 'freeze'?\n  cpu(freze=true)\n      ^^^^^",
        ),
    ],
)
def test_wrong_target_text(text: str, message: str) -> None:
    with pytest.raises(DiffoptError) as caught:
        parse_target(text)
    assert str(caught.value) == message


# Code for the machine, other processes, and files that change


def test_code_for_the_machine_is_loaded_only_where_it_may_be(
    captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.engine"
    build(captured, "cpu", file)
    monkeypatch.setattr(aoti, "open_library", lambda *_: pytest.fail("it was loaded"))
    assert refusal(file, allow_native=False) == (
        "FILE: is for target cpu, and so has code for this machine, which allow_native=False"
        ' forbids; load it with target="eager", which runs the graphs alone'
    )
    assert load(file, target="eager", allow_native=False)(seed=0)["images"].shape[0] == 2
    assert inspect_command.problem(file) is None
    assert inspect_command.open_engine(str(file))[0].fingerprint()
    build(captured, "eager", tmp_path / "e.engine")
    load(tmp_path / "e.engine", allow_native=False)


def test_an_engine_is_pickled_as_its_path(captured: Program, tmp_path: Path) -> None:
    file = tmp_path / "x.engine"
    engine = build(captured, "eager", file)
    copy = pickle.loads(pickle.dumps(engine))
    assert torch.equal(copy(seed=3)["images"], engine(seed=3)["images"])
    content = pickle.dumps(engine)
    assert len(content) < 1000
    build(Pipeline.parse("unroll").run(captured), "eager", file)
    with pytest.raises(DiffoptError, match="is another file than the engine that was pickled"):
        pickle.loads(content)


def test_a_file_that_is_written_to_while_it_is_loaded(captured: Program, tmp_path: Path) -> None:
    file = tmp_path / "x.engine"
    engine = build(captured, "eager", file)
    expected = engine(seed=0)["images"]
    content = file.read_bytes()
    # Another file in its place, or none, changes nothing: the loaded one has no name any more.
    build(captured, "eager", file)
    assert torch.equal(engine(seed=0)["images"], expected)
    file.unlink()
    assert torch.equal(engine(seed=0)["images"], expected)
    file.write_bytes(content)
    engine = load(file)
    with open(file, "r+b") as opened:
        opened.write(content[:100])
    os.utime(file)
    with pytest.raises(DiffoptError, match=r"was written to while it is loaded; load it again"):
        engine(seed=0)
