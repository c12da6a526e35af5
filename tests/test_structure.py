"""The house keeps its order: imports point downwards and never in a circle, and files stay readable."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gatewise"
ROOMS = [
    "cli",
    "app",
    "demo",
    "claims",
    "tasks",
    "data",
    "methods",
    "efficiency",
    "gates",
    "integrations",
    "fidelity",
    "networks",
    "layers",
    "ops",
    "catalog",
    "recipes",
    "files",
    "errors",
]
"""From the top of the house to its ground."""

LONGEST_FILE = 450


def module_of(path: Path) -> str:
    parts = ("gatewise", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imported(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, within functions too, but for type checking only."""
    found = set()
    stack: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        stack += ast.iter_child_nodes(node)
    return frozenset(found & MODULES.keys() - {module})


def room_of(module: str) -> str | None:
    return module.split(".")[1] if "." in module else None


def test_every_room_has_its_place():
    assert {room_of(module) for module in MODULES} - {None, "__main__"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_no_room_above_it(room):
    above = set(ROOMS[: ROOMS.index(room)])
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        if room_of(module) == room
        for other in imported(module)
        if room_of(other) in above
    ]
    assert not upward


def test_no_module_leads_back_to_itself():
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imported(module)):
                follow(other, [*path, module])
            done.add(module)

    for module in MODULES:
        follow(module, [])


def test_no_file_is_too_long_to_read():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_private_file_stands_loose_beside_drawers():
    """A file with an underscore serves its own folder; outside that folder nobody imports it, but for its base."""
    foreign = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imported(module)
        if other.rsplit(".", 1)[-1].startswith("_")
        and other.rsplit(".", 1)[-1] != "_base"
        and not module.startswith(other.rsplit(".", 1)[0])
    ]
    assert not foreign
