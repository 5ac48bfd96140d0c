"""Source, messages and docs use the standard words of the field."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("corr2d", "core", "service", "tests", "docs", "benchmarks", "monitoring", ".github")
FILES = (
    "hatch_build.py",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "CITATION.cff",
    ".pre-commit-config.yaml",
    "Makefile",
    "Dockerfile",
    "docker-compose.yml",
    "pyproject.toml",
)
SUFFIXES = (".py", ".md", ".json", ".yml", ".html", ".css", ".js", ".mjs")

UNCLEAR_WORDS = re.compile(
    r"\b(whoever|nobody|everybody|somebody|in vain|what came|beside|foret(?:old|ell)|hazards?"
    r"|mercy|hopeless|refusals?|answerers?|obstacles?)\b|(?<!there )\b(?:is|are) no (?!longer|more)",
    re.IGNORECASE,
)

RESULTS = set((ROOT / "benchmarks").glob("*.md"))
"""Written by the benchmarks."""

INSTALLED = "node_modules"
"""Folder of packages that npm installs."""

WIRE_NAMES = re.compile(r"refuse_divergence|corr2d_refused_total")


def list_texts() -> Iterator[Path]:
    for folder in FOLDERS:
        paths = sorted((ROOT / folder).rglob("*"))
        yield from (
            path for path in paths if path.suffix in SUFFIXES and path not in RESULTS and INSTALLED not in path.parts
        )
    yield from (ROOT / name for name in FILES)


@pytest.mark.parametrize("path", list(list_texts()), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path: Path) -> None:
    if path == Path(__file__):
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"{number}: {match[0]}"
        for number, line in enumerate(lines, 1)
        for match in UNCLEAR_WORDS.finditer(WIRE_NAMES.sub("", line))
    ]
    assert found == [], (
        "use the standard word: rejected, response, d2l example, case, unsupported reason, not a valid ..."
    )
