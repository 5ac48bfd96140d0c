"""Commands that run core on files, without a server."""

import math
import signal
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from service import loss_curve
from service.codecs import json_encoder, npy, npz
from service.codecs.registry import FILE_READERS, FILE_WRITERS
from service.errors import ServiceError

COMPILE_COST_S = 1.0
"""Seconds to compile an engine; a command computes once, so the choice of engine includes them."""

SPARKLINE_BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 60

REDRAW_INTERVAL_S = 0.05
"""Seconds between updates of the progress bar; a step may take only microseconds."""

PAIR_FIELDS = ("input", "target", "weights")
"""Arrays of a pair, in the order of core's tuples."""

PLOT_WRITERS: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {
    ".svg": loss_curve.draw_svg,
    ".png": loss_curve.draw_png,
}
"""Functions that plot a loss history, by file suffix."""


def correlate(input: Path, kernel: str, output: Path | None, **options: Any) -> None:
    """Correlate a file with a kernel, named or in a .npy file, and write or print the result."""
    taps = read_array(Path(kernel)) if Path(kernel).suffix.lower() in FILE_READERS else kernel
    images = read_array(input)
    start = time.perf_counter()
    result = core.correlate(images, taps, **options, machine=_create_machine())
    _write_result(result, output, f"{input} {images.shape}", start)


def conv2d(input: Path, weight: Path, bias: Path | None, output: Path | None, **options: Any) -> None:
    """Apply a Conv2d layer to a file, with weight and bias from files, and write or print the output."""
    images = read_array(input)
    offsets = None if bias is None else read_array(bias)
    start = time.perf_counter()
    result = core.conv2d(images, read_array(weight), offsets, **options, machine=_create_machine())
    _write_result(result, output, f"{input} {images.shape}", start)


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
    """Print a table of the engines for arrays of these shapes: times, the choice, or why an engine does not apply."""
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
        times = (_format_milliseconds(seconds) for seconds in (entry.predicted_seconds, entry.measured_seconds))
        table.add_row(entry.engine, entry.method, *times, "chosen" if entry.chosen else entry.unsupported_reason)
    threads_used = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    typer.echo(
        f"{problem.operations / 1e9:.3g} Gflop as direct sums, output {problem.output_size}, "
        f"{threads_used}, {machine.flops / 1e9:.0f} Gflop/s each, {machine.bandwidth / 1e9:.1f} GB/s"
    )
    Console().print(table)


def _format_milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g}"


def train(
    files: Mapping[str, Path | None],
    output: Path | None,
    *,
    plot: Path | None,
    ridge_path: Path | None,
    covariance: Path | None,
    padding: int | Sequence[int] | str | None,
    **options: Any,
) -> None:
    """Learn the kernel that maps one file to another, with a progress bar, and write or print it.

    files: the array arguments of fit_kernel, at least `input` and `target`; the arrays of a validation pair are named
    `validation_input`, `validation_target` and `validation_weights`. If no padding is given and the target is as large
    as the input, the target is cropped to the pixels that depend on the input alone.
    """
    # Checked first: a long fit whose result cannot be written would be lost.
    outputs = (output, FILE_WRITERS), (plot, PLOT_WRITERS), (ridge_path, {".npz"}), (covariance, {".npy"})
    for path, suffixes in outputs:
        if path is not None:
            _check_writable(path, suffixes)
    if plot is not None and (reason := loss_curve.unsupported_reason()):
        raise ValueError(f"{plot} cannot be written: {reason}")
    arrays: dict[str, Any] = {name: read_array(path) for name, path in files.items() if path is not None}
    held_out = _pop_validation_pair(arrays)
    size = arrays["target"].shape[-2:]
    region = _find_valid_region(arrays, **options) if padding is None and arrays["input"].shape[-2:] == size else None
    if region is not None:
        rows, columns = (part.stop - part.start for part in region)
        typer.echo(
            f"learning from the inner {rows} x {columns} of {size[0]} x {size[1]} pixels: "
            f"the values outside {files['input']} are unknown (use --padding same to assume zeros)"
        )
        _crop(arrays, region, size)
    if padding is None and held_out:
        _crop_to_valid_region(held_out, arrays, **options)
    validation: list[Any] | None = [tuple(held_out.get(name) for name in PAIR_FIELDS)] if held_out else None
    fit = core.fit_kernel_steps(
        **arrays,
        validation=validation,
        padding=0 if padding is None else padding,
        ridge_path=ridge_path is not None,
        covariance=covariance is not None,
        **options,
    )
    result = run_with_progress(
        fit,
        steps=None if options["solver"] == "exact" else options["steps"],
        # With refuse_divergence, the error message reports it.
        warn_divergence=not options["refuse_divergence"],
    )
    typer.echo(result.message)
    typer.echo(f"loss {draw_sparkline([*result.loss_history, result.final_loss])} (log scale)")
    kernel = result.kernel.cpu().numpy()
    if output is None:
        typer.echo(json_encoder.dumps(kernel.round(6)))
    else:
        write_array(output, kernel)
        typer.echo(f"kernel {kernel.shape} -> {output}")
    if result.bias is not None:
        typer.echo(f"bias {json_encoder.dumps(result.bias.cpu().numpy().round(6)).decode()}")
    if summary := _summarize(result):
        typer.echo(summary)
    _write_analysis(result, ridge_path, covariance)
    if plot is not None:
        plot.write_bytes(
            PLOT_WRITERS[plot.suffix.lower()]({name: getattr(result, name) for name in loss_curve.PLOTTED_FIELDS})
        )
        typer.echo(f"loss per step -> {plot}")


