"""Types and parsers of command-line options, and the flags of the settings."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from service.codecs.registry import READABLE_SUFFIXES, WRITABLE_SUFFIXES
from service.codecs.response_options import OutputResponseOptions
from service.configuration.settings import ENV_PREFIX, Settings

Number = TypeVar("Number", int, float)

READABLE_FORMATS, WRITABLE_FORMATS = (
    ", ".join(suffix.removeprefix(".") for suffix in suffixes) for suffixes in (READABLE_SUFFIXES, WRITABLE_SUFFIXES)
)
PNG_FIELD = OutputResponseOptions.model_fields["png"]

EXISTING_FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "allow_dash": True}
"""Options of an argument that is a file, or - for stdin."""

INPUT_HELP = f"an array or image ({READABLE_FORMATS}), or - for stdin; in a file of several arrays: input"
InputArgument = Annotated[Path, typer.Argument(help=INPUT_HELP, **EXISTING_FILE)]
InputsArgument = Annotated[
    list[Path], typer.Argument(help=f"{INPUT_HELP}. Of many files, those that fail are reported", show_default=False)
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help=f"a file ({WRITABLE_FORMATS}), a folder/ for many inputs, or - for stdout; unset: printed as JSON, "
        "one line per input (a large array on a terminal: as a summary)",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(help=f"format of stdout and of the files in a folder: {WRITABLE_FORMATS}; unset: that of the input"),
]
PngOption = Annotated[
    str | None,
    typer.Option(
        help=f"{PNG_FIELD.description} ({', '.join(get_args(PNG_FIELD.annotation))}); unset: {PNG_FIELD.default}"
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")]
DtypeOption = Annotated[str, typer.Option(help="float32 or float64")]
MethodOption = Annotated[str, typer.Option(help="auto, direct, winograd, fft or separable")]
StrideOption = Annotated[str, typer.Option(help="an integer, or rows,columns")]
DilationOption = Annotated[str, typer.Option(help="an integer, or rows,columns")]
PADDING_HELP = "an integer, rows,columns, top,bottom,left,right, valid or same"
PaddingOption = Annotated[str, typer.Option(help=PADDING_HELP)]
PaddingModeOption = Annotated[str, typer.Option(help="zeros, reflect, replicate or circular")]
InitialArrayOption = Annotated[
    Path | None, typer.Option(help="file with the initial values; unset: random", **EXISTING_FILE)
]


def format_setting(value: object) -> str:
    """Return the value of a setting as help texts and docs/http-api.md show it."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def add_settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag per field of Settings; the command receives None for flags that are not set."""

    def with_flags(**flags: object) -> None:
        command(**flags)

    with_flags.__doc__, with_flags.__name__ = command.__doc__, command.__name__
    with_flags.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads this
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    str | None,
                    typer.Option(
                        f"--{name.replace('_', '-')}",
                        help=f"{field.description} [{ENV_PREFIX}{name.upper()}; {format_setting(field.default)}]",
                        show_default=False,
                    ),
                ],
            )
            for name, field in Settings.model_fields.items()
        ]
    )
    return with_flags


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parse a shape of two or four sizes; a single size means a square."""
    try:
        sizes = tuple(int(size) for size in text.lower().replace(",", "x").split("x"))
    except ValueError:
        sizes = ()
    sizes *= 2 if len(sizes) == 1 else 1
    if len(sizes) not in (2, 4) or min(sizes) < 1:
        raise typer.BadParameter(f"{text} is not a valid size: use for example 1024, 1080x1920 or 8x3x224x224")
    return sizes


def parse_integers(text: str) -> int | list[int] | str:
    """Parse an option such as 2 or 1,2 as integers; return other text unchanged, for core to validate."""
    return _parse_list(text, int)


def parse_numbers(text: str) -> float | list[float] | str:
    """Parse an option such as 0.03 or 0.9,0.999 as numbers; return other text unchanged, for core to validate."""
    return _parse_list(text, float)


def _parse_list(text: str, parse: Callable[[str], Number]) -> Number | list[Number] | str:
    try:
        numbers = [parse(word) for word in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers
