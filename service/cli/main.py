"""The command line: `corr2d --help`.

Each command imports its modules when it runs, so that `--help` and `version` print at once: importing torch takes
seconds.
"""

import platform
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.cli.exits import load_settings_or_exit, report_errors
from service.cli.options import (
    EXISTING_FILE,
    PADDING_HELP,
    WRITABLE_FORMATS,
    DeviceOption,
    DilationOption,
    DtypeOption,
    FormatOption,
    InitialArrayOption,
    InputArgument,
    InputsArgument,
    MethodOption,
    OutputOption,
    PaddingModeOption,
    PaddingOption,
    PngOption,
    StrideOption,
    add_settings_options,
    format_setting,
    parse_integers,
    parse_numbers,
    parse_sizes,
)
from service.configuration.settings import ENV_PREFIX, Settings, list_variables
from service.imports import without_garbage_collection
from service.version import VERSION

app = typer.Typer(
    name="corr2d",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@add_settings_options
def serve(**flags: object) -> None:
    """Serve HTTP requests until SIGINT or SIGTERM. Every flag is also a CORR2D_* environment variable."""
    from service.cli.serve import serve as serve_settings

    serve_settings(flags)


@app.command()
def correlate(
    inputs: InputsArgument,
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel",
            "-k",
            help='a name ("corr2d kernels" lists them), a JSON matrix such as "[[1,0,-1]]", or a file',
        ),
    ],
    output: OutputOption = None,
    format: FormatOption = None,
    png: PngOption = None,
    mode: Annotated[str, typer.Option(help="valid, same or full")] = "valid",
    boundary: Annotated[str, typer.Option(help="zeros, constant, replicate, reflect, symmetric or circular")] = "zeros",
    fill_value: Annotated[float, typer.Option(help="value outside the input, for boundary constant")] = 0.0,
    operation: Annotated[
        str, typer.Option(help="correlate, or convolve (flips the kernel in both axes)")
    ] = "correlate",
    method: MethodOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Cross-correlate every plane of a file, or of many files, with one kernel.

    corr2d correlate photo.png --kernel sobel_x --mode same -o edges.png

    corr2d correlate photos/*.jpg --kernel 'gaussian(2.0)' --mode same --png clip --format png -o blurred/
    """
    with without_garbage_collection():
        from service.cli import commands

    with report_errors():
        commands.correlate(
            inputs,
            kernel,
            output,
            file_format=format,
            png=png,
            mode=mode,
            boundary=boundary,
            fill_value=fill_value,
            operation=operation,
            method=method,
            device=device,
            dtype=dtype,
        )


@app.command()
def conv2d(
    inputs: InputsArgument,
    weight: Annotated[Path, typer.Argument(help="filters of shape (O, C/groups, h, w) or (h, w)", **EXISTING_FILE)],
    bias: Annotated[Path | None, typer.Option(help="file with an array of shape (O)", **EXISTING_FILE)] = None,
    output: OutputOption = None,
    format: FormatOption = None,
    png: PngOption = None,
    stride: StrideOption = "1",
    padding: PaddingOption = "0",
    dilation: DilationOption = "1",
    groups: int = 1,
    padding_mode: PaddingModeOption = "zeros",
    method: MethodOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Apply a Conv2d layer to a file, or to many files, as torch.nn.functional.conv2d defines it.

    corr2d conv2d images.npy weight.npy --stride 2 --padding same -o features.npy
    """
    with without_garbage_collection():
        from service.cli import commands

    with report_errors():
        commands.conv2d(
            inputs,
            weight,
            bias,
            output,
            file_format=format,
            png=png,
            stride=parse_integers(stride),
            padding=parse_integers(padding),
            dilation=parse_integers(dilation),
            groups=groups,
            padding_mode=padding_mode,
            method=method,
            device=device,
            dtype=dtype,
        )


@app.command()
def explain(
    input: Annotated[str, typer.Argument(help="size: 1024, 1080x1920, or NxCxHxW such as 8x3x224x224")],
    kernel: Annotated[str, typer.Argument(help="size: 15, 3x7, or OxCxhxw such as 64x3x7x7")],
    stride: StrideOption = "1",
    padding: PaddingOption = "0",
    dilation: DilationOption = "1",
    groups: int = 1,
    padding_mode: PaddingModeOption = "zeros",
    rank: Annotated[int | None, typer.Option(help="rank of the kernel; unset: full rank", min=1)] = None,
    method: MethodOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; unset: all available cores", min=1)] = None,
) -> None:
    """Show the predicted and the measured time of every engine for arrays of these sizes, and the choice.

    corr2d explain 1024 15 --rank 1
    """
    with without_garbage_collection():
        from service.cli import commands

    with report_errors():
        commands.explain(
            parse_sizes(input),
            parse_sizes(kernel),
            rank=rank,
            threads=threads,
            method=method,
            device=device,
            dtype=dtype,
            stride=parse_integers(stride),
            padding=parse_integers(padding),
            dilation=parse_integers(dilation),
            groups=groups,
            padding_mode=padding_mode,
        )


@app.command()
def train(
    input: InputArgument,
    target: Annotated[Path, typer.Argument(help="desired output for the input", **EXISTING_FILE)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="file for the whole result with standard errors (.json, .npz, .safetensors), or for the kernel alone "
            "(.npy, .png, ...); - for stdout; unset: the kernel and its standard errors are printed",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help=f"format of stdout with -o -: {WRITABLE_FORMATS}; unset: json")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot of the loss per step: .svg or .png")] = None,
    kernel_size: Annotated[
        str | None, typer.Option(help="an integer, rows,columns, or auto; unset: derived from the sizes of the files")
    ] = None,
    max_kernel_size: Annotated[
        str | None, typer.Option(help="largest size that auto compares: an integer, or rows,columns; unset: 13")
    ] = None,
    bias: Annotated[bool, typer.Option("--bias", help="learn a bias as well")] = False,
    initial_kernel: InitialArrayOption = None,
    initial_bias: InitialArrayOption = None,
    weights: Annotated[
        Path | None, typer.Option(help="file with the weights of the target values", **EXISTING_FILE)
    ] = None,
    validation_input: Annotated[
        Path | None,
        typer.Option(help="input of a validation pair, which the kernel is not fitted to", **EXISTING_FILE),
    ] = None,
    validation_target: Annotated[
        Path | None, typer.Option(help="target of the validation pair", **EXISTING_FILE)
    ] = None,
    validation_weights: Annotated[
        Path | None, typer.Option(help="weights of the validation target", **EXISTING_FILE)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="stop after this many steps without a smaller validation loss; unset: never")
    ] = None,
    solver: Annotated[
        str, typer.Option(help="sgd (gradient descent), momentum, nesterov, adam, or exact (the minimum)")
    ] = "sgd",
    learning_rate: Annotated[str, typer.Option(help="a number, or auto (derived from the curvature)")] = "0.03",
    steps: Annotated[int, typer.Option(help="updates of the kernel")] = 10,
    loss: Annotated[str, typer.Option(help="sum or mean (of squared residuals), huber or l1")] = "sum",
    huber_delta: Annotated[
        str | None, typer.Option(help="delta of loss huber: a number, or auto (derived from the residuals); unset: 1")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="stop when the excess loss or, if the smallest possible loss is unknown, the length of the gradient "
            "is at most this fraction of its initial value"
        ),
    ] = None,
    ridge: Annotated[
        str,
        typer.Option(help="weight of the sum of squared kernel entries in the loss; or auto (by cross-validation)"),
    ] = "0",
    ridge_path: Annotated[
        Path | None, typer.Option(help="write the kernels of 50 ridges and their cross-validation scores: .npz")
    ] = None,
    covariance: Annotated[Path | None, typer.Option(help="write the covariance of the unknowns: .npy")] = None,
    nonnegative: Annotated[
        bool, typer.Option("--nonnegative", help="require kernel entries >= 0 (constraints need --solver exact)")
    ] = False,
    sum_to: Annotated[float | None, typer.Option(help="required sum of the kernel entries of each filter")] = None,
    symmetric: Annotated[
        str | None,
        typer.Option(help="equal kernel entries: horizontal, vertical, both, rotation, transpose or full"),
    ] = None,
    separable: Annotated[int | None, typer.Option(help="maximum rank of each plane of the kernel")] = None,
    smoothness: Annotated[
        float, typer.Option(help="weight of the squared differences of neighbouring entries in the loss")
    ] = 0.0,
    momentum: Annotated[float | None, typer.Option(help="for solvers momentum and nesterov; unset: 0.9")] = None,
    betas: Annotated[str | None, typer.Option(help="for solver adam; unset: 0.9,0.999")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per step; unset: all")] = None,
    refuse_divergence: Annotated[
        bool, typer.Option("--refuse-divergence", help="stop with an error if the descent is predicted to diverge")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="seed of initial values and batches; unset: random")] = None,
    stride: StrideOption = "1",
    padding: Annotated[
        str | None,
        typer.Option(help=f"{PADDING_HELP}; unset: 0, and a target as large as the input is cropped to its interior"),
    ] = None,
    padding_mode: PaddingModeOption = "zeros",
    dilation: DilationOption = "1",
    groups: int = 1,
    device: DeviceOption = "auto",
) -> None:
    """Learn the kernel that maps one file to another.

    corr2d train before.png after.png --kernel-size 7 --solver exact -o kernel.npy

    corr2d train before.png after.png --kernel-size 7 --loss mean --learning-rate auto --steps 300 --plot loss.svg
    """
    with without_garbage_collection():
        from service.cli import commands

    with report_errors():
        commands.train(
            {
                "input": input,
                "target": target,
                "weights": weights,
                "validation_input": validation_input,
                "validation_target": validation_target,
                "validation_weights": validation_weights,
                "initial_kernel": initial_kernel,
                "initial_bias": initial_bias,
            },
            output,
            file_format=format,
            plot=plot,
            kernel_size=None if kernel_size is None else parse_integers(kernel_size),
            max_kernel_size=None if max_kernel_size is None else parse_integers(max_kernel_size),
            bias=bias,
            patience=patience,
            solver=solver,
            learning_rate=parse_numbers(learning_rate),
            steps=steps,
            loss=loss,
            huber_delta=None if huber_delta is None else parse_numbers(huber_delta),
            tolerance=tolerance,
            ridge=parse_numbers(ridge),
            ridge_path=ridge_path,
            covariance=covariance,
            nonnegative=nonnegative,
            sum_to=sum_to,
            symmetric=symmetric,
            separable=separable,
            smoothness=smoothness,
            momentum=momentum,
            betas=None if betas is None else parse_numbers(betas),
            batch_size=batch_size,
            refuse_divergence=refuse_divergence,
            seed=seed,
            stride=parse_integers(stride),
            padding=None if padding is None else parse_integers(padding),
            padding_mode=padding_mode,
            dilation=parse_integers(dilation),
            groups=groups,
            device=device,
        )


@app.command()
def kernels(
    name: Annotated[
        str | None, typer.Argument(help='kernel to print, such as "gaussian(2.0)"; unset: list all')
    ] = None,
) -> None:
    """List the named kernels, or print the entries of one."""
    from core import KERNELS, named_kernel

    if name is not None:
        with report_errors():
            for row in named_kernel(name).tolist():
                typer.echo("  ".join(f"{value:10.6g}" for value in row))
        return
    table = Table("kernel", "description", "example", box=None)
    for family in KERNELS.values():
        table.add_row(family.signature, family.description, family.example)
    Console().print(table)


@app.command()
@add_settings_options
def config(**flags: object) -> None:
    """Show every setting: its value, its origin (flag, environment, default or computed) and its meaning."""
    given = load_settings_or_exit(flags)
    from service.configuration.computed_settings import compute_defaults

    in_force = compute_defaults(given)
    variables = list_variables()
    table = Table("setting", "value", "from", "meaning", box=None)
    for name, field in Settings.model_fields.items():
        variable = ENV_PREFIX + name.upper()
        value = getattr(in_force, name)
        if flags[name] is not None:
            origin = "flag"
        elif variable in variables:
            origin = "environment"
        else:
            origin = "default" if value == field.default else "computed"
        table.add_row(variable, format_setting(value), origin, field.description)
    Console().print(table)


@app.command()
def version() -> None:
    """Show the versions of corr2d, Python and torch."""
    _print_version(requested=True)


def _print_version(*, requested: bool) -> None:
    if requested:
        typer.echo(f"corr2d {VERSION} (Python {platform.python_version()}, torch {version_of('torch')})")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=lambda value: _print_version(requested=value), is_eager=True)
    ] = False,
) -> None:
    """2-D cross-correlation, Conv2d and learned kernels, as an HTTP service or on files."""
