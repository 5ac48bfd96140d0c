"""Commands that run core on files, without a server."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
from service import exit_codes
from service.cli.batch import process_files
from service.cli.files import STDIO, Target, check_writable, name_input, parse_format, read_array, read_kernel
from service.cli.printing import draw_sparkline, print_array, round_significant
from service.codecs import json_encoder, loss_curve, npy, npz

REDRAW_INTERVAL_S = 0.05
"""Seconds between updates of the progress bar; a step may take only microseconds."""

PAIR_FIELDS = ("input", "target", "weights")
"""Arrays of a pair, in the order of core's tuples."""

ReportFn = Callable[[str], None]
"""Function that prints a line about the result."""

PLOT_WRITERS: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {
    ".svg": loss_curve.draw_svg,
    ".png": loss_curve.draw_png,
}
"""Functions that plot a loss history, by file suffix."""


def correlate(
    inputs: Sequence[Path],
    kernel: str,
    output: str | None,
    *,
    file_format: str | None,
    png: str | None,
    **options: Any,
) -> None:
    """Correlate files with one kernel, a name, a JSON matrix or a file, and write or print the results."""
    taps = read_kernel(kernel, options["dtype"])

    def compute(images: NDArray[Any], machine: core.Machine) -> core.Result:
        return core.correlate(images, taps, **options, machine=machine)

    process_files(inputs, output, compute, dtype=options["dtype"], file_format=file_format, png=png)


def conv2d(
    inputs: Sequence[Path],
    weight: Path,
    bias: Path | None,
    output: str | None,
    *,
    file_format: str | None,
    png: str | None,
    **options: Any,
) -> None:
    """Apply a Conv2d layer to files, with weight and bias from files, and write or print the outputs."""
    filters = read_array(weight, "weight", options["dtype"])
    offsets = None if bias is None else read_array(bias, "bias", options["dtype"])

    def compute(images: NDArray[Any], machine: core.Machine) -> core.Result:
        return core.conv2d(images, filters, offsets, **options, machine=machine)

    process_files(inputs, output, compute, dtype=options["dtype"], file_format=file_format, png=png)


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
    file_format: str | None,
    plot: Path | None,
    ridge_path: Path | None,
    covariance: Path | None,
    padding: int | Sequence[int] | str | None,
    **options: Any,
) -> None:
    """Learn the kernel that maps one file to another, with a progress bar, and write or print it.

    files: the array arguments of fit_kernel, at least `input` and `target`; the arrays of a validation pair are named
    `validation_input`, `validation_target` and `validation_weights`. If no padding is given and the target is as large
    as the input, the target is cropped to the pixels that depend on the input alone. Raises typer.Exit after a descent
    that diverged, unless validation has found a kernel.
    """
    # Checked first: a long fit whose result cannot be written would be lost.
    target = _open_target(output, file_format)
    for path, suffixes in (plot, PLOT_WRITERS), (ridge_path, {".npz"}), (covariance, {".npy"}):
        if path is not None:
            check_writable(path, suffixes)
    if plot is not None and (reason := loss_curve.unsupported_reason()):
        raise ValueError(f"{plot} cannot be written: {reason}")
    report = partial(typer.echo, err=target is not None and target.path == STDIO)
    arrays: dict[str, Any] = {name: read_array(path, name) for name, path in files.items() if path is not None}
    held_out = _pop_validation_pair(arrays)
    size = arrays["target"].shape[-2:]
    region = _find_valid_region(arrays, **options) if padding is None and arrays["input"].shape[-2:] == size else None
    if region is not None:
        rows, columns = (part.stop - part.start for part in region)
        report(
            f"learning from the inner {rows} x {columns} of {size[0]} x {size[1]} pixels: "
            f"the values outside {name_input(files['input'])} are unknown (use --padding same to assume zeros)"
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
    _write_fit(result, target, report)
    _write_analysis(result, ridge_path, covariance, report)
    if plot is not None:
        plot.write_bytes(
            PLOT_WRITERS[plot.suffix.lower()]({name: getattr(result, name) for name in loss_curve.PLOTTED_FIELDS})
        )
        report(f"loss per step -> {plot}")
    if result.status is core.Status.DIVERGED and validation is None:
        raise typer.Exit(exit_codes.COMMAND_FAILED)


def _write_fit(result: core.FitResult, target: Target | None, report: ReportFn) -> None:
    """Write a fit, or print its kernel with standard errors, and report its message, loss and diagnostics."""
    report(result.message)
    report(f"loss {draw_sparkline([*result.loss_history, result.final_loss])} (log scale)")
    kernel = _to_numpy(result.kernel)
    if target is None:
        print_array(kernel.round(6))
    elif target.holds_names:
        fields = _collect_fields(result)
        target.write(fields if target.suffix == ".json" else _as_lists(fields))
        report(f"kernel {kernel.shape} and diagnostics -> {target}")
    else:
        target.write({"kernel": kernel})
        report(f"kernel {kernel.shape} -> {target}")
    if result.standard_errors is not None:
        errors = _to_numpy(result.standard_errors)
        if target is None:
            print_array(round_significant(errors), "standard errors of the best kernel")
        else:
            report(f"standard errors of the best kernel {errors.min():.4g} to {errors.max():.4g}")
    if result.bias is not None:
        report(f"bias {json_encoder.dumps(_to_numpy(result.bias).round(6)).decode()}")
        if result.bias_standard_errors is not None:
            errors = round_significant(_to_numpy(result.bias_standard_errors))
            report(f"standard errors of the best bias {json_encoder.dumps(errors).decode()}")
    if summary := _summarize(result):
        report(summary)


def _open_target(output: Path | None, file_format: str | None) -> Target | None:
    """Return the target of a fit, None if it is printed; stdout receives JSON unless a format is given."""
    if output == STDIO:
        return Target.open(output, ".json" if file_format is None else parse_format(file_format))
    if file_format is not None:
        raise ValueError("--format applies to -o - only: the suffix of a file names its format")
    return None if output is None else Target.open(output, output.suffix.lower())


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


def _write_analysis(result: core.FitResult, ridge_path: Path | None, covariance: Path | None, report: ReportFn) -> None:
    """Write the ridge path and the covariance of a fit, if their files are given."""
    if ridge_path is not None:
        arrays_of_path = {name: getattr(result, name) for name in core.RIDGE_PATH_FIELDS}
        found = {name: _to_numpy(array) for name, array in arrays_of_path.items() if array is not None}
        _write_buffers(ridge_path, npz.encode(found), f"kernels of {len(found['ridge_path'])} ridges", report)
    if covariance is not None:
        if result.covariance is None:
            report(f"the examples do not determine a covariance: {covariance} is not written")
        else:
            matrix = _to_numpy(result.covariance)
            _write_buffers(covariance, npy.encode(matrix), f"covariance {matrix.shape}", report)


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


def _write_buffers(path: Path, parts: Sequence[bytes | memoryview], content: str, report: ReportFn) -> None:
    """Write a file and report its content."""
    path.write_bytes(b"".join(parts))
    report(f"{content} -> {path}")


def _collect_fields(result: core.FitResult) -> dict[str, Any]:
    """Return all fields of a fit, with arrays as numpy arrays; the first is the kernel."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    first = {name: fields.pop(name) for name in ("kernel", "bias")}
    return {
        name: _to_numpy(value) if isinstance(value, Tensor) else value for name, value in {**first, **fields}.items()
    }


def _as_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with each number as a list of one: binary formats hold arrays and lists of numbers."""
    return {name: [value] if isinstance(value, int | float) else value for name, value in fields.items()}


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.cpu())
