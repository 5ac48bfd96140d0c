"""Files that commands read and write, in the formats of the service; `-` is stdin or stdout."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from numpy.typing import NDArray

from service.cli.error_messages import replace_http_words
from service.codecs import json
from service.codecs.registry import (
    FILE_FORMATS,
    FORMATS,
    READABLE_SUFFIXES,
    UNLIMITED_BYTES,
    WRITABLE_SUFFIXES,
    ResponseFields,
)
from service.codecs.response_options import OutputResponseOptions, ResponseOptions
from service.codecs.signatures import detect_media_type
from service.errors import ServiceError

STDIO = Path("-")

DEFAULT_SUFFIX = ".npy"
"""Suffix of an output whose format is not given, if that of its input cannot be written."""

ARRAY_NAMES: Mapping[str, Sequence[str]] = {
    "input": ("input", "X"),
    "kernel": ("kernel", "K", "weight"),
    "weight": ("weight", "kernel"),
    "target": ("target", "Y", "output"),
    "initial_kernel": ("initial_kernel", "kernel"),
    "initial_bias": ("initial_bias", "bias"),
    "validation_input": ("input", "X"),
    "validation_target": ("target", "Y", "output"),
    "validation_weights": ("weights",),
}
"""Names in a file of several arrays, for each argument of a command, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Source:
    """Input file or stdin; `content` is None until a file is read."""

    path: Path
    suffix: str
    content: bytes | None = None

    @classmethod
    def open(cls, path: Path) -> "Source":
        """Return the source; stdin is read, and its format detected. Raises ValueError if it has none."""
        if path != STDIO:
            return cls(path, path.suffix.lower())
        content = sys.stdin.buffer.read()
        if not content:
            raise ValueError("stdin is empty: pipe a file into the command, and use - once")
        media_type = detect_media_type(content)
        suffix = next((suffix for suffix in READABLE_SUFFIXES if FILE_FORMATS[suffix] is FORMATS.get(media_type)), None)
        if suffix is None:
            raise ValueError(
                f"stdin has no known format: its first bytes are {content[:8]!r}; supported: "
                + ", ".join(READABLE_SUFFIXES)
            )
        return cls(path, suffix, content)

    @property
    def stem(self) -> str:
        """Name of an output file without its suffix."""
        return "stdin" if self.path == STDIO else self.path.stem

    def __str__(self) -> str:
        return name_input(self.path)

    def read_array(self, argument: str, dtype: str = "float64") -> NDArray[Any]:
        """Return the array for an argument of a command. Raises ValueError if the file cannot be decoded.

        dtype: that of the computation, to which numbers in JSON are rounded once.
        """
        media_format = FILE_FORMATS.get(self.suffix)
        if media_format is None or media_format.decode is None:
            raise ValueError(
                f"{self}: cannot read {self.suffix or 'a file without a suffix'}; "
                f"supported: {', '.join(READABLE_SUFFIXES)}"
            )
        content = self.path.read_bytes() if self.content is None else self.content
        try:
            if media_format is FORMATS[json.MEDIA_TYPE]:
                return _parse_json(json.decode(content, allow_list=True), argument, dtype)
            array: NDArray[Any] = _select_array(media_format.decode(content, UNLIMITED_BYTES), argument)
        except (ServiceError, ValueError) as error:
            raise ValueError(f"{self}: {replace_http_words(str(error), argument)}") from error
        return array


def name_input(path: Path | None) -> str:
    """Return the name of an input for messages."""
    return "stdin" if path == STDIO else str(path)


def read_array(path: Path, argument: str, dtype: str = "float64") -> NDArray[Any]:
    """Return the array of a file, or of stdin, as Source.read_array does. Raises ValueError and OSError."""
    return Source.open(path).read_array(argument, dtype)


def read_kernel(text: str, dtype: str) -> NDArray[Any] | str:
    """Return the kernel in a JSON matrix or a file, or the text itself, a name. Raises ValueError and OSError."""
    if text.lstrip().startswith(("[", "{")):
        try:
            return _parse_json(json.decode(text.encode(), allow_list=True), "kernel", dtype)
        except (ServiceError, ValueError) as error:
            raise ValueError(replace_http_words(str(error), "kernel", "--kernel")) from error
    path = Path(text)
    if path == STDIO or path.suffix.lower() in FILE_FORMATS or (path.suffix and path.is_file()):
        return read_array(path, "kernel", dtype)
    return text


def _parse_json(value: Any, argument: str, dtype: str) -> NDArray[Any]:
    """Return an array in a JSON value: an array itself, or an object of arrays by name. Raises ValueError."""
    from pydantic_core import PydanticCustomError

    from service.array_field import is_array_form, parse_array

    if isinstance(value, dict) and not is_array_form(value):
        value = _select_array({name: entry for name, entry in value.items() if is_array_form(entry)}, argument)
    try:
        return parse_array(value, dtype)
    except PydanticCustomError as error:
        position = (error.context or {}).get("position", "")
        raise ValueError(f"{argument}{position} {error.message()}") from error


