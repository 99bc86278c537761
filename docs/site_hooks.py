"""Hooks of mkdocs: pages of the site that lie outside docs/, and links that lead somewhere in both places.

In the repository a page links to files: ``docs/data.md`` from the README, ``../CONTRIBUTING.md`` from docs/. On the
site every page has its own address, so links are turned as pages are read, and no text is kept twice.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
# File in the repository -> page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "sampling/pretrained/README.md": "pretrained.md",
}
_HOMES = {page: file for file, page in ELSEWHERE.items()}
_LINK = re.compile(r"(!?\[[^\[\]]*\])\(([^()\s#:]+)(#[^()\s]*)?\)")
_SOURCE = "source/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and one for every source file that a page links to."""
    from mkdocs.structure.files import File

    for name, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / name).read_text()))
    linked = {target for file in files.documentation_pages() for target in _linked_sources(file)}
    for name in sorted(linked):
        text = f"# {name}\n\n````` {{ .{_language(name)} }}\n{(REPOSITORY / name).read_text()}\n`````\n"
        files.append(File.generated(config, f"{_SOURCE}{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page."""
    uri = page.file.src_uri
    return markdown if uri.startswith(_SOURCE) else turn_links(markdown, uri)


def turn_links(markdown: str, page: str) -> str:
    """The Markdown of ``page``, with its links to files of the repository as links to pages of the site.

    A folder has no page, so of a link to one only the words stay. A link to nothing stays as it is: mkdocs reports it.
    """

    def turned(link: re.Match[str]) -> str:
        words, target, anchor = link[1], _in_repository(page, link[2]), link[3] or ""
        if not (REPOSITORY / target).exists():
            return link[0]
        if (REPOSITORY / target).is_dir():
            return words[1:-1]
        to = _on_site(target)
        return f"{words}({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(turned, markdown)


def _linked_sources(file: File) -> set[str]:
    targets = {_in_repository(file.src_uri, link[2]) for link in _LINK.finditer(file.content_string)}
    return {target for target in targets if (REPOSITORY / target).is_file() and _on_site(target).startswith(_SOURCE)}


def _in_repository(page: str, target: str) -> str:
    """The path of a page's link from the repository's root."""
    home = _HOMES.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), target))


def _on_site(name: str) -> str:
    """Where the site has a file of the repository."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    return name.removeprefix("docs/") if name.startswith("docs/") else f"{_SOURCE}{name}.md"


def _language(name: str) -> str:
    return {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}.get(Path(name).suffix, "text")
