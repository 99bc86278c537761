"""What stands around the code keeps its word: citation, changelog, contributing, the site's pages, the type checker."""

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers import REPOSITORY
from packaging.requirements import Requirement

import scq
from scq.cli.main import build_parser

CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
API = (REPOSITORY / "docs" / "api.md").read_text()
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
# Settings of the site without what only mkdocs itself can read, such as a function as a setting.
_SITE_LOADER = type("_SiteLoader", (yaml.SafeLoader,), {})
_SITE_LOADER.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def _site() -> dict[str, Any]:
    return yaml.load((REPOSITORY / "mkdocs.yml").read_text(), _SITE_LOADER)


def _pages(nav: Any) -> list[str]:
    """The pages of a navigation, which nests lists and dictionaries."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in _pages(entry)]


def _script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    project = PYPROJECT["project"]
    assert str(citation["version"]) == scq.__version__
    assert (citation["title"], citation["license"]) == (project["name"], project["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert "2310.03004" in citation["references"][0]["url"]


def test_the_changelog_begins_with_what_comes_or_is_out() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] in ("Unreleased", scq.__version__)
    assert scq.__version__ in versions[:2]
    assert len(set(versions)) == len(versions)


def test_contributings_make_targets_exist() -> None:
    rules = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    commands = re.findall(r"^make ([\w-]+)", CONTRIBUTING, re.M) + re.findall(r"`make ([\w-]+)`", CONTRIBUTING)
    assert {"test", "test-all", "lint", "docs"} <= set(commands) <= set(rules)


def test_contributings_files_exist() -> None:
    """Paths in code, where they are not where output goes, and what Python is told to run."""
    code = " ".join(
        re.findall(r"`([^`\n]+)`", CONTRIBUTING) + re.findall(r"^```\n(.*?)^```", CONTRIBUTING, re.S | re.M)
    )
    named = {word.removeprefix("../before/scq/") for word in re.findall(r"[\w./-]+", code)}
    paths = {word for word in named if re.fullmatch(r"[\w-]+(/[\w.-]+)*(/|\.(py|md|yaml|toml))", word)}
    assert {"tests/losses_unmoved.py", "stage1_tokenizer/quantizers/", "data/sources.py"} <= paths
    assert [path for path in sorted(paths) if not (REPOSITORY / path).exists() and path != "__init__.py"] == []


def test_contributings_commands_parse() -> None:
    commands = re.findall(r"^scq (.+)$", CONTRIBUTING, re.M)
    assert commands
    for command in commands:
        config = build_parser().parse_args(shlex.split(command)).config
        assert (REPOSITORY / config).is_file(), command


def test_contributings_names_exist() -> None:
    """What it says to extend is where it says."""
    for file, name in (
        ("sampling/samplers.py", "SAMPLERS"),
        ("sampling/samplers.py", "Sampler"),
        ("sampling/samplers.py", "revealing"),
        ("stage2_prior/scheduler.py", "SAMPLERS"),
        ("data/source.py", "Source"),
        ("evaluation/samples.py", "evaluate_samples"),
        ("tests/test_quantizer_module.py", "ARMS"),
    ):
        assert file in CONTRIBUTING, file
        assert name in CONTRIBUTING, name
        assert re.search(rf"^(class |def )?{name}\b", (REPOSITORY / file).read_text(), re.M), f"{file} has no {name}"


def test_contributings_quantizer_quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from scq.stage1_tokenizer.quantizers import create_quantizer, interface

    monkeypatch.setattr(interface, "_REGISTRY", dict(interface._REGISTRY))
    exec(re.search(r"```python\n(.*?)```", CONTRIBUTING, re.S).group(1), {})
    quantizer = create_quantizer("fixed", codebook_size=16, dim=3)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    quantized = quantizer(z)
    quantized.z_q.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert torch.equal(quantizer.eval()(z).z_q, quantizer.lookup(quantized.indices))


def test_pre_commit_runs_a_ruff_that_the_project_allows() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    allowed = next(
        r for r in map(Requirement, PYPROJECT["project"]["optional-dependencies"]["test"]) if r.name == "ruff"
    )
    assert [hook["entry"].split()[1] for hook in hooks] == ["check", "format"]
    for hook in hooks:
        name, version = hook["additional_dependencies"][0].split("==")
        assert name == "ruff"
        assert allowed.specifier.contains(version)


def test_every_page_is_in_the_sites_navigation_once() -> None:
    pages = _pages(_site()["nav"])
    added = _script("site_hooks").ELSEWHERE
    written = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    assert sorted(pages) == sorted(written | set(added.values()))
    for name in added:
        assert (REPOSITORY / name).is_file(), name


def test_links_between_files_become_links_between_pages() -> None:
    turn = _script("site_hooks").turn_links
    assert turn("[a](docs/data.md#sources)", "index.md") == "[a](data.md#sources)"
    assert turn("![a](docs/pictures/edit.png)", "index.md") == "![a](pictures/edit.png)"
    assert turn("[a](../README.md), [b](data.md)", "training.md") == "[a](index.md), [b](data.md)"
    assert turn("[a](../data/stream.py)", "data.md") == "[a](source/data/stream.py.md)"
    assert turn("[a](../../benchmark.md)", "results/quickstart/report.md") == "[a](../../benchmark.md)"
    assert turn("`examples/` is [here](examples/)", "index.md") == "`examples/` is here"
    for untouched in ("[a](nowhere.md)", "[a](https://arxiv.org/abs/2310.03004)", "[a](#why)", "x[0](y)"):
        assert turn(untouched, "index.md") == untouched


MODULES = re.findall(r"^::: (\S+)$", API, re.M)


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_the_api_page_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_the_api_page_has_every_public_name() -> None:
    names = [name for name in scq.__all__ if name != "__version__"]
    assert names
    for name in names:
        assert f"[`{name}`][scq.{name}]" in API
        assert getattr(scq, name).__module__ in MODULES, f"{name} stands in no module of docs/api.md"


def test_comments_behind_fields_reach_the_api_page(tmp_path: Path) -> None:
    griffe = pytest.importorskip("griffe")
    (tmp_path / "settings.py").write_text(
        'class Settings:\n    """Of a run."""\n\n    steps: int = 1  # at least 1\n    seed: int = 0  # noqa: A\n'
    )
    extensions = griffe.load_extensions(_script("field_comments").FieldComments)
    module = griffe.load("settings", search_paths=[tmp_path], extensions=extensions)
    assert module["Settings"].docstring.value == "Of a run.\n\nAttributes:\n    steps: at least 1"


@pytest.fixture(scope="module")
def linked_package() -> Path:
    """build/src, where the package has its name."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    subprocess.run(["make", "links"], cwd=REPOSITORY, check=True, capture_output=True)
    return REPOSITORY / "build" / "src"


