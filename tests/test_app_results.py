"""The tab of reports: which are found, under which names, and what is said where there is none."""

import shutil
import time
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image
from studio_client import serving

from scq.sampling.studio.results import NO_REPORTS, _read, find_reports, harmless, results_tab

pytestmark = pytest.mark.usefixtures("downloads")


def test_reports_of_one_name_are_told_apart_and_the_users_own_comes_first(tmp_path: Path) -> None:
    for folder, text in (("mine", "my numbers"), ("docs", "their numbers")):
        (tmp_path / folder / "quickstart").mkdir(parents=True)
        report = f"# {text}\n![Curves](curves.png)\n![Samples](gone.png)\n"
        (tmp_path / folder / "quickstart" / "report.md").write_text(report)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "quickstart" / "curves.png")
    (tmp_path / "docs" / "other").mkdir()
    (tmp_path / "docs" / "other" / "report.md").write_text("others")
    folders = [tmp_path / "mine" / "quickstart", tmp_path / "docs"]
    assert list(find_reports(folders)) == ["mine/quickstart", "other", "docs/quickstart"]
    with gr.Blocks() as page:
        results_tab(folders)
    assert "my numbers" in str(page.config["components"])
    with serving(page) as client:
        for name, text in (
            ("mine/quickstart", "my numbers"),
            ("docs/quickstart", "their numbers"),
            ("other", "others"),
        ):
            shown, pictures = client.predict(name, api_name="/report")
            assert text in shown
            assert len(pictures) == (name != "other")
            assert ("gone.png is missing" in shown) == (name != "other")


def test_a_page_without_reports_says_so(tmp_path: Path) -> None:
    with gr.Blocks() as page:
        results_tab([tmp_path, tmp_path / "docs" / "results"])
    assert NO_REPORTS in [component["props"].get("value") for component in page.config["components"]]


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("given", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.md").write_text(f"{name}\n![a](linked.png)\n![b](../secret/own.png)\n")
        Image.new("RGB", (8, 8)).save(tmp_path / name / "own.png")
    (tmp_path / "given" / "linked.png").symlink_to(tmp_path / "secret" / "own.png")
    (tmp_path / "given" / "sub").symlink_to(tmp_path / "secret")
    (tmp_path / "given" / "file").mkdir()
    (tmp_path / "given" / "file" / "report.md").symlink_to(tmp_path / "secret" / "report.md")
    (tmp_path / "chosen").symlink_to(tmp_path / "given")
    assert list(find_reports([tmp_path / "chosen"])) == ["given"]
    text, pictures = _read(tmp_path / "given")
    assert "linked.png cannot be shown" in text
    assert [title for _, title in pictures] == ["b"], "the folder's own picture of that name"
    (tmp_path / "given" / "report.md").unlink()
    (tmp_path / "given" / "report.md").symlink_to(tmp_path / "secret" / "report.md")
    assert _read(tmp_path / "given") == ("This report cannot be read.", [])


def test_links_that_lead_to_themselves_hide_only_their_own_report(tmp_path: Path) -> None:
    for name in ("sound", "loop", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "sound" / "report.md").write_text("# Sound")
    (tmp_path / "loop" / "report.md").symlink_to("report.md")
    (tmp_path / "looped").symlink_to("looped")
    (tmp_path / "pictures" / "a.png").symlink_to("a.png")
    (tmp_path / "pictures" / "report.md").write_text("![a](a.png)")
    assert list(find_reports([tmp_path])) == ["pictures", "sound"]
    assert _read(tmp_path / "pictures") == ("*The picture a.png is missing.*", [])
    assert _read(tmp_path / "loop") == ("This report cannot be read.", [])


@pytest.mark.parametrize("piece", ["![x](", "![", "!", "~", "`", "```\n", "<", "![a](a.png", "~~~ "])
def test_the_time_to_read_a_report_grows_with_its_length_only(piece: str, tmp_path: Path) -> None:
    """A search that starts at every place and goes on to the end would take hours, and stop every other user."""
    (tmp_path / "report.md").write_text(piece * (400_000 // len(piece)))
    start = time.process_time()
    _read(tmp_path)
    assert time.process_time() - start < 20


def test_a_picture_that_cannot_be_shown_is_a_line(tmp_path: Path, tiny_bomb: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "damaged.png").write_bytes(data.replace(b"IDAT", b"ID\0T"))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    shutil.copy(tiny_bomb, tmp_path / "large.png")
    names = ["cut", "damaged", "text", "folder", "large"]
    (tmp_path / "report.md").write_text("".join(f"![{name}]({name}.png)\n" for name in ["whole", *names]))
    with gr.Blocks() as page:
        results_tab([tmp_path])
    text, pictures = _read(tmp_path)
    assert [title for _, title in pictures] == ["whole"]
    for name in names:
        assert f"*The picture {name}.png cannot be shown" in text
        assert f"The picture {name}.png cannot be shown" in str(page.config["components"])


@pytest.fixture
def tiny_bomb(tmp_path: Path) -> Path:
    """A few kilobytes of PNG with 196 million pixels."""
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    return tmp_path / "bomb.png"


@pytest.mark.parametrize(
    "markdown",
    [
        "![a](http://evil.example/a.png)", "![a][b]\n\n[b]: http://evil.example/a.png", "!![a](http://evil.example/a)",
        "![![a](http://evil.example/a)](b)", "<img src=http://evil.example/a>", "<IMG\nsrc='//evil.example/a'>",
        "</p><iframe src=//evil.example>", "<!-- a --><script>alert(1)</script>", "<?php ?>",
        "```mermaid\nflowchart\nA@{ img: 'http://evil.example/a' }\n```", "~~~ MERMAID\n~~~",
        "`a` <img src=//evil.example/a> `b`", "!![a](gone.png)[b](http://evil.example/a)",
        "<![a](gone.png)img src=//evil.example/a>",
    ],
)  # fmt: skip
def test_a_report_makes_no_browser_fetch_anything(markdown: str, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text(markdown)
    Image.new("RGB", (8, 8)).save(tmp_path / "gone.png")
    text, _ = _read(tmp_path)
    assert "![" not in text
    assert "mermaid" not in text.lower()
    assert not any(tag in text.lower() for tag in ("<i", "<s", "</", "<!", "<?"))


def test_what_is_no_html_stays_as_it_is() -> None:
    for text in ("| a < b | 3<4 | 1 <= 2 |", "a -> b, a! [b](c)", "```python\nprint(1 < 2)\n```"):
        assert harmless(text) == text
