"""A power cut loses nothing that was there: what any writer of the project renames into place is on disk by then."""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import REPOSITORY
from test_prior import stripes_config, train_prior, write_stripes
from test_refiner import tokenizer

from scq.data.pack import pack
from scq.engine import folders
from scq.engine.files import write_file
from scq.sampling.export import export_half
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.write_tokens import write_tokens
from scq.stage2_prior.transformer import MaskedTransformer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches how Linux's files are renamed")
ROOMS = ("engine", "data", "stage1_tokenizer", "stage2_prior", "sampling", "evaluation", "cli")


class Disk:
    """Watches what is synced and renamed, and remembers what a power cut could lose.

    A file or folder is safe if it was synced after it last changed. What is renamed must be safe, with everything in
    it; the folder that it is renamed into must be synced afterwards.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.synced: dict[int, tuple[int, int]] = {}  # inode -> when it last changed, and its size
        self.unsynced_folders: set[Path] = set()
        self.renamed: list[Path] = []
        self.lost: list[str] = []
        sync, exchange = os.fsync, folders._exchange
        for module, name in ((os, "rename"), (os, "replace")):
            monkeypatch.setattr(module, name, self._watched(getattr(module, name)))
        monkeypatch.setattr(os, "fsync", lambda descriptor: (sync(descriptor), self._sync(descriptor))[0])
        monkeypatch.setattr(folders, "_exchange", self._watched(exchange))

    def _sync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self.synced[found.st_ino] = found.st_mtime_ns, found.st_size
        self.unsynced_folders.discard(Path(f"/proc/self/fd/{descriptor}").readlink())

    def _watched(self, rename: Callable) -> Callable:
        def watched(one: Path, other: Path, *more: object, **options: object) -> object:
            for path in [Path(one), *Path(one).rglob("*")]:
                found = path.lstat()
                if self.synced.get(found.st_ino) != (found.st_mtime_ns, found.st_size):
                    self.lost.append(f"{path.name}, renamed to {other}")
            self.unsynced_folders.add(Path(other).resolve().parent)
            self.renamed.append(Path(other))
            return rename(one, other, *more, **options)

        return watched

    def assert_safe(self, *expected: str) -> None:
        """Nothing could be lost, and files or folders with these names were renamed into place."""
        assert not self.lost
        assert not self.unsynced_folders
        assert set(expected) <= {path.name for path in self.renamed}
        self.renamed.clear()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_the_watch_sees_what_could_be_lost(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "temporary").write_text("not synced")
    (tmp_path / "temporary").rename(tmp_path / "final")
    assert disk.lost == [f"temporary, renamed to {tmp_path / 'final'}"]
    assert disk.unsynced_folders == {tmp_path}


def test_shards_and_tokens(disk: Disk, tmp_path: Path) -> None:
    pack("twemoji", tmp_path / "new" / "shards", format="emoji", size=32, split="test", workers=0)
    disk.assert_safe("shard-000000.tar", "manifest.json")
    write_tokens(tokenizer(), tmp_path / "new" / "shards", tmp_path / "new" / "tokens")
    disk.assert_safe("tokens-0000-000000.npy", "tokens-0000-000000.keys.txt", "manifest.json")


def test_a_training_with_checkpoints_pictures_and_models(disk: Disk, tmp_path: Path) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    settings = ["training.steps=4", "training.checkpoint_every=2", "training.log_every=1", "training.images_every=2"]
    for steps in (4, 6):  # the second run goes on, and replaces what the first one exported
        train_prior(stripes_config(tokens, tmp_path / "new" / "run", *settings, f"training.steps={steps}"))
        disk.assert_safe(f"step_{steps:08d}", "config.yaml", "model", "curves.png")


def test_models(disk: Disk, tmp_path: Path) -> None:
    coder = tokenizer()
    pipeline = SoftConvexPipeline(coder, MaskedTransformer(32, coder.grid, width=16, depth=1, heads=2))
    for save in (pipeline.save_pretrained, lambda folder: export_half(pipeline, folder)):
        save(tmp_path / "new" / "model")
        disk.assert_safe("model")
        write_file(tmp_path / "new" / "model" / "notes.md", "mine")
    assert (tmp_path / "new" / "model" / "prior" / "config.json").is_file()


WRITING = frozenset(
    ["write_text", "write_bytes", "save", "savefig", "save_file", "save_files", "save_model", "save_pretrained"]
    + ["tofile", "savez"]
)
SAFE = frozenset(["atomic_write", "atomic_folder", "replaced_model"])


def test_nobody_writes_but_in_a_block_that_syncs() -> None:
    """Every call that writes a file is in a block of engine/files.py or engine/folders.py, or is given an open file."""
    for room in ROOMS:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            if path.parent.name != "engine" or path.name not in ("files.py", "folders.py"):
                tree = ast.parse(path.read_text())
                found = [call for call in _unsafe_writes(tree) if call.split("(")[0] not in _of_this_project(tree)]
                assert not found, f"{path}: {found} outside of {sorted(SAFE)}"


def test_the_search_finds_what_is_written_past_it() -> None:
    unsafe = "path.write_text('a')\nwith path.open('wb') as f: f.write(b'a')\ntorch.save(a, path)"
    assert len(_unsafe_writes(ast.parse(unsafe))) == 3
    safe = "with atomic_write(path) as file:\n    image.save(file)\nwith path.open('a') as log: log.write('a')"
    assert not _unsafe_writes(ast.parse(safe))


def _of_this_project(tree: ast.AST) -> set[str]:
    """Names that are imported from this project, whose functions this test reads where they are defined."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports if (node.module or "").startswith("scq.") for alias in node.names}


def _unsafe_writes(tree: ast.AST, safe: bool = False) -> list[str]:
    if isinstance(tree, ast.With):
        calls = [item.context_expr for item in tree.items if isinstance(item.context_expr, ast.Call)]
        safe = safe or any(ast.unparse(call.func).split(".")[-1] in SAFE for call in calls)
    if isinstance(tree, ast.FunctionDef) and tree.name == "atomic_write":  # a bundle's script brings its own
        safe = {"os.fsync(file.fileno())", "os.fsync(folder)"} <= {ast.unparse(each) for each in ast.walk(tree)}
    found = [] if safe or not isinstance(tree, ast.Call) or not _writes(tree) else [ast.unparse(tree)]
    return found + [each for child in ast.iter_child_nodes(tree) for each in _unsafe_writes(child, safe)]


def _writes(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute) and not isinstance(call.func, ast.Name):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
    arguments = [ast.unparse(each) for each in call.args]
    if name == "open" and ast.unparse(call.func) != "archive.open":  # a member of a zip, in memory
        mode = next((each for each in arguments if each.strip("'")[:1] in ("w", "x") and each[0] == "'"), "")
        return bool(mode)
    if name not in WRITING or any(each in ("file", "buffer") for each in arguments):
        return False
    # A pipeline's own method is a writer of this project, and so is a network's, which calls that of its base;
    # safetensors' ``save`` returns bytes.
    receiver = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    return receiver not in ("pipeline", "self", "super()", "self.checkpoints") and (bool(receiver) or name != "save")
