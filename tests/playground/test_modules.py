"""Tests of the page's modules without a browser: their unit tests, by node, and their types, by TypeScript."""

import shutil
import subprocess
from pathlib import Path

import pytest
from playwright._impl._driver import compute_driver_executable

FOLDER = Path(__file__).parent
STATIC = FOLDER.parents[1] / "service" / "playground" / "static"
TYPESCRIPT = FOLDER / "node_modules" / "typescript" / "bin" / "tsc"


@pytest.fixture(scope="module")
def node() -> str:
    """Return node of the system, or the one that Playwright contains."""
    path = shutil.which("node") or compute_driver_executable()[0]
    if not Path(path).exists():
        pytest.skip("node is not installed")
    return str(path)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER)


def test_unit_tests_of_the_modules(node: str) -> None:
    files = sorted(FOLDER.glob("*.mjs"))
    assert files
    process = run(node, "--test", "--test-reporter=tap", *files)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr
    assert "# fail 0" in process.stdout


def test_types_of_the_modules(node: str) -> None:
    if not TYPESCRIPT.exists():
        pytest.skip("TypeScript is not installed (npm ci --prefix tests/playground)")
    process = run(node, TYPESCRIPT, "--project", FOLDER)
    assert process.returncode == 0, process.stdout


def test_modules_import_only_each_other() -> None:
    imports = [
        line for path in STATIC.glob("*.js") for line in path.read_text("utf-8").splitlines() if " from " in line
    ]
    assert all("'./" in line for line in imports if line.startswith(("import ", "export ")))


def test_page_is_small_enough_to_read() -> None:
    lines = [len(path.read_text("utf-8").splitlines()) for path in STATIC.rglob("*.js")]
    assert sum(lines) < 2800
    assert max(lines) < 450
