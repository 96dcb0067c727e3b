"""Signatures of files: who has written one, told before anything in it is used.

The manifest has the digest of every member, so one Ed25519 signature of it covers the file. It is
in the comment of the zip, which is behind everything else: a signed file differs from an unsigned
one in nothing but that. Keys are PEM files, as those of openssl:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub.pem
"""

import base64
import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffopt import optional
from diffopt.errors import DiffoptError
from diffopt.storage import container
from diffopt.storage.temporary import replacing

_PURPOSE = b"diffopt file signature 1\0"


def _cryptography(module: str) -> Any:
    optional.check("cryptography", extra="sign")
    return optional.require(f"cryptography.{module}", "a signature", "'diffopt[sign]'")


def sign(
    archive: container.Archive,
    key: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Write a signed copy of an intact file, atomically.

    Args:
        archive: The file, which is verified; earlier signatures of it are kept.
        key: A PEM file with a private key for Ed25519, not encrypted.
        output: The file to write, which may be the same.
    """
    archive.verify()
    serialization = _cryptography("hazmat.primitives.serialization")
    private = _key(key, lambda data: serialization.load_pem_private_key(data, None), "private")
    public = _raw(private.public_key())
    signatures = _signatures(archive) | {public: _encoded(private.sign(_message(archive)))}
    with replacing(output) as file:
        with open(archive.path, "rb") as source:
            shutil.copyfileobj(source, file)
        file.flush()
        with zipfile.ZipFile(file.name, "a") as copy:
            copy.comment = json.dumps({"signatures": signatures}).encode()


Keys = Sequence[str | os.PathLike[str]]
"""PEM files of public keys for Ed25519."""


def verify(archive: container.Archive, trusted: Keys | None) -> None:
    """Raise a `DiffoptError` for a file that is damaged, or that none of these keys has signed.

    None: nobody has to.
    """
    if trusted is not None:
        _expect_signed(archive, trusted)
    archive.verify()


def _expect_signed(archive: container.Archive, trusted: Keys) -> None:
    serialization = _cryptography("hazmat.primitives.serialization")
    keys = {str(path): _key(path, serialization.load_pem_public_key, "public") for path in trusted}
    if not keys:
        raise DiffoptError("trusted_keys: name at least one file with a public key")
    signatures = _signatures(archive)
    for path, key in keys.items():
        signature = signatures.get(_raw(key))
        if signature is None:
            continue
        try:
            key.verify(base64.b64decode(signature), _message(archive))
        except (_cryptography("exceptions").InvalidSignature, ValueError):
            raise DiffoptError(
                f"{archive.path}: its signature by {path} does not belong to its content: it was"
                " changed since it was signed"
            ) from None
        return
    how = "is signed by other keys" if signatures else "is not signed"
    raise DiffoptError(f"{archive.path}: {how}, and not by {', '.join(keys)}")


def _key(path: str | os.PathLike[str], load: Any, kind: str) -> Any:
    """Return the key in a PEM file."""
    try:
        key = load(Path(path).read_bytes())
    except OSError as error:
        raise DiffoptError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, _cryptography("exceptions").UnsupportedAlgorithm):
        key = None
    name = f"Ed25519{kind.capitalize()}Key"
    ed25519 = _cryptography("hazmat.primitives.asymmetric.ed25519")
    if not isinstance(key, getattr(ed25519, name)):
        raise DiffoptError(
            f"{os.fspath(path)}: no {kind} Ed25519 key in PEM format, without a password; make one"
            " with `openssl genpkey -algorithm ed25519`"
        )
    return key


def _raw(key: Any) -> str:
    return _encoded(key.public_bytes_raw())


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _message(archive: container.Archive) -> bytes:
    return _PURPOSE + archive.kind.encode() + b"\0" + archive.manifest_text


def _signatures(archive: container.Archive) -> dict[str, str]:
    """Return the signatures of a file, by key; none where what it has is not one."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(archive.comment or b"{}").get("signatures")
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, str)}
