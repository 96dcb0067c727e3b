"""The container of every file: a zip of stored members with checksums, written atomically.

Members are stored at offsets that are a multiple of 64, so that mapped weights can be used without
a copy. The first member is the file's media type, by which a truncated file is told from another;
`manifest.json` comes last and has the SHA-256 of every other member's content.

On request, members that shrink are compressed with zstandard: NAME is then in the zip as NAME.zst,
and the manifest has the compressed size as "zstd". Reading such a member decompresses it in memory.

Who opens a file may not have written it. What a file says of itself is checked before it is
believed: sizes against the file's own, names as paths, JSON by `file_schema`, headers of tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import platform
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import zstandard
from torch import Tensor

from diffopt.errors import DiffoptError, first_line, printable
from diffopt.storage import file_schema
from diffopt.storage.temporary import replacing

KIND = "mimetype"
MANIFEST = "manifest.json"
ALIGNMENT = 64
LEVELS = range(1, 23)  # of zstandard
_SUFFIX = ".zst"
_MAX_RATIO = 0.95  # a member that compresses to more than this part of its size is stored
# A large one that compresses to less is stored, too: what is read of a file takes at most so much
# memory, as a multiple of its size, and besides.
_MOST_TIMES, _MOST_BESIDES = 1024, 1 << 28

Buffers = Sequence[bytes | memoryview]

# The names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# The format has no complex128: such a tensor is stored as its real and imaginary parts, an axis of
# two, and named in the metadata.
_COMPLEX = "complex128"


def write(
    path: str | os.PathLike[str],
    kind: str,
    manifest: Mapping[str, Any],
    members: Mapping[str, Buffers],
    compress: int | None = None,
) -> None:
    """Write a container to `path`, atomically.

    Args:
        path: The file.
        kind: The file's media type.
        manifest: JSON, to which the table of members with sizes and checksums is added.
        members: The contents of members, in pieces that are not copied.
        compress: The level, from 1 to 22, at which members that shrink are compressed; None: none.
    """
    if compress is not None and compress not in LEVELS:
        raise DiffoptError(f"compress={compress}: wants a level from 1 (fast) to 22 (small)")
    table: dict[str, dict[str, Any]] = {}
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, KIND, [kind.encode()])
        for name, buffers in members.items():
            table[name] = {"size": sum(map(len, buffers)), "sha256": _digest(buffers)}
            frame = None if compress is None else _compressed(buffers, compress)
            if frame is None:
                _add(archive, file, name, buffers)
            else:
                table[name]["zstd"] = len(frame)
                _add(archive, file, name + _SUFFIX, [frame])
        text = json.dumps({**manifest, "members": table}, indent=1)
        _add(archive, file, MANIFEST, [text.encode()])


def _digest(buffers: Buffers) -> str:
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _compressed(buffers: Buffers, level: int) -> bytes | None:
    """Return a member as a zstandard frame; None if that is hardly smaller."""
    size = sum(map(len, buffers))
    compressor = zstandard.ZstdCompressor(level).compressobj(size)
    frame = b"".join([*map(compressor.compress, buffers), compressor.flush()])
    is_small = size <= 1 << 20 or size <= _MOST_TIMES * len(frame)
    return frame if is_small and len(frame) <= _MAX_RATIO * size else None


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, buffers: Buffers) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = sum(map(len, buffers))
    large = info.file_size >= 1 << 31  # zipfile then writes a field of 20 more bytes
    start = file.tell() + 30 + len(name.encode()) + 4 + 20 * large
    padding = -start % ALIGNMENT
    info.extra = b"\x35\xd9" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as member:
        for buffer in buffers:
            member.write(buffer)


class Archive:
    """An open container, mapped into memory.

    Attributes:
        path: The file.
        kind: Its media type.
        manifest: The content of `manifest.json`.
        manifest_text: The same, as it is in the file.
        comment: What the zip has as its comment; see `signatures`.
    """

    manifest_text: bytes
    comment: bytes

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str,
        noun: str,
        hint: str,
        remedy: str = "build it again",
    ) -> None:
        """Open the file at `path`; a missing, damaged or other file is a `DiffoptError`.

        Args:
            path: The file.
            kind: The media type that it must have.
            noun: What messages call such a file, as "an engine file".
            hint: What to do about a file of another kind.
            remedy: What to do about a damaged one of which there is no intact copy.
        """
        self.path, self.kind = Path(path), kind
        self._written = _state(self.path)
        self._remedy = f"copy it again, or {remedy}"
        other = f"{path}: not {noun}; {hint}"
        try:
            with open(path, "rb") as file:
                head = file.read(512)
                self._map = mapped(file.fileno()) if head else None
        except FileNotFoundError:
            raise DiffoptError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise DiffoptError(f"{path}: is a directory, not {noun}") from None
        except OSError as error:
            raise DiffoptError(f"{path}: cannot be read: {error.strerror}") from None
        if self._map is None or head[:4] != b"PK\x03\x04":
            raise DiffoptError(other)
        self._spans = self._index(head, kind, other)
        self.manifest = self._read_manifest()
        self._contents: dict[str, memoryview] = {}
        for name, entry in self.manifest["members"].items():
            if "zstd" in entry and name + _SUFFIX in self._spans:
                self._spans[name] = self._spans.pop(name + _SUFFIX)
            stored = entry.get("zstd", entry["size"])
            if self._spans.get(name, (0, stored))[1] != stored:
                raise self.damaged(f"member {name}")

    def _index(self, head: bytes, kind: str, other: str) -> dict[str, tuple[int, int]]:
        """Return the offset and size of each member; `other` is the message of a wrong kind."""
        is_kind = KIND.encode() in head[:64] and kind.encode() in head[:256]
        assert self._map is not None
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos, self.comment = archive.infolist(), archive.comment
        except _UNREADABLE:
            if not is_kind:
                raise DiffoptError(other) from None
            end = self._map.rfind(b"PK\x05\x06", max(0, len(self._map) - 4096))
            if end < 0 or end + 22 > len(self._map):  # no complete end-of-directory record
                raise DiffoptError(
                    f"{self.path}: truncated, only {len(self._map)} bytes of it are here;"
                    f" {self._remedy}"
                ) from None
            raise self.damaged("its table of members") from None
        if not is_kind and MANIFEST not in {info.filename for info in infos}:
            raise DiffoptError(other)
        spans = {}
        for info in infos:
            at = info.header_offset
            lengths = self._map[at + 26 : at + 30]
            start = at + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            is_known = _is_path(info.filename) and info.filename not in spans
            if not is_known or info.compress_type or start + info.file_size > len(self._map):
                raise self.damaged(f"member {info.filename}")
            spans[info.filename] = start, info.file_size
        if bytes(self._slice(spans.get(KIND, (0, 0)))) != kind.encode():
            raise DiffoptError(other)
        return spans

    def _read_manifest(self) -> dict[str, Any]:
        if MANIFEST not in self._spans:
            raise self.damaged(f"member {MANIFEST}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                text = self.manifest_text = archive.read(MANIFEST)  # zipfile checks its CRC-32
        except _UNREADABLE:
            raise self.damaged(f"member {MANIFEST}") from None
        with self.making(f"member {MANIFEST}"):
            manifest: dict[str, Any] = file_schema.parse(text, file_schema.Container)
            for name in manifest["members"]:
                if not _is_path(name):
                    raise ValueError(f"{name!r} is no member's name")
            total = sum(entry["size"] for entry in manifest["members"].values())
            if total > _MOST_TIMES * len(self._map) + _MOST_BESIDES:  # type: ignore[arg-type]
                raise ValueError(f"{total} bytes are said to be in {len(self._map)}")  # type: ignore[arg-type]
        return manifest

    def damaged(self, part: str) -> DiffoptError:
        """Return the error for a damaged part of the file."""
        return DiffoptError(f"{self.path}: {printable(part)} is damaged; {self._remedy}")

    @contextlib.contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Turn what goes wrong when something is made of a part into one `DiffoptError`.

        The part is intact, so whoever wrote the file wrote something else than this library would.
        """
        try:
            yield
        except DiffoptError as error:
            if error.message.startswith(f"{self.path}: "):
                raise
            raise DiffoptError(f"{self.path}: {printable(error.message)}") from error
        except _MALFORMED as error:
            reason = first_line(error)[:200]
            if not isinstance(error, ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise DiffoptError(f"{self.path}: {part} is malformed ({reason})") from error

    def json(self, name: str, kind: Any) -> Any:
        """Return a member that is JSON of a kind of `file_schema`."""
        with self.making(f"member {name}"):
            return file_schema.parse(self.read(name), kind)

    def verify(self) -> None:
        """Raise a `DiffoptError` for a member that differs from its checksum."""
        table = self.manifest["members"]
        for name in sorted(table.keys() ^ (self._spans.keys() - {KIND, MANIFEST})):
            raise self.damaged(f"member {name}")
        for name, entry in table.items():
            if hashlib.sha256(self.read(name)).hexdigest() != entry["sha256"]:
                raise self.damaged(f"member {name}")

    def expect_unchanged(self) -> None:
        """Raise a `DiffoptError` where the file was written to since it was opened.

        Its memory is the file's, in which another content would be read as this one. A file that
        has taken its place, or that was removed, is of no concern.
        """
        state = _state(self.path)
        if state == self._written or state is None or self._written is None:
            return
        if state[0] == self._written[0]:
            raise DiffoptError(
                f"{self.path}: was written to while it is loaded; load it again, and replace files"
                " instead of writing to them"
            )
        self._written = None  # the file that is mapped has no name any more

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the members that begin with `prefix`."""
        return [name for name in self._spans if name.startswith(prefix)]

    def read(self, name: str) -> memoryview:
        """Return a member's content, mapped copy-on-write if it is not compressed."""
        if name not in self._spans:
            raise self.damaged(f"member {name}")
        entry = self.manifest["members"].get(name, {})
        if "zstd" not in entry:
            return self._slice(self._spans[name])
        if name not in self._contents:
            frame = self._slice(self._spans[name])
            try:
                self._contents[name] = _decompress(frame, entry["size"])
            except (zstandard.ZstdError, EOFError):
                raise self.damaged(f"member {name}") from None
        return self._contents[name]

    def _slice(self, span: tuple[int, int]) -> memoryview:
        assert self._map is not None
        return memoryview(self._map)[span[0] : span[0] + span[1]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a safetensors member, mapped."""
        with self.making(f"member {name}"):
            return _unpacked(self.read(name))


# What zipfile raises for files that are no zip, or use what this library does not.
_UNREADABLE = (
    *(zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, EOFError),
    *(struct.error, LookupError, UnicodeError),
)
# What is raised where content is of another structure than the code that reads it relies on.
_MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(AssertionError, MemoryError),
)


def _state(path: Path) -> tuple[tuple[int, int], int, int] | None:
    """Return which file a path is, its size, and when it was written; None for none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns


def _is_path(name: str) -> bool:
    """Tell whether a member's name is a path within a folder, on any system."""
    parts = name.split("/")
    is_plain = name == printable(name) and not set(name) & set('\\:*?"<>|')
    return is_plain and not any(part in ("", ".", "..") for part in parts)


def _unpacked(content: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which share its memory."""
    length = 8 + int.from_bytes(content[:8], "little")
    if len(content) < length:
        raise ValueError("its header is longer than it is")
    header: dict[str, Any] = file_schema.parse(content[8:length], dict[str, Any])
    about = file_schema.checked(header.pop("__metadata__", {}), dict[str, str])
    complexes = file_schema.checked(json.loads(about.get(_COMPLEX, "[]")), list[str])
    dtypes = {text: dtype for dtype, text in _DTYPES.items()}
    result = {}
    for key, entry in file_schema.checked(header, dict[str, file_schema.StoredTensor]).items():
        start, end = entry["data_offsets"]
        dtype, shape = dtypes[entry["dtype"]], entry["shape"]
        size = math.prod(shape) * dtype.itemsize
        if end - start != size or length + end > len(content):
            raise ValueError(f"{key!r} has {end - start} bytes for the shape {shape}")
        flat = torch.empty(0, dtype=dtype)
        if size:
            flat = torch.frombuffer(content[length + start : length + end], dtype=dtype)
        tensor = flat.view(shape)
        result[key] = torch.view_as_complex(tensor) if key in complexes else tensor
    return result


def mapped(descriptor: int) -> mmap.mmap:
    """Map an open file, so that what is changed stays in this process.

    No memory is reserved for changes: else Linux refuses files larger than its memory.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # which Python has from 3.13 on
    both = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=both)


def _decompress(content: memoryview, size: int) -> memoryview:
    """Return the `size` bytes of a zstandard frame's content; an `EOFError` if there are others."""
    memory = memoryview(mmap.mmap(-1, size)) if size else memoryview(b"")  # aligned, unlike bytes
    done = 0
    with zstandard.ZstdDecompressor().stream_reader(content) as reader:
        while done < size and (count := reader.readinto(memory[done:])):
            done += count
        if done < size or reader.read(1):
            raise EOFError
    return memory


def pack_tensors(tensors: Mapping[str, Tensor]) -> Buffers:
    """Return tensors in safetensors format, in pieces that share their memory where possible.

    Tensors whose size is a multiple of the alignment come first, so that nearly all are aligned.
    """
    complexes = sorted(n for n, t in tensors.items() if t.dtype == torch.complex128)
    tensors = {
        name: torch.view_as_real(t.resolve_conj()) if name in complexes else t
        for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise DiffoptError(f"{name} is {dtype}, which the safetensors format has no name for")
    buffers = {name: raw_bytes(tensor) for name, tensor in tensors.items()}
    order = sorted(
        tensors, key=lambda n: (len(buffers[n]) % ALIGNMENT > 0, -tensors[n].element_size(), n)
    )
    header: dict[str, Any] = (
        {"__metadata__": {_COMPLEX: json.dumps(complexes)}} if complexes else {}
    )
    end = 0
    for name in order:
        start, end = end, end + len(buffers[name])
        shape, dtype = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *(buffers[name] for name in order)]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory as bytes; of others a copy in row-major order."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    # One element may have any stride, and be contiguous all the same.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data
