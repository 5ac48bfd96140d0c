"""numpy's .npy files, versions 1 to 3, read without numpy's own reader.

numpy's reader evaluates the header as Python, allocates memory before it checks the size of the data, and reads pickles
and zip archives too.
"""

import io
import math
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs.buffers import as_little_endian_bytes, view_as_array
from service.codecs.decode_limits import check_size
from service.codecs.header_checks import DTYPES, check_shape, quote_name, resolve_dtype, truncate_name
from service.codecs.signatures import format_mismatch_error
from service.errors import NotParseable

MEDIA_TYPE = "application/x-npy"

MAGIC = b"\x93NUMPY"

LENGTH_FIELD_BYTES = {1: 2, 2: 4, 3: 4}
"""Width of the header's length field in bytes, by the version of the format."""

MAX_NPY_HEADER_BYTES = 16_384
"""Largest header that is read, in bytes. numpy writes 118, plus the field names of structured types."""

DTYPE_CODES = {np.dtype(name).str[1:]: name for name in DTYPES}
"""Name of a dtype by its code in a header, which is without byte order: "f4"."""

DESCR_PATTERN = re.compile(r"([<>=|]?)([a-z]+\d+)")
"""Byte order, of which `=`, `|` and none are that of the machine, and the code or the name of a dtype."""


def _compile_pattern(written: bytes) -> re.Pattern[bytes]:
    """Compile a pattern in which an underscore matches any whitespace that Python allows between tokens."""
    return re.compile(written.replace(b"_", rb"[ \t\r\n]*"))


WHITESPACE = b" \t\r\n"

# No two parts can match the same whitespace, so matching takes linear time on any bytes.
FIELD_REGEX = rb"""_('\w+'|"\w+")_:_('[^'\\]*'|"[^"\\]*"|True|False|\([^()]*\))_"""
# Python 2 wrote long integers with an L, (3L, 4L).
SIDE_REGEX = rb"(?:0|[1-9]\d{0,18})L?_"
HEADER_PATTERN = _compile_pattern(rb"\{" + b",".join([FIELD_REGEX] * 3) + rb"(?:,_)?\}")
STRUCTURED_PATTERN = _compile_pattern(rb"""['"]descr['"]_:_[\[(]""")
SHAPE_PATTERN = _compile_pattern(rb"\(_(?:(?:" + SIDE_REGEX + rb",_)+(?:" + SIDE_REGEX + rb")?)?\)")

MIN_INSPECTED_BYTES, INSPECTED_HEADER_BYTES = 4096, 512
FORTRAN_ORDER_PATTERN = re.compile(rb"fortran_order.{1,20}True")
ITEM_SIZE_PATTERN = re.compile(rb"descr.{1,20}[a-z]([1248])['\"]")
MAX_COMMAS_UP_TO_4D = 7
"""Maximum commas in the header of an array of up to four dimensions; those with more are reordered in short runs."""

UNSUPPORTED_KINDS = {
    "O": "Python objects, which are never unpickled",
    "V": "structures or raw bytes",
    "S": "byte strings",
    "U": "text",
    "M": "dates",
    "m": "durations",
    "b": "booleans",
    "c": "complex numbers",
    "f": "floating point of a platform-dependent size",
}


class ArrayHeader(NamedTuple):
    """Fields of a header."""

    dtype: np.dtype[Any]
    fortran_order: bool
    shape: tuple[int, ...]


def decode(
    content: bytes | bytearray | memoryview, limit: int, *, field: str = "input", source: str = "the body"
) -> NDArray[Any]:
    """Return the array, a view of the content if that is row-major, aligned and in native byte order.

    It is writable if the content is. Raises NotParseable, BodyTooLarge, and InvalidRequest for an unsupported dtype or
    shape; `field` and `source` name the array and its file in messages.
    """
    memory = memoryview(content)
    header, start = _read_header(memory, source)
    described = _parse_header(header, field, source)
    check_shape(described.shape, field)
    size = math.prod(described.shape) * described.dtype.itemsize
    array = f"{truncate_name(str(described.shape))} of {described.dtype.name}"
    check_size(size, limit, f"{field} {array}", field)
    if len(memory) - start != size:
        raise NotParseable(f"{source} has {len(memory) - start:,} bytes after its .npy header: {array} has {size:,}")
    return view_as_array(memory[start:], described.dtype, described.shape, fortran_order=described.fortran_order)