def test_files_that_are_type_checked_exist() -> None:
    files = PYPROJECT["tool"]["pyright"]["include"]
    assert len(files) == len(set(files))
    for file in files:
        assert (REPOSITORY / file.removeprefix("build/src/scq/")).is_file(), f"pyproject.toml lists {file}"


def test_the_type_checker_follows_imports_of_scq(linked_package: Path, tmp_path: Path) -> None:
    pytest.importorskip("basedpyright")
    settings = PYPROJECT["tool"]["pyright"]
    assert [REPOSITORY / path for path in settings["extraPaths"]] == [linked_package]
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps(settings | {"include": ["."], "extraPaths": [str(linked_package)], "venvPath": str(REPOSITORY)})
    )
    (tmp_path / "wrong.py").write_text(
        "from scq.data.stream import ImageStream\n"
        "from scq.data.stream import no_such_function\n"
        "from scq.no_such_room import anything\n"
        "def show(stream: ImageStream) -> None:\n"
        "    print(stream.num_images)\n"
        "    print(stream.no_such_attribute)\n"
    )
    command = [sys.executable, "-m", "basedpyright", "--project", str(tmp_path), "--outputjson"]
    run = subprocess.run([*command, "--pythonpath", sys.executable], capture_output=True, text=True, timeout=120)
    found = json.loads(run.stdout)["generalDiagnostics"]
    assert [(each["range"]["start"]["line"] + 1, each["rule"]) for each in found] == [
        (2, "reportAttributeAccessIssue"),
        (3, "reportMissingImports"),
        (6, "reportAttributeAccessIssue"),
    ]


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(linked_package: Path, tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(_pages(_site()["nav"]))
    for page in pages:
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', page.read_text())
        fetched += re.findall(r'<link[^>]* href="(?:https?:)?//[^"]*"[^>]*>', page.read_text())
        assert fetched == [], page


def test_every_promise_names_the_tests_that_hold_it() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text()
    rows = [line for line in page.partition("## Files of others")[2].splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "| ---"))]
    assert len(promises) > 40
    for promise in promises:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promise)
        assert tests, promise
        for file, name in tests:
            assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(), f"{file} has no {name}"
