"""The package as it is installed: one import name, beside whatever else is there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import REPOSITORY

import scq
from scq.engine import config

PUBLIC = [
    "ConvexRefiner", "ImageTokenizer", "MaskedTransformer", "SoftConvexPipeline", "SoftConvexQuantizer",
    "UnmaskingScheduler", "soft_convex_solve",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the source, in which no earlier build has left anything."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "shards", "*.egg-info", "__pycache__", "docs", "tests"
    )
    shutil.copytree(REPOSITORY, folder / "source", ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, whose dependencies are those of this one, but without its editable scq."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path from a .pth file is searched, but the .pth files that lie there, as the editable scq's, are not read.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", wheel], check=True, capture_output=True, timeout=300)
    return folder


def run(environment: Path, cwd: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A program of the environment in a folder, as its user starts it."""
    program, *arguments = map(str, command)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [environment / "bin" / program, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )


def test_every_folder_of_code_is_packed_and_nothing_outside_scq(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.startswith(f"scq-{scq.__version__}.dist-info/")]
    assert {name.split("/")[0] for name in names} == {"scq"}
    rooms = [folder for folder in REPOSITORY.iterdir() if (folder / "__init__.py").is_file()]
    sources = {path.relative_to(REPOSITORY).as_posix() for room in rooms for path in room.rglob("*.py")}
    packed = {name.removeprefix("scq/") for name in names}
    assert packed >= sources | {"__init__.py", "__main__.py", "py.typed"}
    assert packed >= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert "sampling/pretrained/prior/diffusion_pytorch_model.safetensors" in packed
    assert not [name for name in packed if name.startswith(("tests/", "docs/", "build/"))]


def test_it_works_beside_a_users_own_modules_of_our_rooms_names(environment: Path, tmp_path: Path) -> None:
    for room, kind in (("data", "folder"), ("engine", "file"), ("sampling", "folder"), ("evaluation", "file")):
        own = tmp_path / f"{room}.py" if kind == "file" else tmp_path / room / "__init__.py"
        own.parent.mkdir(exist_ok=True)
        own.write_text("MINE = True\n")
    (tmp_path / "script.py").write_text(
        "import data, engine, sampling\n"
        "from scq import SoftConvexPipeline\n"
        "from scq.sampling.pipeline import EMBEDDED\n"
        "import scq.data.stream\n"
        "assert data.MINE and engine.MINE and sampling.MINE\n"
        "images = SoftConvexPipeline.from_pretrained(EMBEDDED)(1, seed=0, num_inference_steps=2).images\n"
        "print(scq.__file__, images[0].size)\n"
    )
    result = run(environment, tmp_path, "python", "script.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split(maxsplit=1)[1].strip() == "(32, 32)"
    assert str(environment) in result.stdout, "the wheel's, not the checkout's"
    result = run(environment, tmp_path, "python", "-m", "scq", "data", "pack", "twemoji", "shards", "--format", "emoji")
    assert result.returncode == 2, "it asks for a size"
    assert "--size" in result.stderr
    assert "Traceback" not in result.stderr
    # The package's config, because the user has no file of that name.
    config = "configs/quickstart/tokenizer_scq.yaml"
    result = run(environment, tmp_path, "scq", "train", "tokenizer", "--config", config, "out=run")
    assert result.returncode == 2
    assert "no packed images at 'shards/train'" in result.stderr


def test_installed_it_claims_nobody_elses_reports_and_revision(environment: Path, tmp_path: Path) -> None:
    around = environment.parent  # as a user's project, with its own history, around its virtual environment
    (around / "docs" / "results" / "theirs").mkdir(parents=True)
    (around / "docs" / "results" / "theirs" / "report.md").write_text("not ours")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "theirs"], ["tag", "v9.9"]):
        subprocess.run([*git, *arguments], cwd=around, check=True, capture_output=True)
    program = (
        "from scq.cli.generate import default_results\n"
        "from scq.engine.config import git_revision\n"
        "print(git_revision(), default_results())\n"
    )
    result = run(environment, around, "python", "-c", program)
    assert result.stdout.split(maxsplit=1) == ["unknown", "[]\n"], result.stderr


def test_the_revision_is_that_of_this_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (REPOSITORY / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        assert head.startswith(config.git_revision().removesuffix("-dirty").split("-g")[-1])
    monkeypatch.setattr(config, "PACKAGE", tmp_path)
    assert config.git_revision() == "unknown"


def test_importing_scq_loads_nothing_until_it_is_asked_for() -> None:
    program = "import sys, scq; print([name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy')])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
    assert sorted(scq.__all__) == sorted(["__version__", *PUBLIC])
    assert set(scq.__all__) <= set(dir(scq))
    for name in PUBLIC:
        assert getattr(scq, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Painter'"):
        scq.Painter  # noqa: B018


def test_the_command_line_starts_as_a_module(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scq", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert "usage: scq" in result.stdout
