"""The rooms of `passes/`: imports run one way, and nothing above them is known there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tldr_compile import passes

ROOT = Path(passes.__file__).parent
PASSES = "tldr_compile.passes"
# Each may import those before it, and what is in its own row only within itself.
ORDER = (
    {"errors", "sizes", "fx_utils", "sources"},
    {"refusal"},
    {"capture"},
    {"axes"},
    {"sites"},
    {"plan"},
    {"options", "operators", "show"},
    {"emit", "check"},
    {""},  # passes/__init__.py
)
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported(path: Path) -> Iterator[str]:
    """The rooms and modules of ours that a file imports; anything else of ours in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [each.name for each in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            if name.startswith("tldr_compile"):
                yield name.removeprefix(PASSES + ".").split(".")[0] if name.startswith(PASSES + ".") else name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    for name in imported(path):
        assert name in FLOOR, f"{name} is no room below"
        assert name == here or FLOOR[name] < FLOOR[here]


@pytest.mark.parametrize("name", sorted(name for name in FLOOR if (ROOT / name / "__init__.py").exists() and name))
def test_a_room_says_what_it_is(name: str) -> None:
    told = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
    assert all(word in told for word in ("In:", "Out:", "Nothing")), told
