"""The package as it is published: what the distributions hold, and what an installation does that sees no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HOME = "https://github.com/tldr-compile/tldr-compile"
FILES = (f"{HOME}/blob/main/", "https://raw.githubusercontent.com/tldr-compile/tldr-compile/main/")
VERSION = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[0]
INFO = f"tldr_compile-{VERSION}.dist-info"
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")

WHEEL = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-index")
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"

DEMO = """
from tldr_compile.cli import run
run.video.sample_video()
"""

UNINSTALLED = """
import tldr_compile, torch
print(tldr_compile.__version__, "tldr" in torch._dynamo.list_backends(exclude_tags=None))
"""

INSTALLED = """
import sys
from pathlib import Path

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.qkv = nn.Conv3d(3, 32, (2, 8, 8), (2, 8, 8)), nn.Linear(32, 96)

    def forward(self, clip):
        x = self.patches(clip).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (x + x.tanh()).mean(1)


model, clip = Block().eval(), torch.randn(1, 3, 4, 32, 32)
assert "tldr_compile" not in sys.modules
torch.compile(model, backend="tldr")  # a name that nobody registered is refused here
assert "tldr_compile" in sys.modules

import tldr_compile

with torch.no_grad():
    merged = tldr_compile.apply(model, (clip,), schedule=[8])
    assert merged(clip).shape == model(clip).shape
    assert not torch.allclose(merged(clip), model(clip))
print(tldr_compile.__version__)
print(Path(tldr_compile.__file__).parent)
"""


class Built(NamedTuple):
    """The checkout as it was copied, and what was built of it."""

    source: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built of a copy: what a build leaves in the checkout would be part of the next one."""
    folder = tmp_path_factory.mktemp("built")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=IGNORED)
    said(sys.executable, *WHEEL, "--wheel-dir", folder, source, cwd=folder)
    said(sys.executable, "-c", SDIST, folder, cwd=source)
    shutil.rmtree(source / "tldr_compile.egg-info")  # what an installation knows, and a fresh checkout does not
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(source, sdist, wheel)


def called(*command: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """A command that sees no checkout but that of `path`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def said(*command: str | Path, cwd: Path, path: str = "") -> str:
    """What a command prints, which has to succeed."""
    done = called(*command, cwd=cwd, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """The `bin` of an environment that sees what the wheel asks for, with one extra, but not the wheel."""
    links = folder / "links"
    links.mkdir()
    for each in needed(described(wheel).get_all("Requires-Dist", []), {"", extra}).values():
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            if not (links / top).exists():  # some share a folder, as those of CUDA do
                (links / top).symlink_to(Path(str(each.locate_file(top))).resolve())
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "links.pth").write_text(str(links))
    return folder / "venv" / "bin"


def needed(requirements: list[str], extras: set[str]) -> dict[str, metadata.Distribution]:
    """The distributions that these requirements are met by here, and those that they need in turn."""
    found: dict[str, metadata.Distribution] = {}
    for each in map(Requirement, requirements):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            found[each.name] = metadata.distribution(each.name)
            found |= needed(found[each.name].requires or [], {"", *each.extras})
    return found


def package(source: Path) -> set[str]:
    """All files of the package in a checkout, those behind the link to its passes too."""
    walked = os.walk(source / "tldr_compile", followlinks=True)
    return {(Path(folder) / name).relative_to(source).as_posix() for folder, _, names in walked for name in names}


def contents(wheel: Path) -> dict[str, int]:
    """The files of a wheel, and a checksum of each."""
    with zipfile.ZipFile(wheel) as archive:
        return {each.filename: each.CRC for each in archive.infolist()}


def described(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"{INFO}/METADATA").decode())


def test_the_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    files = set(contents(built.wheel))
    data = {"tldr_compile/py.typed", "tldr_compile/ops/attention.cpp", "tldr_compile/ops/operators.cpp"}
    assert data | {"tldr_compile/passes/plan/choice.py"} <= files
    assert {name.split("/")[0] for name in files} == {"tldr_compile", INFO}
    assert {name for name in files if name.startswith("tldr_compile/")} == package(built.source)
    assert f"{INFO}/licenses/LICENSE" in files


def test_the_source_distribution_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert all(each.isfile() or each.isdir() for each in members), "links do not survive everywhere"
    names = {each.name.partition("/")[2] for each in members if each.isfile()}
    beside = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if not name.startswith("tldr_compile.egg-info/")} == package(built.source) | beside
    said(sys.executable, *WHEEL, "--wheel-dir", tmp_path, built.sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert contents(wheel) == contents(built.wheel)


def test_a_page_of_an_index_leads_everywhere(built: Built) -> None:
    """The page is README.md, shown where there are no files beside it."""
    about = described(built.wheel)
    page = str(about.get_payload())
    targets = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r"^\[[^\]]+\]: (\S+)$", page, re.MULTILINE)
    assert not [each for each in targets if not each.startswith("https://")], "write absolute addresses in README.md"
    named = re.findall(r"\[([^\[\]\s]+\.(?:md|py|png))\](?![(:])", page)
    assert not [name for name in named if f"\n[{name}]: {HOME}" not in page], "give the address at the end of README.md"
    paths = [each.removeprefix(start) for each in targets for start in FILES if each.startswith(start)]
    assert "docs/demo.png" in paths
    assert not [path for path in paths if not (ROOT / path).is_file()]
    urls = dict(each.split(", ") for each in about.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Repository", "Documentation", "Issues", "Changelog"}
    assert all(each.startswith(HOME) for each in urls.values())


def test_a_checkout_that_is_not_installed(built: Built, tmp_path: Path) -> None:
    python = environment(tmp_path, built.wheel) / "python"
    assert said(python, "-c", UNINSTALLED, cwd=tmp_path, path=str(built.source)).split() == ["0+unknown", "True"]


def test_the_extra_is_all_that_the_command_imports(built: Built, tmp_path: Path) -> None:
    python = environment(tmp_path, built.wheel, "demo") / "python"
    said(python, "-c", DEMO, cwd=tmp_path, path=str(built.source))


def test_an_installation_that_sees_no_checkout(built: Built, tmp_path: Path) -> None:
    bin_ = environment(tmp_path, built.wheel)
    said(bin_ / "python", "-m", "ensurepip", cwd=tmp_path)
    said(bin_ / "python", *INSTALL, built.wheel, cwd=tmp_path)
    version, place = said(bin_ / "python", "-c", INSTALLED, cwd=tmp_path).splitlines()
    assert version == VERSION
    assert Path(place).is_relative_to(bin_.parent)
    done = called(bin_ / "tldr", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(r"tldr: OptionError: .* needs the package '\w+': pip install 'tldr-compile\[demo\]'", done.stderr)
