"""The house keeps its order: imports go one way between its floors, and a class has one name."""

import ast
import importlib
import runpy
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (("kernels", "networks", "domains", "regions", "relaxations", "data", "output"), ("layers",))
FLOORS += (("certification", "training", "measurements"), ("papers",), ("cli",))
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# They hand names on, from where files lay before too, or start the command line.
FACES = ("optrelax", "optrelax.__main__", "optrelax.checkpoint_files", "optrelax.journals", "optrelax.verdicts")


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module's name and syntax tree."""
    for folder, prefix in (("optrelax", "optrelax"), ("layers", "optrelax.layers")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((prefix, *(part for part in parts if part != "__init__")))
            yield name, ast.parse(path.read_text())


def height(module: str) -> int:
    """The floor of a module's room; the files beside the rooms lie on the ground."""
    parts = module.split(".")
    return HEIGHT.get(parts[1], 0) if len(parts) > 1 else 0


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """Modules that are imported as a module is: not those for types, nor those in functions."""
    for statement in body:
        if isinstance(statement, ast.ImportFrom) and statement.module is not None:
            for alias in statement.names:
                yield f"{statement.module}.{alias.name}" if statement.module == "optrelax" else statement.module
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)


def test_imports_go_down():
    upward = [
        f"{name} imports {other}"
        for name, tree in sources()
        for other in imported(tree.body)
        if name not in FACES and other.startswith("optrelax.") and height(other) > height(name)
    ]
    assert not upward


def test_a_class_has_a_name_of_its_own():
    found = defaultdict(list)
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


@pytest.mark.parametrize("old", ["checkpoint_files", "journals", "verdicts"])
def test_scripts_find_the_old_places(old):
    room = "networks" if old == "checkpoint_files" else "certification"
    here, there = (importlib.import_module(f"optrelax.{place}") for place in (old, f"{room}.{old}"))
    names = {"checkpoint_files": ["read_network"], "journals": ["Journal"], "verdicts": ["Example", "Verdict"]}[old]
    assert all(getattr(here, name) is getattr(there, name) for name in names)


@pytest.mark.parametrize("room", sorted(HEIGHT))
def test_every_room_is_on_the_page(room):
    assert f"`{room}/`" in (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("name", ["fc", "conv"])
def test_a_bound_is_few_calls_deep_and_enters_a_room_few_times(name):
    tool = runpy.run_path(str(ROOT / "docs" / "tools" / "call_depth.py"))
    calls = tool["crown"](name)
    assert 10 < len(calls) < 30
    assert max(Counter(tool["rooms"](calls)).values()) <= 3
