"""Imports run one way, files stay readable, and nothing of this machine is in the repository."""

import ast
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOMS = ["data", "engine", "stage1_tokenizer", "stage2_prior", "sampling", "evaluation"]
# What each room may import besides itself. Data borrows nothing, engine nothing; the command line sits on top.
ALLOWED = {
    "data": set(),
    "engine": set(),
    "stage1_tokenizer": {"data", "engine"},
    "stage2_prior": {"data", "engine", "stage1_tokenizer"},
    "sampling": {"data", "engine", "stage1_tokenizer", "stage2_prior"},
    "evaluation": {"data", "engine", "stage1_tokenizer", "stage2_prior", "sampling"},
}
SOURCES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]

EVERYTHING = [
    path for room in [*ROOMS, "tests", "docs", "examples"] for path in sorted((REPOSITORY / room).rglob("*.py"))
]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0]
    if path == REPOSITORY / "engine" / "cli.py" or path.parent == REPOSITORY / "engine" / "commands":
        return
    assert imported_rooms(path) - {room} <= ALLOWED[room]
    assert "engine.commands" not in path.read_text(), "nothing imports the command line"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_of_this_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ""} and path.is_file():
            text = path.read_text()
            for trace in ("/" + "work/", "/" + "root/", "files.python" + "hosted"):
                assert trace not in text, f"{name} names a path or host of this machine: {trace}"
