"""What processes that were killed have left is removed by the next one that does the same."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from diffopt.storage import temporary

WRITE = """
import sys, time
from diffopt.storage import temporary
with temporary.replacing(sys.argv[1]) as file, temporary.work_folder() as folder:
    file.write(b"half")
    file.flush()
    print(folder, flush=True)
    time.sleep(60)
"""


def begun(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that writes a file; return it, and the folder that it works in."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def end(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()


@pytest.mark.skipif(temporary.fcntl is None, reason="needs locks of files")
def test_what_a_killed_process_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    file = tmp_path / "x.engine"
    dead, folder = begun(file)
    end(dead)
    living, folder_in_use = begun(file)
    try:
        assert len(list(tmp_path.glob(".x.engine.*"))) == 2
        time.sleep(1.1)
        with temporary.replacing(file) as new, temporary.work_folder() as own:
            new.write(b"whole")
            assert Path(own).is_dir()
        assert file.read_bytes() == b"whole"
        # The other's are there still.
        assert len(list(tmp_path.glob(".x.engine.*"))) == 1
        assert not folder.exists()
        assert folder_in_use.is_dir()
    finally:
        end(living)


def fail(path: Path) -> None:
    with temporary.replacing(path) as new:
        new.write(b"half")
        raise ZeroDivisionError


def test_a_failure_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        fail(file)
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x"]


def test_files_of_other_names_are_left(tmp_path: Path) -> None:
    other = tmp_path / ".x.engine2.abcdefgh"
    longer = tmp_path / ".x.engine.abcdefgh.txt"
    for path in (other, longer):
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    with temporary.replacing(tmp_path / "x.engine") as new:
        new.write(b"1")
    assert other.exists()
    assert longer.exists()