def _select_array(fields: Mapping[str, Any], argument: str) -> Any:
    """Return the array with a name of the argument, or the only array. Raises ValueError."""
    names = ARRAY_NAMES.get(argument, (argument,))
    arrays = {name: value for name, value in fields.items() if not isinstance(value, str)}
    for name in names:
        if name in arrays:
            return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    found = f"the arrays {', '.join(map(repr, arrays))}" if arrays else "no arrays"
    raise ValueError(f"contains {found}; one must be named {' or '.join(map(repr, names))}, or be the only one")


def check_writable(path: Path, suffixes: Collection[str] = WRITABLE_SUFFIXES) -> None:
    """Raise ValueError for an unsupported suffix, FileNotFoundError for a missing folder."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: cannot write {path.suffix or 'a file without a suffix'}; supported: {', '.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: No such file or directory: {path.parent}")


DEFAULT_OPTIONS = ResponseOptions()


@dataclass(frozen=True, slots=True)
class Target:
    """Output file or stdout, and its format."""

    path: Path
    suffix: str
    options: ResponseOptions = DEFAULT_OPTIONS

    @classmethod
    def open(cls, path: Path, suffix: str, png: str | None = None) -> "Target":
        """Return the target. Raises ValueError if the format cannot be written or displayed, FileNotFoundError."""
        if path == STDIO:
            if suffix != ".json" and sys.stdout.isatty():
                raise ValueError(f"stdout is a terminal, which cannot show {suffix}: redirect it, or use --format json")
        else:
            check_writable(path)
        if png is None:
            return cls(path, suffix)
        if suffix != ".png":
            raise ValueError(f"--png {png} does not apply to {suffix}: it selects the values in .png files")
        return cls(path, suffix, _parse_png_option(png))

    @property
    def holds_names(self) -> bool:
        """True if the format holds several arrays by name."""
        return FILE_FORMATS[self.suffix].has_named_arrays

    def __str__(self) -> str:
        return "stdout" if self.path == STDIO else str(self.path)

    def write(self, fields: ResponseFields) -> None:
        """Write the fields, of which the first is the main array. Raises ValueError if the format cannot hold it."""
        encode = FILE_FORMATS[self.suffix].encode
        assert encode is not None  # noqa: S101 - the suffix of a target can be written
        try:
            parts = encode(fields, self.options)
        except (ServiceError, ValueError) as error:
            raise ValueError(f"{self}: {replace_http_words(str(error))}") from error
        if self.path == STDIO:
            sys.stdout.flush()
            sys.stdout.buffer.writelines(parts)
            sys.stdout.buffer.flush()
        else:
            self.path.write_bytes(b"".join(parts))


def _parse_png_option(text: str) -> OutputResponseOptions:
    allowed = get_args(OutputResponseOptions.model_fields["png"].annotation)
    if text not in allowed:
        raise ValueError(f'--png "{text}" is not one of: {", ".join(allowed)}')
    return OutputResponseOptions.model_validate({"png": text})


def resolve_targets(
    sources: Sequence[Source], output: str | None, file_format: str | None, png: str | None
) -> list[Target | None]:
    """Return the target of each source, None if it is printed; create the folder of several ones.

    Raises ValueError if a target cannot be written, is an input, or belongs to two sources.
    """
    if output is None:
        if png is not None or file_format is not None:
            raise ValueError(
                f"{'--png' if png is not None else '--format'} needs an output: -o file, -o folder/ or -o -"
            )
        return [None] * len(sources)
    folder = Path(output)
    if not (output.endswith("/") or folder.is_dir()):
        if len(sources) > 1:
            raise ValueError(f"{len(sources)} inputs need a folder for their outputs, not {output}: use -o folder/")
        path = Path(output)
        if path != STDIO and file_format is not None:
            raise ValueError(f"--format does not apply to {output}: its suffix names the format")
        return [Target.open(path, _get_suffix(sources[0], file_format) if path == STDIO else path.suffix.lower(), png)]
    folder.mkdir(exist_ok=True)
    targets: dict[Path, Source] = {}
    inputs = {source.path.resolve() for source in sources}
    found: list[Target | None] = []
    for source in sources:
        suffix = _get_suffix(source, file_format)
        path = folder / f"{source.stem}{suffix}"
        if path.resolve() in inputs:
            raise ValueError(f"{path} is an input, which would be overwritten: use another folder, or another --format")
        if path in targets:
            raise ValueError(f"{targets[path]} and {source} would both be written to {path}: rename one of them")
        targets[path] = source
        found.append(Target.open(path, suffix, png))
    return found


def _get_suffix(source: Source, file_format: str | None) -> str:
    """Return the suffix of the format named by the user, or that of the source if it can be written."""
    if file_format is not None:
        return parse_format(file_format)
    return source.suffix if source.suffix in WRITABLE_SUFFIXES else DEFAULT_SUFFIX


def parse_format(name: str) -> str:
    """Return the suffix of a format's name, such as npy. Raises ValueError if it cannot be written."""
    suffix = f".{name.lower().removeprefix('.')}"
    if suffix not in WRITABLE_SUFFIXES:
        allowed = ", ".join(suffix.removeprefix(".") for suffix in WRITABLE_SUFFIXES)
        raise ValueError(f'--format "{name}" is not one of: {allowed}')
    return suffix
