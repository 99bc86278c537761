"""Text that must not be written where others may read it: what a reference to the environment stood for, and the
credentials in a URL."""

from __future__ import annotations

import hashlib
import os
import re

HIDDEN = "***"  # stands where credentials were
_AUTHORITY = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)([^/?#]*)@")


class Referenced(str):
    """What a reference such as ``${oc.env:SHARDS}`` in a config stood for. It is used as any text is.

    Attributes:
        reference: the text of the config, which is all that may be saved or shown.
    """

    reference: str

    def __new__(cls, text: str, reference: str) -> Referenced:
        made = super().__new__(cls, text)
        made.reference = reference
        return made

    def __reduce__(self) -> tuple[type[Referenced], tuple[str, str]]:  # copies and pickles keep the reference
        return Referenced, (str(self), self.reference)

    @property
    def digest(self) -> str:
        """Says whether a reference stands for the same text as before, and nothing else about it."""
        return hashlib.sha256(self.encode(errors="surrogateescape")).hexdigest()


def shown(location: str | os.PathLike) -> str:
    """A path, URL or other text as it may be saved and shown.

    A `Referenced` text stays a reference, and a URL loses user, password and query, unless these are references.
    """
    text = location.reference if isinstance(location, Referenced) else os.fspath(location)
    if "://" not in text:
        return str(text)
    text = _AUTHORITY.sub(lambda found: found[0] if "${" in found[2] else f"{found[1]}{HIDDEN}@", text)
    address, mark, query = text.partition("?")
    return f"{address}{mark}{query if '${' in query or not query else HIDDEN}"


def without_urls(text: str) -> str:
    """A library's message without the URLs in it, which may hold credentials in any encoding."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+", "...", text)
