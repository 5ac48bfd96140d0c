"""Tests of the words of error messages: commands have files, not requests and bodies."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import codecs
from service.cli.error_messages import replace_http_words

HTTP_WORDS = re.compile(r"\b(request|response|body|query|send|sent|header field|content-type|accept)\b", re.IGNORECASE)

FOLDER = Path(codecs.__path__[0])
HTTP_MODULES = {"content_coding.py", "multipart.py", "response_options.py", "registry.py", "__init__.py"}
"""Modules whose messages no command shows."""


def iter_messages(module: Path) -> Iterator[str]:
    """Yield the strings of a module that are not docstrings, with a media type for each replacement field."""
    parts: set[int] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Expr):
            parts.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            values = (value.value if isinstance(value, ast.Constant) else "image/png" for value in node.values)
            yield "".join(map(str, values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


@pytest.mark.parametrize("module", sorted(path.name for path in FOLDER.glob("*.py") if path.name not in HTTP_MODULES))
def test_no_message_of_a_codec_has_http_words(module: str) -> None:
    for message in iter_messages(FOLDER / module):
        if message != "(body)":
            assert not HTTP_WORDS.search(replace_http_words(message)), message


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ("the body is empty: it must be a .npy file", "the file is empty: it must be a .npy file"),
        (
            "input has the dtype '|b1'; convert it before sending",
            "weight has the dtype '|b1'; convert it before saving",
        ),
        ("three (3, H, W); request application/x-npy instead", "three (3, H, W); use .npy"),
        ("it begins like JSON; send it as application/json", "it begins like JSON; use .json"),
        ("send it as an array of shape (1, 1)", "save it as an array of shape (1, 1)"),
        ("it begins like X; send it as image/x-unknown", "it begins like X; use image/x-unknown"),
    ],
)
def test_details_are_worded_for_files(detail: str, expected: str) -> None:
    assert replace_http_words(detail, "weight") == expected
