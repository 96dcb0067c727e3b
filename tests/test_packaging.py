"""What is installed is what is in the checkout."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("diffopt", "passes", "targets")


def folder_of(package: str) -> str:
    """Return where a package is: below its parent's folder, if it has none of its own."""
    known: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
    return known.get(package, package.replace(".", "/"))


def test_listed_packages_are_the_folders_with_an_init() -> None:
    # A package that is missing from the list is left out of the wheel without a warning.
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {
        str(init.parent.relative_to(ROOT)).replace("/", ".")
        for top in TOP
        for init in (ROOT / top).rglob("__init__.py")
        if "diffopt/passes" not in init.as_posix() and "diffopt/targets" not in init.as_posix()
    }
    assert {folder_of(package).replace("/", ".") for package in setuptools["packages"]} == folders


def test_links_lead_to_the_folders() -> None:
    for name in ("passes", "targets"):
        link = ROOT / "diffopt" / name
        if not link.is_symlink():
            pytest.skip("this checkout has no symbolic links")
        assert link.resolve() == ROOT / name


def test_the_wheel_has_every_module(tmp_path: Path) -> None:
    (needed,) = map(Requirement, PROJECT["build-system"]["requires"])
    installed = [package.version for package in metadata.distributions(name=needed.name)]
    if not any(version in needed.specifier for version in installed):
        pytest.skip(f"{needed} is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", *TOP[1:])
    shutil.copytree(ROOT / "diffopt", source / "diffopt", ignore=ignore)
    for name in TOP[1:]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "diffopt = diffopt.cli.main:main" in archive.read(entries).decode()
    ours = {
        f"{package.replace('.', '/')}/{path.name}"
        for package in PROJECT["tool"]["setuptools"]["packages"]
        for path in (ROOT / folder_of(package)).glob("*.py")
    }
    data = {"diffopt/py.typed", "diffopt/serving/page.html", "diffopt/targets/devices.toml"}
    assert names == ours | data


def test_the_torch_that_make_installs_is_one_that_the_package_allows() -> None:
    (line,) = [text for text in PROJECT["project"]["dependencies"] if text.startswith("torch")]
    (pin,) = re.findall(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert Version(pin) in Requirement(line).specifier
