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
    "No reports here. `scq benchmark quality` writes one; `scq app --results FOLDER` shows it. The project's own are "
    "in `docs/results` of its repository, which an installed package does not carry."
)
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+\.png)\)")


def find_reports(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders with a report, by the names that the page shows: the folders given, and those right below them, in this
    order. A name is the folder's own, with as many of the folders above it as tell it from the others."""
    candidates = [place.resolve() for folder in folders for place in (folder, *sorted(folder.glob("*")))]
    places = list(dict.fromkeys(place for place in candidates if (place / REPORT).is_file()))
    names = {}
    for place in places:
        ends = (Path(*place.parts[-count:]).as_posix() for count in range(1, len(place.parts) + 1))
        names[next(end for end in ends if sum(other.as_posix().endswith(f"/{end}") for other in places) <= 1)] = place
    return names


def results_tab(folders: Sequence[Path]) -> None:
    """Build the tab from the reports in ``folders``, which the page's user cannot choose: no other path is read."""
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
    """A report's text without its pictures, and the pictures with their titles. What cannot be read is said in the
    text: a report may still be being written, or have been copied without its pictures."""
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