def _pop_validation_pair(arrays: dict[str, Any]) -> dict[str, Any]:
    """Remove the validation pair from `arrays` and return it. Raises ValueError if its input or target is missing."""
    held_out = {name: arrays.pop(f"validation_{name}") for name in PAIR_FIELDS if f"validation_{name}" in arrays}
    if held_out and not {"input", "target"} <= held_out.keys():
        raise ValueError("a validation pair needs both --validation-input and --validation-target")
    return held_out


def _crop_to_valid_region(held_out: dict[str, Any], arrays: Mapping[str, Any], **options: Any) -> None:
    """Crop a validation target that is as large as its input to its interior."""
    size = held_out["target"].shape[-2:]
    region = _find_valid_region({**arrays, **held_out}, **options) if held_out["input"].shape[-2:] == size else None
    if region is not None:
        _crop(held_out, region, size)


def _crop(arrays: dict[str, NDArray[Any]], region: tuple[slice, slice], size: Sequence[int]) -> None:
    """Crop a target of that size, and its weights, to the region."""
    for name in ("target", "weights"):
        if name in arrays and arrays[name].shape[-2:] == size:
            arrays[name] = arrays[name][(..., *region)]


def _write_analysis(result: core.FitResult, ridge_path: Path | None, covariance: Path | None) -> None:
    """Write the ridge path and the covariance of a fit, if their files are given."""
    if ridge_path is not None:
        arrays_of_path = {name: getattr(result, name) for name in core.RIDGE_PATH_FIELDS}
        found = {name: _to_numpy(array) for name, array in arrays_of_path.items() if array is not None}
        _write_buffers(ridge_path, npz.encode(found), f"kernels of {len(found['ridge_path'])} ridges")
    if covariance is not None:
        if result.covariance is None:
            typer.echo(f"the examples do not determine a covariance: {covariance} is not written")
        else:
            matrix = _to_numpy(result.covariance)
            _write_buffers(covariance, npy.encode(matrix), f"covariance {matrix.shape}")


