"""Files and folders that are there while something is made, and what killed processes left of them.

Each is locked by the process that makes it, so that a later one tells what nobody uses any more:
the system gives a lock back however a process ends.
"""

import contextlib
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where nothing can be removed while it is open
    fcntl = None  # type: ignore[assignment]

_PREFIX = "diffopt-"
_LOCK = "lock"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a new file that takes the place of `path` when all is written, or is removed.

    Such files of the same path that killed processes have left are removed first.
    """
    path = Path(path)
    prefix = f".{path.name}."
    for stale in path.parent.glob(f"{glob.escape(prefix)}????????"):
        if _is_stale(stale):
            with contextlib.suppress(OSError):
                stale.unlink()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as file:
        try:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def work_folder() -> Iterator[str]:
    """Yield a new folder for what is compiled; those of killed processes are removed first."""
    for stale in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        if _is_stale(stale):
            shutil.rmtree(stale.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX) as folder,
        open(Path(folder, _LOCK), "wb") as file,
    ):
        _lock(file)
        yield folder


def _lock(file: IO[bytes]) -> None:
    """Lock a file until it is closed, also by the end of the process."""
    if fcntl is not None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_stale(path: Path) -> bool:
    """Tell whether nobody has locked a file, nor is just about to."""
    try:
        with open(path, "rb") as file:
            age = time.time() - os.fstat(file.fileno()).st_mtime
            _lock(file)
            return fcntl is not None and age > 1
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
