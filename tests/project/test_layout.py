"""Folders and files stay small enough to find one's way by their names."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAX_FILES_PER_FOLDER = 25
MAX_LINES_PER_FILE = 450

SOURCE_SUFFIXES = (".py", ".js", ".css", ".html")

LONG_FILES = {
    "service/codecs/json_scanner.py",  # Numba compiles it as one module
}
"""Source files that may be longer."""


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Return the files of the repository, with new ones that git does not ignore, relative to its root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout: they tell which files belong to the repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in sorted(set(listed.split("\0"))) if (ROOT / name).is_file()]


def test_folders_have_few_files(files: list[Path]) -> None:
    counts = Counter(path.parent.as_posix() for path in files)
    assert counts["service"] > 1
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES_PER_FOLDER} == {}


def test_source_files_are_short(files: list[Path]) -> None:
    sources = [path for path in files if path.suffix in SOURCE_SUFFIXES and path.parts[0] != "tests"]
    assert Path("service/app.py") in sources
    lengths = {path.as_posix(): len((ROOT / path).read_text("utf-8").splitlines()) for path in sources}
    long = {name for name, lines in lengths.items() if lines > MAX_LINES_PER_FILE}
    # A file that is divided is removed from LONG_FILES.
    assert long == LONG_FILES