def _find_valid_region(
    arrays: Mapping[str, NDArray[Any]],
    *,
    kernel_size: object,
    max_kernel_size: object,
    stride: object,
    dilation: object,
    padding_mode: str,
    **_: object,
) -> tuple[slice, slice] | None:
    """Return the rows and columns of a target, as large as its input, that do not depend on values outside the input.

    They are positioned as in correlate's mode "same"; for kernel_size "auto" they are those of the largest kernel.
    Return None if they are the whole target, or if core rejects the options.
    """
    size = arrays["input"].shape[-2:]
    taps, apart = _parse_pair(kernel_size), _parse_pair(dilation)
    if kernel_size == "auto":
        largest = _parse_pair(core.DEFAULT_MAX_KERNEL_SIZE if max_kernel_size is None else max_kernel_size)
        taps = None if largest is None else (min(largest[0], size[0]), min(largest[1], size[1]))
    if taps is None and "initial_kernel" in arrays:
        taps = _parse_pair(arrays["initial_kernel"].shape[-2:])
    if taps is None or apart is None or len(size) != 2 or _parse_pair(stride) != (1, 1) or padding_mode != "zeros":
        return None
    spans = [step * (count - 1) + 1 for count, step in zip(taps, apart, strict=True)]
    if spans == [1, 1] or not all(1 <= span <= pixels for span, pixels in zip(spans, size, strict=True)):
        return None
    rows, columns = (slice((span - 1) // 2, pixels - span // 2) for span, pixels in zip(spans, size, strict=True))
    return rows, columns


def _parse_pair(option: object) -> tuple[int, int] | None:
    """Return an option as (rows, columns), or None if it is neither an integer nor a pair of integers."""
    match option:
        case int():
            return option, option
        case [int() as rows, int() as columns]:
            return rows, columns
    return None


def run_with_progress(
    fit: Generator[core.Progress, None, core.FitResult], *, steps: int | None, warn_divergence: bool
) -> core.FitResult:
    """Run a fit to its end, with a progress bar if stderr is a terminal.

    steps: total of the bar, None if unknown. warn_divergence: report a predicted divergence before the first step.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None, loss="")
        last_drawn_at = -math.inf

        def show(progress: core.Progress) -> None:
            nonlocal last_drawn_at
            if interrupts:
                raise KeyboardInterrupt
            if isinstance(progress, core.Forecast):
                if warn_divergence and progress.prediction == "diverges":
                    console.print(progress.message, markup=False, highlight=False, soft_wrap=True)
                bar.reset(task, description="learning", total=steps)
            elif time.monotonic() >= last_drawn_at + REDRAW_INTERVAL_S:
                if isinstance(progress, core.Reading):
                    bar.update(task, completed=progress.done, total=progress.of)
                else:
                    held_out = progress.validation_loss
                    shown = "" if held_out is None else f", validation loss {held_out:.6g}"
                    bar.update(task, completed=progress.number, loss=f"loss {progress.loss:.6g}{shown}")
                last_drawn_at = time.monotonic()

        with _record_interrupts() as interrupts:
            result = core.run_to_end(fit, show)
        bar.update(task, completed=result.steps, total=steps or result.steps, loss=f"loss {result.final_loss:.6g}")
    return result


@contextmanager
def _record_interrupts() -> Iterator[list[int]]:
    """Yield a list that SIGINT appends to. A second SIGINT raises KeyboardInterrupt.

    Python ignores a KeyboardInterrupt that is raised in a callback, such as those of weak references.
    """
    interrupts: list[int] = []

    def record(number: int, _: object) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, record)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _summarize(result: core.FitResult) -> str:
    """Return the known facts about the best kernel as one line."""
    facts = []
    if result.best_possible_loss is not None:
        facts.append(f"smallest possible loss {result.best_possible_loss:.6g}")
    if result.rank is not None:
        facts.append(f"rank {result.rank} of {result.unknowns}")
    if result.condition_number is not None:
        facts.append(f"condition number {result.condition_number:.4g}")
    if result.ridge:
        facts.append(f"ridge {result.ridge:.4g}")
    if result.residual_std is not None:
        facts.append(
            f"residual standard deviation {', '.join(f'{value:.4g}' for value in result.residual_std.tolist())}"
        )
    return ", ".join(facts)


def read_array(path: Path) -> NDArray[Any]:
    """Return the array in a file of a format in FILE_READERS. Raises ValueError if the file cannot be decoded."""
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}; supported: {', '.join(FILE_READERS)}"
        )
    try:
        return reader(path.read_bytes())
    except (ServiceError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write the array in the format of the suffix. Raises ValueError if that format cannot hold it."""
    _check_writable(path, FILE_WRITERS)
    try:
        path.write_bytes(b"".join(FILE_WRITERS[path.suffix.lower()](array)))
    except (ServiceError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _write_buffers(path: Path, parts: Sequence[bytes | memoryview], content: str) -> None:
    """Write a file and report its content."""
    path.write_bytes(b"".join(parts))
    typer.echo(f"{content} -> {path}")


def _check_writable(path: Path, suffixes: Collection[str]) -> None:
    """Raise ValueError for an unsupported suffix, FileNotFoundError for a missing folder."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: cannot write {path.suffix or 'a file without a suffix'}; supported: {', '.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: No such file or directory: {path.parent}")


def draw_sparkline(values: Sequence[float]) -> str:
    """Return positive numbers as one line of bars on a log scale, thinned to SPARKLINE_WIDTH."""
    step = max(1, math.ceil(len(values) / SPARKLINE_WIDTH))
    heights = [math.log(value) for value in values[::step] if value > 0 and math.isfinite(value)]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    scale = (len(SPARKLINE_BARS) - 1) / (high - low) if high > low else 0
    return "".join(SPARKLINE_BARS[round((height - low) * scale)] for height in heights)


def _create_machine() -> core.Machine:
    return core.Machine(core.usable_cores(), compile_seconds=COMPILE_COST_S)


def _write_result(result: core.Result, output: Path | None, source: str, start: float) -> None:
    array = _to_numpy(result.output)
    milliseconds = 1000 * (time.perf_counter() - start)
    if output is None:
        typer.echo(json_encoder.dumps(array))
        return
    write_array(output, array)
    typer.echo(f"{source} -> {output} {array.shape}, engine {result.engine} on {result.device}, {milliseconds:.1f} ms")


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.cpu())
