"""The README's promises: its code runs, its commands parse, its files exist, its numbers are those of a real run."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from helpers import REPOSITORY

from scq.cli.main import build_parser
from scq.evaluation.benchmark.report import summary_table

README = (REPOSITORY / "README.md").read_text()
RESULTS = REPOSITORY / "docs" / "results"


EXAMPLES = [
    (page, code)
    for page in ("README.md", "docs/sampling.md")
    for code in re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.S)
]


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_the_python_examples_run(page: str, code: str, tiny_run: Path) -> None:
    exec(code.replace("runs/quickstart/model", str(tiny_run / "model")), {})


PAGES = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize(
    "document",
    ["README.md"] + [f"docs/{name}.md" for name in ("benchmark", "data", "quantizer", "sampling", "training")],
)
def test_the_commands_parse(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    blocks = [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if not language]
    lines = "\n".join(blocks).replace("\\\n", " ")
    commands = re.findall(r"^(?:scq|\$LAUNCH) (.+?)(?:  +#.*)?$", lines, re.M)
    assert commands
    for command in commands:
        if "|" not in command:
            build_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("document", ["README.md", *PAGES])
def test_links_lead_somewhere(document: str) -> None:
    path = REPOSITORY / document
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.iterdir() if path.is_dir()))
def test_the_results_are_those_of_the_kept_run(name: str) -> None:
    module = _script("build_results")
    page, results = next((page, runs[name]) for page, runs in module.pages().items() if name in runs)
    table = re.search(rf"<!-- results {name} -->\n(.*?)\n<!-- /results {name} -->", page.read_text(), re.S)
    assert table is not None, f"{page.name} shows nothing of docs/results/{name}"
    hint = "run: python docs/build_results.py"
    assert table.group(1).splitlines() == summary_table(results), hint
    report = (RESULTS / name / "report.md").read_text()
    assert report == module.report(results), hint
    for picture in re.findall(r"\]\(([^)]+\.png)\)", report):
        assert (RESULTS / name / picture).is_file(), picture


def test_the_pages_blocks_are_filled_from_the_kept_runs() -> None:
    module = _script("build_results")
    for page, runs in module.pages().items():
        assert module.fill_blocks(page.read_text(), runs) == page.read_text()
    runs = module.pages()[module.README]
    emptied = re.sub(r"(<!-- results (\S+) -->\n).*?(<!-- /results \2 -->)", r"\1\3", README, flags=re.S)
    assert emptied != README
    assert module.fill_blocks(emptied, runs) == README
    with pytest.raises(SystemExit, match="elsewhere"):
        module.fill_blocks(README, runs | {"elsewhere": next(iter(runs.values()))})


def _script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    path = REPOSITORY / "docs" / f"{name}.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    module.__spec__.loader.exec_module(module)
    return module
