"""One computation on one or many files: each result is written or printed, and files that fail are reported."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import core
from service.cli.error_messages import EXPECTED_ERRORS, describe_error
from service.cli.files import STDIO, Source, Target, resolve_targets
from service.cli.printing import print_array

COMPILE_COST_S = 1.0
"""Seconds to compile an engine. A command computes each file once, so the choice of engine includes its part."""

ComputeFn = Callable[[NDArray[Any], core.Machine], core.Result]
"""Function that computes the result of one array on a machine."""


def process_files(
    inputs: Sequence[Path],
    output: str | None,
    compute: ComputeFn,
    *,
    dtype: str,
    file_format: str | None,
    png: str | None,
) -> None:
    """Compute the result of every input, and write it to the output, a file or folder, or print it.

    dtype: that of the computation.
    A single input that fails raises its error. Of several, those that fail are reported on stderr; at the end,
    ValueError is raised with their number.
    """
    sources = [Source.open(path) for path in inputs]
    targets = resolve_targets(sources, output, file_format, png)
    machine = core.Machine(core.usable_cores(), compile_seconds=COMPILE_COST_S / len(sources))
    if len(sources) == 1:
        _process_file(sources[0], targets[0], compute, machine, dtype)
        return
    failed = 0
    with _show_progress(len(sources)) as advance:
        for source, target in zip(sources, targets, strict=True):
            try:
                _process_file(source, target, compute, machine, dtype)
            except EXPECTED_ERRORS as error:
                message = describe_error(error)
                if message is None:
                    raise
                failed += 1
                typer.echo(f"corr2d: {source}: {message.removeprefix(f'{source}: ')}", file=sys.stderr)
            advance()
    if failed:
        raise ValueError(f"{failed} of {len(sources)} files failed")


def _process_file(source: Source, target: Target | None, compute: ComputeFn, machine: core.Machine, dtype: str) -> None:
    images = source.read_array("input", dtype)
    start = time.perf_counter()
    result = compute(images, machine)
    array = np.asarray(result.output.cpu())
    milliseconds = 1000 * (time.perf_counter() - start)
    if target is None:
        print_array(array)
        return
    target.write({"output": array})
    typer.echo(
        f"{source} {images.shape} -> {target} {array.shape}, "
        f"engine {result.engine} on {result.device}, {milliseconds:.1f} ms",
        file=sys.stderr if target.path == STDIO else sys.stdout,
    )


@contextmanager
def _show_progress(files: int) -> Iterator[Callable[[], None]]:
    """Yield a function that counts a file in a progress bar, which is shown if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines that are written to sys.stdout and sys.stderr appear above the bar, unless they go to a file or pipe.
    redirect_stdout = sys.stdout.isatty()
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=redirect_stdout) as bar:
        task = bar.add_task("files", total=files)
        yield lambda: bar.advance(task)
