"""The shape of the code: which room may import which, and documents that are drawn from the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "batchrun"

WORDS = {"model", "errors", "progress", "settings"}
RULES = WORDS | {"rules"}
#: What each room may import besides itself (docs/architecture.md).
ALLOWED = {
    "model": set(),
    "errors": {"model"},
    "settings": {"errors"},
    "progress": {"model"},
    "rules": {"model", "errors"},
    "tools": RULES,
    "wiro": RULES | {"__init__"},
    "outputs": RULES,
    "manifest": RULES | {"tools"},
    "store": RULES,
    "plan": RULES | {"tools", "manifest", "outputs", "store"},
    "dispatch": RULES | {"tools", "manifest", "outputs", "store"},
    "runner": RULES | {"tools", "manifest", "outputs", "store", "plan", "dispatch", "wiro"},
    "repair": RULES | {"tools", "manifest", "outputs", "store", "plan"},
    "simulator": {"model", "errors", "tools", "__init__"},
}


def room(path: Path) -> str:
    """The room a file belongs to: its folder in the package, or its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """The rooms a file imports, type-checking imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "batchrun":
            names = node.module.split(".")[1:] or [alias.name for alias in node.names]
            known = {entry.stem for entry in PACKAGE.iterdir()}
            found.add(names[0] if names[0] in known else "__init__")
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("batchrun.")}
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_arrows_point_upwards_only(path: Path) -> None:
    here = room(path)
    if here in ALLOWED:
        assert imports(path) - {here} <= ALLOWED[here]


def test_sql_is_spoken_in_one_room() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room(path) != "store":
            text = path.read_text(encoding="utf-8")
            assert ".execute(" not in text, path


def test_rules_are_pure() -> None:
    for path in (PACKAGE / "rules").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        assert not names & {"time", "os", "asyncio", "anyio", "pathlib", "sqlite3"}, path
        assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree)), path


def test_the_state_diagram_is_drawn_from_the_table() -> None:
    from docs.states import diagram

    assert (ROOT / "docs" / "states.md").read_text(encoding="utf-8") == diagram() + "\n"


def test_every_test_that_the_promises_name_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = 0
    for line in text.splitlines():
        file = ""
        for name in re.findall(r"`([^`]*)`", line):
            if match := re.fullmatch(r"([a-z_/]+\.py)?(?:::(test_\w+))?", name):
                file = match[1] or file
                source = (ROOT / "tests" / file).read_text(encoding="utf-8")
                assert match[2] is None or f"def {match[2]}(" in source, f"{file}::{match[2]}"
                named += 1
    assert named > 60
