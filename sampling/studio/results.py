"""The tab that shows what was measured: reports that benchmarks wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from scq.sampling.studio.steps import BUTTONS

REPORT = "report.md"
NO_REPORTS = (
    "There are no reports here. `scq benchmark quality` writes one, and `scq app --results FOLDER` shows it. The "
    "project's own are in `docs/results` of its repository, which is not part of an installed package."
)
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+\.png)\)")


def find_reports(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders with a report, by the names that the page shows: the given folders and their direct sub-folders, in this
    order. A name is the folder's own, preceded by as many of its parents as make it unique."""
    candidates = [path.resolve() for folder in folders for path in (folder, *sorted(folder.glob("*")))]
    paths = list(dict.fromkeys(path for path in candidates if (path / REPORT).is_file()))
    names = {}
    for path in paths:
        ends = (Path(*path.parts[-count:]).as_posix() for count in range(1, len(path.parts) + 1))
        names[next(end for end in ends if sum(other.as_posix().endswith(f"/{end}") for other in paths) <= 1)] = path
    return names


def results_tab(folders: Sequence[Path]) -> None:
    """Build the tab from the reports in ``folders``. Users of the page cannot choose other paths."""
    reports = find_reports(folders)
    if not reports:
        gr.Markdown(NO_REPORTS)
        return
    first = next(iter(reports))
    text, pictures = _read(reports[first])
    chosen = gr.Dropdown(list(reports), value=first, label="Report")
    shown = [
        gr.Markdown(text),
        gr.Gallery(
            pictures, label="Pictures", columns=1, format="png", object_fit="contain", height="auto", buttons=BUTTONS
        ),
    ]
    chosen.change(lambda name: _show(reports, name), chosen, shown, api_name="report")


def _show(reports: dict[str, Path], name: str) -> tuple[str, list[tuple[Image.Image, str]]]:
    if name not in reports:
        raise gr.Error("There is no such report.")
    return _read(reports[name])


def _read(folder: Path) -> tuple[str, list[tuple[Image.Image, str]]]:
    """A report's text without its pictures, and the pictures with their titles. The text says what cannot be read: a
    report may be unfinished, or have been copied without its pictures."""
    try:
        text = (folder / REPORT).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "This report cannot be read.", []
    pictures = []

    def taken(found: re.Match[str]) -> str:
        title, file = found.group(1), Path(found.group(2)).name
        try:
            with Image.open(folder / file) as picture:
                pictures.append((picture.convert("RGB"), title))
        except OSError:
            return f"*The picture {file} is missing.*"
        return ""

    return _PICTURE.sub(taken, text), pictures