def estimate_decode_seconds(content: bytes | bytearray | memoryview) -> float:
    """Return the predicted seconds: one pass over all numbers, and more if column-major numbers are reordered."""
    seconds = 1e-9 * len(content)
    if len(content) > MIN_INSPECTED_BYTES:
        header = bytes(memoryview(content)[:INSPECTED_HEADER_BYTES]).partition(b"}")[0]
        if FORTRAN_ORDER_PATTERN.search(header):
            size = ITEM_SIZE_PATTERN.search(header)
            numbers = len(content) / int(size[1] if size else 1)
            seconds += numbers * (8e-9 if header.count(b",") <= MAX_COMMAS_UP_TO_4D else 25e-9)
    return seconds


def encode(array: NDArray[Any]) -> list[bytes | memoryview]:
    """Return the parts of a .npy file of version 1: its header, and the array's own memory if its layout allows it."""
    header = io.BytesIO()
    described = {"descr": array.dtype.newbyteorder("<").str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(header, described)
    return [header.getvalue(), as_little_endian_bytes(array)]


def _read_header(memory: memoryview, source: str) -> tuple[bytes, int]:
    """Return the header's text, and the offset of its end."""
    if memory[: len(MAGIC)] != MAGIC:
        raise format_mismatch_error(memory, "a .npy file", source)
    start = len(MAGIC) + 2
    version = memory[len(MAGIC)] if len(memory) >= start else 0
    if version not in LENGTH_FIELD_BYTES or memory[len(MAGIC) + 1] != 0:
        received = ".".join(map(str, memory[len(MAGIC) : start])) or "cut off"
        raise NotParseable(f"{source} is a .npy file whose version is {received}: versions 1.0, 2.0 and 3.0 are read")
    start += LENGTH_FIELD_BYTES[version]
    length = int.from_bytes(memory[len(MAGIC) + 2 : start], "little")
    if length > MAX_NPY_HEADER_BYTES:
        raise NotParseable(
            f"{source} has a .npy header of {length:,} bytes: at most {MAX_NPY_HEADER_BYTES:,} are read "
            "(numpy writes 118)"
        )
    if len(memory) < start + length:
        raise NotParseable(f"{source} ends inside its .npy header: it was cut off after {len(memory):,} bytes")
    return bytes(memory[start : start + length]), start + length


def _parse_header(header: bytes, field: str, source: str) -> ArrayHeader:
    if STRUCTURED_PATTERN.search(header):
        resolve_dtype("", field, received="of a structure with named fields")
    found = HEADER_PATTERN.fullmatch(header.strip(WHITESPACE))
    parts = found.groups() if found else ()
    values = {key[1:-1]: value for key, value in zip(parts[::2], parts[1::2], strict=True)}
    descr = values.get(b"descr", b"")
    fortran_order = values.get(b"fortran_order")
    shape = values.get(b"shape", b"")
    if descr[:1] not in (b"'", b'"') or fortran_order not in (b"True", b"False") or not SHAPE_PATTERN.fullmatch(shape):
        raise NotParseable(
            f"{source} has a .npy header that is not like {{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }}"
            f" with sides from 1 to 19 digits: {quote_name(header.strip(WHITESPACE).decode('latin-1'))}"
        )
    sides = tuple(map(int, shape.strip(b"()").replace(b",", b" ").replace(b"L", b"").split()))
    return ArrayHeader(_parse_dtype(descr[1:-1].decode("latin-1"), field), fortran_order == b"True", sides)


def _parse_dtype(descr: str, field: str) -> np.dtype[Any]:
    found = DESCR_PATTERN.fullmatch(descr)
    order, code = found.groups() if found else ("", "")
    name = code if code in DTYPES and not order else DTYPE_CODES.get(code, "")
    meaning = UNSUPPORTED_KINDS.get(descr.lstrip("<>=|")[:1])
    received = quote_name(descr) + (f" ({meaning})" if meaning else "")
    dtype = resolve_dtype(name, field, received=received)
    return dtype if order not in ("<", ">") else dtype.newbyteorder("<" if order == "<" else ">")
