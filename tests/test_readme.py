"""Run every command in the README and in docs, in order, and compare its output with the one shown below it."""

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, chdir, suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.app import create_app
from service.cli.main import app
from service.configuration.settings import Settings, load_settings
from tests.servers import open_client, start_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
IN_PROCESS_COMMANDS = tuple(f"corr2d {name} " for name in ("correlate", "conv2d", "train", "kernels"))
"""Beginnings of commands that run in this process; the others, such as `corr2d explain`, run in one of their own."""

RUNNERS = {"sh": ["bash", "-e"], "python": [sys.executable, "-"], "js": ["node", "--input-type=module", "-"]}


@dataclass(frozen=True)
class CodeBlock:
    language: str
    text: str


def parse_blocks(page: str = "README.md") -> list[CodeBlock]:
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [CodeBlock(*fence) for fence in fences]


def is_close(shown: Any, got: Any) -> bool:
    """Return whether both are equal; numbers are compared to 5 digits."""
    if isinstance(shown, float) and isinstance(got, float):
        return shown == pytest.approx(got, rel=1e-5, abs=1e-9)
    if isinstance(shown, dict) and isinstance(got, dict):
        return shown.keys() == got.keys() and all(is_close(shown[key], got[key]) for key in shown)
    if isinstance(shown, list) and isinstance(got, list):
        return len(shown) == len(got) and all(map(is_close, shown, got))
    if isinstance(shown, str) and isinstance(got, str):
        # "..." stands for text that depends on the machine.
        return re.fullmatch(".*".join(map(re.escape, shown.split("..."))), got, re.DOTALL) is not None
    return bool(shown == got)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with start_server(create_app(Settings(device="cpu"))) as address, open_client(address):
        yield address


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_described_service(command: str) -> AbstractContextManager[str]:
    """Start a service with the flags of a `corr2d serve` command."""
    flags = re.findall(r"--([\w-]+) (\S+)", command)
    settings = load_settings(device="cpu", **{name.replace("-", "_"): value for name, value in flags})
    return start_server(create_app(settings))


def run_block(block: CodeBlock, address: str, folder: Path) -> str:
    text = block.text.replace("http://localhost:8000", address).replace("localhost:8000", address)
    if block.language != "sh":
        return run_script(RUNNERS[block.language], text, folder)
    output = ""
    for in_process, commands in groupby(split_commands(text), is_offline_command):
        if in_process:
            output += "".join(run_offline_command(command, folder) for command in commands)
        else:
            output += run_script(RUNNERS["sh"], "".join(commands), folder)
    return output


def split_commands(text: str) -> Iterator[str]:
    """Yield the commands of a shell script; one continues on the next line after a backslash or inside quotes."""
    command = ""
    for line in text.splitlines(keepends=True):
        command += line
        with suppress(ValueError):
            shlex.split(command)
            if not command.endswith("\\\n"):
                yield command
                command = ""
    assert not command


def is_offline_command(command: str) -> bool:
    """Return whether a line is a command of corr2d alone, without other shell syntax, that needs no process."""
    return command.startswith(IN_PROCESS_COMMANDS) and not re.search(r"[|<>;&$`*]", command)


def run_offline_command(command: str, folder: Path) -> str:
    """Run a corr2d command in this process: the start of a process, with torch, takes seconds."""
    with chdir(folder):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return result.stdout


def run_script(runner: list[str], script: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        runner,
        input=script,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_command_gives_the_response_shown_below_it(
    address: str, tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch, servers: ExitStack
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    everything = [*parse_blocks(page), CodeBlock("", "")]
    checked = 0
    for block, below in pairwise(everything):
        if block.language not in RUNNERS or block.text.startswith("make "):
            continue
        if block.text.startswith("corr2d serve"):
            address = servers.enter_context(start_described_service(block.text))
            servers.enter_context(open_client(address))
            continue
        if block.language == "js" and shutil.which("node") is None:
            continue
        output = run_block(block, address, tmp_path)
        if below.language == "json":
            assert is_close(json.loads(below.text), json.loads(output)), output
        else:
            assert below.language == "text", f"no output shown below {block.text}"
            assert doctest.OutputChecker().check_output(below.text, output, doctest.ELLIPSIS), output
        checked += 1
    assert checked >= 5 or page != "README.md"


def test_both_commands_are_shown() -> None:
    (first, *_) = parse_blocks()
    assert first.text.splitlines() == ["make serve", "make test"]
    for line in first.text.splitlines():
        target = line.removeprefix("make ")
        assert re.search(rf"^{target}:.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_images_match_the_commands_that_draw_them(tmp_path: Path, address: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    by_command, over_http = [block for block in parse_blocks() if "-o edges.png" in block.text]
    for draw in (by_command, over_http):
        run_block(draw, address, tmp_path)
        drawn, shown = (np.asarray(Image.open(folder / "edges.png")) for folder in (tmp_path, ROOT / "docs" / "images"))
        np.testing.assert_array_equal(drawn, shown)
        (tmp_path / "edges.png").unlink()
