"""Write the pages' tables of results and the kept runs' reports from their numbers:  python docs/build_results.py

Every folder of docs/results that holds results.json (or metrics.json, as the quickstart's does) has its own report.md
and a block in a page, README.md or one of docs/, between ``<!-- results NAME -->`` and ``<!-- /results NAME -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

from scq.evaluation.benchmark.report import render, render_comparison, summary_table
from scq.evaluation.benchmark.results import BenchmarkResults, ComparisonResults, load_results

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = [README, *sorted(Path(__file__).parent.glob("*.md"))]
RESULTS = Path(__file__).with_name("results")
COMPARISONS = "tokenizers_"  # how the folders of comparisons of tokenizers begin; the others are benchmarks' of quality
_BLOCK = re.compile(r"<!-- results (\S+) -->\n(.*?)<!-- /results \1 -->", re.S)

Results = BenchmarkResults | ComparisonResults


def kept_runs(folder: Path = RESULTS) -> dict[str, Results]:
    """The results of every kept run, by its folder's name."""
    files = [path for path in sorted(folder.glob("*/*.json")) if path.name in ("metrics.json", "results.json")]
    return {
        name: load_results(ComparisonResults if name.startswith(COMPARISONS) else BenchmarkResults, path)
        for path in files
        if (name := path.parent.name)
    }


def pages() -> dict[Path, dict[str, Results]]:
    """The pages with blocks, and the runs that each of them shows.

    Raises:
        SystemExit: no page has a block for a run.
    """
    runs, shown = kept_runs(), {}
    for page in PAGES:
        if names := {name for name, _ in _BLOCK.findall(page.read_text())}:
            shown[page] = {name: run for name, run in runs.items() if name in names}
    if homeless := sorted(runs.keys() - {name for found in shown.values() for name in found}):
        raise SystemExit(f"no page has a block for docs/results/{homeless[0]}: write one where it belongs")
    return shown


def report(results: Results) -> str:
    """The text of a run's report.md."""
    return render_comparison(results) if isinstance(results, ComparisonResults) else render(results)


def fill_blocks(text: str, runs: dict[str, Results]) -> str:
    """The page ``text`` with every block's table as the runs have it.

    Raises:
        SystemExit: a run has no block, or a block no run.
    """
    blocks = [name for name, _ in _BLOCK.findall(text)]
    if sorted(blocks) != sorted(runs):
        raise SystemExit(f"the page has results blocks for {sorted(blocks)}, docs/results has runs {sorted(runs)}")

    def filled(block: re.Match[str]) -> str:
        name = block[1]
        table = "\n".join(summary_table(runs[name]))
        return f"<!-- results {name} -->\n{table}\n<!-- /results {name} -->"

    return _BLOCK.sub(filled, text)


if __name__ == "__main__":
    for page, runs in pages().items():
        page.write_text(fill_blocks(page.read_text(), runs))
    for name, results in kept_runs().items():
        (RESULTS / name / "report.md").write_text(report(results))
