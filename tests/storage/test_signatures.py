"""Signed files: who has written one is told before anything in it is used."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from diffopt.engine.engine import build, load
from diffopt.errors import DiffoptError
from diffopt.ir.program import Program
from diffopt.lowering import aoti
from diffopt.storage import container
from tests import sampler
from tests.command import Run
from tests.keys import make_key


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_key(tmp_path, "mine")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    build(sampler.program(), "eager", tmp_path / "x.engine")
    return tmp_path / "x.engine"


def refusal(file: Path, *keys: Path) -> str:
    with pytest.raises(DiffoptError) as caught:
        load(file, trusted_keys=keys)
    return str(caught.value).replace(str(file), "FILE")


def test_a_signed_engine_runs(
    diffopt: Run, file: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    assert refusal(file, keys[1]) == f"FILE: is not signed, and not by {keys[1]}"
    assert diffopt("sign", file, "--key", keys[0]).out == f"signed {file}\n"
    engine = load(file, trusted_keys=[keys[1]])
    assert engine(seed=0)["images"].shape == (2, 3, 4, 4)
    assert load(file)(seed=0)["images"].shape == (2, 3, 4, 4)
    other = make_key(tmp_path, "other")
    assert refusal(file, other[1]) == f"FILE: is signed by other keys, and not by {other[1]}"
    # A second signature leaves the first.
    assert diffopt("sign", file, "--key", other[0], "-o", tmp_path / "both.engine").code == 0
    for public in (keys[1], other[1]):
        load(tmp_path / "both.engine", trusted_keys=[public])
    assert diffopt("verify", file, "--trusted-key", keys[1]).out == f"{file}: ok\n"
    told = diffopt("verify", file, "--trusted-key", other[1])
    assert (told.code, "is signed by other keys" in told.err) == (1, True)
    told = diffopt("run", file, "-o", tmp_path / "x.pt", "--trusted-key", other[1])
    assert (told.code, "is signed by other keys" in told.err) == (2, True)


def test_another_content_under_the_same_signature(
    diffopt: Run, file: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    diffopt("sign", file, "--key", keys[0])
    signed = container.Archive(file, "application/x-diffopt-engine", "an engine", "")
    members = {name: [bytes(signed.read(name))] for name in signed.manifest["members"]}
    manifest = {k: v for k, v in signed.manifest.items() if k != "members"}
    other = tmp_path / "other.engine"
    container.write(other, signed.kind, {**manifest, "source": "another"}, members)
    with container.zipfile.ZipFile(other, "a") as archive:
        archive.comment = signed.comment
    assert refusal(other, keys[1]) == (
        f"FILE: its signature by {keys[1]} does not belong to its content: it was changed since it"
        " was signed"
    )


@pytest.mark.parametrize("at", [-1, 0])
def test_a_damaged_member_of_a_signed_file(
    diffopt: Run, file: Path, keys: tuple[Path, Path], at: int
) -> None:
    diffopt("sign", file, "--key", keys[0])
    opened = container.Archive(file, "application/x-diffopt-engine", "an engine", "")
    start, size = opened._spans["weights.safetensors"]
    content = bytearray(file.read_bytes())
    content[start + at % size] ^= 1
    file.write_bytes(content)
    assert "member weights.safetensors is damaged" in refusal(file, keys[1])


def test_wrong_keys(diffopt: Run, file: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert refusal(file) == "trusted_keys: name at least one file with a public key"
    assert refusal(file, tmp_path / "none.pem").endswith(
        "none.pem: cannot be read: No such file or directory"
    )
    assert "no public Ed25519 key in PEM format" in refusal(file, file)
    assert "no public Ed25519 key" in refusal(file, keys[0])
    curve = tmp_path / "curve.pem"
    curve.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    before = file.read_bytes()
    for key in (keys[1], curve, file):
        done = diffopt("sign", file, "--key", key)
        assert (done.code, "no private Ed25519 key in PEM format" in done.err) == (2, True)
    assert file.read_bytes() == before


def test_nothing_is_loaded_of_an_unsigned_file(
    file: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti, "open_library", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(container.Archive, "tensors", lambda *_: pytest.fail("it was mapped"))
    assert "is not signed" in refusal(file, keys[1])


def test_programs_are_signed_too(diffopt: Run, keys: tuple[Path, Path], tmp_path: Path) -> None:
    program, file = sampler.program(), tmp_path / "x.program"
    program.save(file)
    with pytest.raises(DiffoptError, match="is not signed, and not by"):
        Program.load(file, trusted_keys=[keys[1]])
    assert diffopt("sign", file, "--key", keys[0]).code == 0
    assert Program.load(file, trusted_keys=[keys[1]]).fingerprint()
    assert diffopt("verify", file, "--trusted-key", keys[1], "--run").out == f"{file}: ok\n"


def test_verify_runs_programs_where_it_is_asked_to(diffopt: Run, tmp_path: Path) -> None:
    program, file = sampler.program(), tmp_path / "x.program"
    program.sample[0].fill_(float("nan"))
    program.save(file)
    assert diffopt("verify", file).code == 0
    told = diffopt("verify", file, "--run")
    assert (told.code, told.err) == (
        1,
        f"diffopt: error: {file}: output 0 is not finite on the sample inputs\n",
    )
