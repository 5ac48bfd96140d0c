"""The commands that need no server: the same core, on files."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import core
from service.codecs import FILE_READERS, FILE_WRITERS, json
from service.errors import ServiceError

COMPILING = 1.0
"""Seconds that compiling an engine takes: a single convolution must be worth them."""

BARS = "▁▂▃▄▅▆▇█"
PLOT_WIDTH = 60


def correlate(input: Path, kernel: str, output: Path | None, **options: Any) -> None:
    """Correlate a file with a kernel, named or in a .npy file, and write or print the result."""
    taps = read_array(Path(kernel)) if Path(kernel).suffix.lower() in FILE_READERS else kernel
    images = read_array(input)
    start = time.perf_counter()
    result = core.correlate(images, taps, **options, machine=_machine())
    _deliver(result, output, f"{input} {images.shape}", start)


def conv2d(input: Path, weight: Path, bias: Path | None, output: Path | None, **options: Any) -> None:
    """A Conv2d layer's output of a file, with weight and bias from files, written or printed."""
    images = read_array(input)
    offsets = None if bias is None else read_array(bias)
    start = time.perf_counter()
    result = core.conv2d(images, read_array(weight), offsets, **options, machine=_machine())
    _deliver(result, output, f"{input} {images.shape}", start)


def explain(
    input: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    rank: int | None,
    threads: int | None,
    method: Any,
    device: str,
    dtype: Any,
    **options: Any,
) -> None:
    """Print a table of the engines for arrays of these shapes: what they should take, take, or what is in their way."""
    machine = core.measure_machine(core.Machine(threads or core.usable_cores()))
    torch.set_num_threads(machine.threads)
    problem = core.conv2d_problem(
        (1,) * (4 - len(input)) + input,
        (1,) * (4 - len(weight)) + weight,
        None,
        **options,
        dtype=dtype,
        device=core.resolve_device(device).type,
        weight_name="kernel",
    )
    table = Table("engine", "method", "predicted ms", "measured ms", "", box=None)
    for column in table.columns[2:4]:
        column.justify = "right"
    for entry in core.explain(replace(problem, rank=rank), method=method, machine=machine):
        times = (_milliseconds(seconds) for seconds in (entry.predicted_seconds, entry.measured_seconds))
        table.add_row(entry.engine, entry.method, *times, "chosen" if entry.chosen else entry.obstacle)
    threads_used = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    typer.echo(
        f"{problem.operations / 1e9:.3g} Gflop as direct sums, output {problem.output_size}, "
        f"{threads_used}, {machine.flops / 1e9:.0f} Gflop/s each, {machine.bandwidth / 1e9:.1f} GB/s"
    )
    Console().print(table)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g}"


def train(input: Path, target: Path, output: Path | None, *, steps: int, **options: Any) -> None:
    """Learn the kernel that leads from one file to the other, with a progress bar, and write or print it."""
    fit = core.fit_kernel_steps(read_array(input), read_array(target), steps=steps, **options)
    columns = (TextColumn("learning"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.6g}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("learning", total=steps, loss=math.nan)
        result = core.exhaust(fit, lambda step: progress.update(task, completed=step.number, loss=step.loss))
    typer.echo(result.message)
    typer.echo(f"loss {sparkline([*result.loss_history, result.final_loss])} (log scale)")
    kernel = result.kernel.cpu().numpy()
    if output is None:
        typer.echo(json.dumps(kernel.round(6)))
    else:
        write_array(output, kernel)
        typer.echo(f"kernel {kernel.shape} -> {output}")
    if result.bias is not None:
        typer.echo(f"bias {json.dumps(result.bias.cpu().numpy().round(6)).decode()}")


def read_array(path: Path) -> NDArray[Any]:
    """The array in a file of a format in FILE_READERS. Raises ValueError saying what is wrong with it."""
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}; {', '.join(FILE_READERS)} can be"
        )
    try:
        return reader(path.read_bytes())
    except (ServiceError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write the array in the format of the suffix. Raises ValueError where that format cannot hold it."""
    writer = FILE_WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(
            f"{path}: cannot write {path.suffix or 'a file without a suffix'}; {', '.join(FILE_WRITERS)} can be"
        )
    try:
        path.write_bytes(b"".join(writer(array)))
    except (ServiceError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def sparkline(values: Sequence[float]) -> str:
    """Positive numbers as one line of bars on a log scale, thinned to PLOT_WIDTH."""
    step = max(1, math.ceil(len(values) / PLOT_WIDTH))
    heights = [math.log(value) for value in values[::step] if value > 0 and math.isfinite(value)]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((height - low) * scale)] for height in heights)


def _machine() -> core.Machine:
    return core.Machine(core.usable_cores(), compiling=COMPILING)


def _deliver(result: core.Result, output: Path | None, source: str, start: float) -> None:
    array = _array(result.output)
    milliseconds = 1000 * (time.perf_counter() - start)
    if output is None:
        typer.echo(json.dumps(array))
        return
    write_array(output, array)
    typer.echo(f"{source} -> {output} {array.shape}, engine {result.engine} on {result.device}, {milliseconds:.1f} ms")


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.cpu())
