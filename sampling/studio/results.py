"""The tab that shows what was measured: reports that benchmarks wrote.

A report may come from somebody else. Nothing outside the folder that was named is read, pictures are bounded as uploads
are, and its Markdown makes no reader's browser fetch anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from scq.data.transforms import to_rgb
from scq.engine.files import real_path
from scq.sampling.studio.controls import Dropdown
from scq.sampling.studio.steps import BUTTONS
from scq.sampling.studio.uploads import LARGEST_BYTES, open_bounded

REPORT = "report.md"
REPORT_CLASS = "report"  # CSS class of its text
MOST_PICTURES = 64  # of one report
LARGEST_REPORT = 1_000_000  # bytes of its text
SHOWN_SIDE = 2400  # pixels, at most, of a picture as it is shown
NO_REPORTS = (
    "There are no reports here. `scq benchmark quality` writes one, and `scq app --results FOLDER` shows it. The "
    "project's own are in `docs/results` of its repository, which is not part of an installed package."
)
# Bounded, and elsewhere bound to the beginning of a run, so that the time to search grows no faster than a report.
_PICTURE = re.compile(r"!\[([^\]]{0,200})\]\(([^)\s]{1,251}\.png)\)")


def find_reports(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders with a report, by the names that the page shows: the given folders and their direct sub-folders, in this
    order. A name is the folder's own, preceded by as many of its parents as make it unique.

    A symbolic link that leads out of a given folder is not followed.
    """
    paths: dict[Path, None] = {}
    for root in map(real_path, folders):
        for path in (root, *sorted(root.glob("*"))):
            if (report := real_path(path / REPORT)).is_file() and report.is_relative_to(root):
                paths[real_path(path)] = None
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
    chosen = Dropdown(list(reports), value=first, label="Report")
    shown = [
        gr.Markdown(text, elem_classes=REPORT_CLASS),
        gr.Gallery(
            pictures, label="Pictures", columns=1, format="png", object_fit="contain", height="auto", buttons=BUTTONS
        ),
    ]
    chosen.change(lambda name: _read(reports[name]), chosen, shown, api_name="report")


def _read(folder: Path) -> tuple[str, list[tuple[Image.Image, str]]]:
    """A report's text without its pictures, and the pictures with their titles. The text says what cannot be read: a
    report may be unfinished, or have been copied without its pictures."""
    try:
        text = _bytes_in(folder, REPORT, LARGEST_REPORT).decode()
    except (OSError, ValueError):
        return "This report cannot be read.", []
    pictures = []

    def taken(found: re.Match[str]) -> str:
        title, file = found.group(1), Path(found.group(2)).name
        if len(pictures) == MOST_PICTURES:
            return f"*The picture {file} is not shown: a report has at most {MOST_PICTURES}.*"
        try:
            picture = to_rgb(open_bounded(_bytes_in(folder, file, LARGEST_BYTES)))
        except FileNotFoundError:
            return f"*The picture {file} is missing.*"
        except Exception:  # Pillow's decoders raise nearly everything on broken files
            return f"*The picture {file} cannot be shown: it is damaged, too large, or not in this folder.*"
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        pictures.append((picture, title))
        return ""

    return harmless(_PICTURE.sub(taken, text)), pictures


def harmless(markdown: str) -> str:
    """Markdown that makes a browser fetch nothing: HTML becomes text, a picture a link, and a diagram code."""
    markdown = re.sub(r"(?<!!)!+\[", "[", markdown)
    markdown = re.sub(r"((?<!`)```+|(?<!~)~~~+)\s*mermaid", r"\1text", markdown, flags=re.IGNORECASE)
    return re.sub(r"<(?=[a-z/!?])", "&lt;", markdown, flags=re.IGNORECASE)


def _bytes_in(folder: Path, name: str, largest: int) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is larger than ``largest``, no regular file, or a link that leads out of the folder.
    """
    path = real_path(folder / name)
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_relative_to(folder) or not path.is_file() or path.stat().st_size > largest:
        raise ValueError(f"{name} is not read")
    return path.read_bytes()
