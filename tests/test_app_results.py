"""The tab of reports: which are found, under which names, and what is said where there is none."""

from pathlib import Path

import gradio as gr
from PIL import Image
from studio_client import serving

from scq.sampling.studio.results import NO_REPORTS, find_reports, results_tab


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
