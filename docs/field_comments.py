"""An extension of griffe, which reads the docstrings for the site: fields are described by the comment behind them.

    steps: int = 12  # at least 1

stands on the API page as if the class's docstring had it under ``Attributes:``.
"""

from __future__ import annotations

import io
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Add the comments behind a class's annotated fields to its docstring, where that does not describe them."""
        if not isinstance(cls.filepath, Path) or not cls.filepath.is_file():
            return
        comments = line_comments(cls.filepath)
        fields = [field for field in cls.attributes.values() if field.annotation is not None and not field.inherited]
        described = [(field.name, comments[field.endlineno]) for field in fields if field.endlineno in comments]
        docstring = cls.docstring or griffe.Docstring("", parent=cls)
        if described and "Attributes:" not in docstring.value:
            lines = "\n".join(f"    {name}: {comment}" for name, comment in described)
            docstring.value = f"{docstring.value}\n\nAttributes:\n{lines}".strip()
            cls.docstring = docstring


@cache
def line_comments(path: Path) -> dict[int, str]:
    """Line number -> the comment that ends the line; comments for tools left out."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return {line: text for line, text in comments.items() if not text.startswith(("noqa", "type:", "pyright:"))}
