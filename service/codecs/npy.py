"""numpy's .npy files, versions 1 to 3, read without numpy's own reader.

That one evaluates the header as Python, allocates by it before it looks for the bytes, and reads pickles and zip
archives too.
"""

import io
import math
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs.layout import DTYPES, bytes_of, laid_over, require_dtype, require_room, require_shape, short, shown
from service.codecs.signatures import mismatch
from service.errors import NotParseable

MEDIA_TYPE = "application/x-npy"

MAGIC = b"\x93NUMPY"

BYTES_OF_LENGTH = {1: 2, 2: 4, 3: 4}
"""The width of the header's length, by the format's version."""

MAX_HEADER = 16_384
"""numpy's own are 118 bytes long, plus the field names of structured types."""

CODES = {np.dtype(name).str[1:]: name for name in DTYPES}
"""What stands in a header for a dtype, without its byte order: "f4"."""


def _pattern(written: bytes) -> re.Pattern[bytes]:
    """With white space, as Python has it between tokens, for every underscore."""
    return re.compile(written.replace(b"_", rb"[ \t\r\n]*"))


WHITE = b" \t\r\n"

# No two of its parts can match the same white space, so that it needs no more than linear time on any bytes.
FIELD = rb"""_('\w+'|"\w+")_:_('[^'\\]*'|"[^"\\]*"|True|False|\([^()]*\))_"""
SIDE = rb"(?:0|[1-9]\d{0,18})_"
HEADER = _pattern(rb"\{" + b",".join([FIELD] * 3) + rb"(?:,_)?\}")
STRUCTURED = _pattern(rb"""['"]descr['"]_:_[\[(]""")
SHAPE = _pattern(rb"\(_(?:(?:" + SIDE + rb",_)+(?:" + SIDE + rb")?)?\)")

FEW_BYTES, HEAD = 4096, 512
IN_COLUMNS = re.compile(rb"fortran_order.{1,20}True")
ITEM_SIZE = re.compile(rb"descr.{1,20}[a-z]([1248])['\"]")
FEW_COMMAS = 7
"""In the header of an array of up to four dimensions; one of many is reordered in the shortest runs."""

OTHER_KINDS = {
    "O": "Python objects, which are never unpickled",
    "V": "structures or raw bytes",
    "S": "byte strings",
    "U": "text",
    "M": "dates",
    "m": "durations",
    "b": "booleans",
    "c": "complex numbers",
    "f": "floating point of a size that other machines do not have",
}


class Described(NamedTuple):
    """What a header says."""

    dtype: np.dtype[Any]
    fortran_order: bool
    shape: tuple[int, ...]


def decode(
    content: bytes | bytearray | memoryview, limit: int, *, field: str = "input", source: str = "the body"
) -> NDArray[Any]:
    """The array, a view of the content where that is row-major, aligned and in this machine's byte order.

    It is writable where the content is. Raises NotParseable, BodyTooLarge, and InvalidRequest for an array that the
    service does not take; `field` and `source` name it in messages.
    """
    memory = memoryview(content)
    header, start = _header(memory, source)
    described = _described(header, field, source)
    require_shape(described.shape, field)
    size = math.prod(described.shape) * described.dtype.itemsize
    array = f"{short(str(described.shape))} of {described.dtype.name}"
    require_room(size, limit, f"{field} {array}", field)
    if len(memory) - start != size:
        raise NotParseable(f"{source} has {len(memory) - start:,} bytes behind its .npy header: {array} has {size:,}")
    return laid_over(memory[start:], described.dtype, described.shape, fortran_order=described.fortran_order)


def seconds_to_decode(content: bytes | bytearray | memoryview) -> float:
    """The predicted time: that of a look at every number, and more where numbers in column order are reordered."""
    seconds = 1e-9 * len(content)
    if len(content) > FEW_BYTES:
        head = bytes(memoryview(content)[:HEAD]).partition(b"}")[0]
        if IN_COLUMNS.search(head):
            size = ITEM_SIZE.search(head)
            numbers = len(content) / int(size[1] if size else 1)
            seconds += numbers * (15e-9 if head.count(b",") <= FEW_COMMAS else 45e-9)
    return seconds


def encode(array: NDArray[Any]) -> list[bytes | memoryview]:
    """The parts of a .npy file of version 1: its header, and the array's own memory where that can be sent as it is."""
    header = io.BytesIO()
    described = {"descr": array.dtype.newbyteorder("<").str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(header, described)
    return [header.getvalue(), bytes_of(array)]


def _header(memory: memoryview, source: str) -> tuple[bytes, int]:
    """The header's text, and where it ends."""
    if memory[: len(MAGIC)] != MAGIC:
        raise mismatch(memory, "a .npy file", source)
    start = len(MAGIC) + 2
    version = memory[len(MAGIC)] if len(memory) >= start else 0
    if version not in BYTES_OF_LENGTH or memory[len(MAGIC) + 1] != 0:
        came = ".".join(map(str, memory[len(MAGIC) : start])) or "cut off"
        raise NotParseable(f"{source} is a .npy file whose version is {came}: versions 1.0, 2.0 and 3.0 are read")
    start += BYTES_OF_LENGTH[version]
    length = int.from_bytes(memory[len(MAGIC) + 2 : start], "little")
    if length > MAX_HEADER:
        raise NotParseable(
            f"{source} has a .npy header of {length:,} bytes: at most {MAX_HEADER:,} are read, and numpy writes 118"
        )
    if len(memory) < start + length:
        raise NotParseable(f"{source} ends inside its .npy header: it was cut off after {len(memory):,} bytes")
    return bytes(memory[start : start + length]), start + length


def _described(header: bytes, field: str, source: str) -> Described:
    if STRUCTURED.search(header):
        require_dtype("", field, came="of a structure with named fields")
    found = HEADER.fullmatch(header.strip(WHITE))
    parts = found.groups() if found else ()
    values = {key[1:-1]: value for key, value in zip(parts[::2], parts[1::2], strict=True)}
    descr = values.get(b"descr", b"")
    fortran_order = values.get(b"fortran_order")
    shape = values.get(b"shape", b"")
    if descr[:1] not in (b"'", b'"') or fortran_order not in (b"True", b"False") or not SHAPE.fullmatch(shape):
        raise NotParseable(
            f"{source} has a .npy header that is not like {{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }}"
            f" with sides from 1 to 19 digits: {shown(header.strip(WHITE).decode('latin-1'))}"
        )
    sides = tuple(map(int, shape.strip(b"()").replace(b",", b" ").split()))
    return Described(_dtype(descr[1:-1].decode("latin-1"), field), fortran_order == b"True", sides)


def _dtype(descr: str, field: str) -> np.dtype[Any]:
    order, code = descr[:1], descr[1:]
    meaning = OTHER_KINDS.get(code[:1])
    dtype = require_dtype(
        CODES.get(code, "") if order in ("<", ">") or (order == "|" and code.endswith("1")) else "",
        field,
        came=shown(descr) + (f" ({meaning})" if meaning else ""),
    )
    return dtype.newbyteorder(">" if order == ">" else "<")
