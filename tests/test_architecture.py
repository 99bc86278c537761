"""Imports go down the stairs and never in a circle, files stay readable, and nothing of this machine is committed."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY

# From the ground to the roof: a room may import those before it.
ROOMS = ["engine", "data", "stage1_tokenizer", "stage2_prior", "sampling", "evaluation", "cli"]
SOURCES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
EVERYTHING = [
    *(REPOSITORY / name for name in ("__init__.py", "__main__.py")),
    *(path for room in [*ROOMS, "tests", "docs", "examples"] for path in sorted((REPOSITORY / room).rglob("*.py"))),
]


def module_name(path: Path) -> str:
    """``data/stream.py`` -> ``scq.data.stream``; a folder's ``__init__.py`` -> the folder's."""
    return ".".join(["scq", *path.relative_to(REPOSITORY).with_suffix("").parts]).removesuffix(".__init__")


def imported_modules(source: str) -> Iterator[str]:
    """Every module that a source names in an import, wherever it stands; of ``from a import b`` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute: from scq.room.module import name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward_imports(name: str, source: str) -> list[str]:
    """The imports of module ``name`` that lead to a higher room, to scq's front door, or by a room's bare name."""
    allowed = ROOMS[: ROOMS.index(name.split(".")[1]) + 1]

    def wrong(imported: str) -> bool:
        first, _, rest = imported.partition(".")
        return first in ROOMS or (first == "scq" and rest.split(".")[0] not in allowed)

    return [imported for imported in imported_modules(source) if wrong(imported)]


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    return {name: {each for each in imported_modules(source) if each in sources} for name, source in sources.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for each in graph[waiting.pop()] - seen:
                seen.add(each)
                waiting.append(each)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_down(path: Path) -> None:
    assert upward_imports(module_name(path), path.read_text()) == []


def test_no_modules_import_each_other() -> None:
    graph = import_graph({module_name(path): path.read_text() for path in SOURCES})
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("scq.engine.loop", "from scq.data.stream import Batch", ["scq.data.stream", "scq.data.stream.Batch"]),
        ("scq.data.pack", "def late():\n    import scq.stage1_tokenizer.solver", ["scq.stage1_tokenizer.solver"]),
        ("scq.sampling.pipeline", "from scq.cli import main", ["scq.cli", "scq.cli.main"]),
        ("scq.evaluation.evaluate", "from scq import SoftConvexPipeline", ["scq", "scq.SoftConvexPipeline"]),
        ("scq.evaluation.evaluate", "from data.stream import Batch", ["data.stream", "data.stream.Batch"]),
        ("scq.cli.main", "from scq.engine.errors import UserError", []),
        ("scq.data.pack", "from scq.engine.files import atomic_write\nimport torch", []),
    ],
)
def test_an_import_that_goes_up_is_found(name: str, source: str, found: list[str]) -> None:
    assert upward_imports(name, source) == found


def test_a_circle_is_found() -> None:
    sources = {
        "scq.data.a": "from scq.data import b",
        "scq.data.b": "from scq.data.c import name",
        "scq.data.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import scq.data.a",
        "scq.data.d": "import scq.data.a",
    }
    assert circles(import_graph(sources)) == [["scq.data.a", "scq.data.b", "scq.data.c"]]


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_nothing_of_this_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".cff", ""} and path.is_file():
            text = path.read_text()
            for trace in ("/" + "work/", "/" + "root/", "files.python" + "hosted"):
                assert trace not in text, f"{name} names a path or host of this machine: {trace}"


@pytest.mark.parametrize(("way", "most"), [("The way of an image", 12), ("The way of a step of the prior", 5)])
def test_the_ways_through_the_house_are_short_and_named_rightly(way: str, most: int) -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    (section,) = (part for part in page.split("\n## ") if part.startswith(way))
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.M)
    assert 3 < len(files) <= most
    assert all((REPOSITORY / file).is_file() for file in files)
