"""The README's promises: its code runs, its commands parse, its files exist, its numbers are those of a real run."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import REPOSITORY

from engine.cli import build_parser
from evaluation.report import render, summary_table

README = (REPOSITORY / "README.md").read_text()
RESULTS = REPOSITORY / "docs" / "results" / "quickstart"


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
    commands = re.findall(r"^scq (.+?)(?:  +#.*)?$", lines, re.M)
    assert commands
    for command in commands:
        if "|" not in command:
            build_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("document", ["README.md", *PAGES])
def test_links_lead_somewhere(document: str) -> None:
    path = REPOSITORY / document
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"


def test_the_results_are_those_of_the_kept_run() -> None:
    results = json.loads((RESULTS / "metrics.json").read_text())
    table = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", README, re.S).group(1)
    assert table.splitlines() == summary_table(results)
    assert (RESULTS / "report.md").read_text() == render(results)


def test_the_api_page_is_that_of_the_docstrings() -> None:
    path = REPOSITORY / "docs" / "build_api.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("build_api", path))
    module.__spec__.loader.exec_module(module)
    assert (REPOSITORY / "docs" / "api.md").read_text() == module.build(), "run: python docs/build_api.py"
