"""The tab that shows what was measured: reports that benchmarks wrote."""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr
from PIL import Image

REPORT = "report.md"
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+\.png)\)")


def find_reports(folders: list[Path]) -> dict[str, Path]:
    """Folders with a report, by the names that the page shows: the folders given, and those right below them."""
    candidates = [place for folder in folders for place in (folder, *sorted(folder.glob("*")))]
    return {place.name: place for place in candidates if (place / REPORT).is_file()}


def results_tab(folders: list[Path]) -> None:
    """Build the tab from the reports in ``folders``, which the page's user cannot choose: no other path is read."""
    reports = find_reports(folders)
    if not reports:
        gr.Markdown("No reports here. `scq benchmark quality` writes one; `scq app --results FOLDER` shows it.")
        return
    first = next(iter(reports))
    text, pictures = _read(reports[first])
    chosen = gr.Dropdown(list(reports), value=first, label="Report")
    shown = [
        gr.Markdown(text),
        gr.Gallery(pictures, label="Pictures", columns=1, format="png", object_fit="contain", height="auto"),
    ]
    chosen.change(lambda name: _show(reports, name), chosen, shown, api_name="report")


def _show(reports: dict[str, Path], name: str) -> tuple[str, list[tuple[Image.Image, str]]]:
    if name not in reports:
        raise gr.Error("There is no such report.")
    return _read(reports[name])


def _read(folder: Path) -> tuple[str, list[tuple[Image.Image, str]]]:
    """A report's text without its pictures, and the pictures with their titles."""
    text = (folder / REPORT).read_text()
    pictures = []
    for title, file in _PICTURE.findall(text):
        with Image.open(folder / Path(file).name) as picture:
            pictures.append((picture.convert("RGB"), title))
    return _PICTURE.sub("", text), pictures
