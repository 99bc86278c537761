"""Write README's results and the kept runs' reports from their numbers:  python docs/build_results.py

Every folder of docs/results that holds results.json (or metrics.json, as the quickstart's does) has a block in
README.md, between ``<!-- results NAME -->`` and ``<!-- /results NAME -->``, and its own report.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from scq.evaluation.benchmark.report import render, summary_table
from scq.evaluation.benchmark.results import BenchmarkResults, load_results

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
_BLOCK = re.compile(r"<!-- results (\S+) -->\n(.*?)<!-- /results \1 -->", re.S)


def kept_runs(folder: Path = RESULTS) -> dict[str, BenchmarkResults]:
    """The results of every kept run, by its folder's name."""
    files = [path for path in sorted(folder.glob("*/*.json")) if path.name in ("metrics.json", "results.json")]
    return {path.parent.name: load_results(BenchmarkResults, path) for path in files}


def fill_blocks(text: str, runs: dict[str, BenchmarkResults]) -> str:
    """The page ``text`` with every block's table as the runs have it.

    Raises:
        SystemExit: a run has no block, or a block no run.
    """
    blocks = [name for name, _ in _BLOCK.findall(text)]
    if sorted(blocks) != sorted(runs):
        raise SystemExit(f"README.md has results blocks for {sorted(blocks)}, docs/results has runs {sorted(runs)}")

    def filled(block: re.Match[str]) -> str:
        name = block[1]
        table = "\n".join(summary_table(runs[name]))
        return f"<!-- results {name} -->\n{table}\n<!-- /results {name} -->"

    return _BLOCK.sub(filled, text)


if __name__ == "__main__":
    README.write_text(fill_blocks(README.read_text(), kept_runs()))
    for name, results in kept_runs().items():
        (RESULTS / name / "report.md").write_text(render(results))
