"""Hugging Face's safetensors: the header's length, the header in JSON, and the arrays' bytes one after the other.

The arrays in the header must cover every byte after it exactly once: no gaps, which could hide data, and no overlaps.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from service.codecs.buffers import as_little_endian_bytes, view_as_array
from service.codecs.decode_limits import check_size
from service.codecs.header_checks import check_shape, quote_name, resolve_dtype, truncate_name
from service.codecs.signatures import format_mismatch_error
from service.errors import FieldError, InvalidRequest, NotParseable

MEDIA_TYPE = "application/x-safetensors"

MAX_SAFETENSORS_HEADER_BYTES = 65_536
"""Largest header, in bytes: four times what MAX_TENSORS need. The GIL is held while the header is parsed."""

MAX_TENSORS = 256
MAX_OPTIONS = 100
METADATA_KEY = "__metadata__"

DTYPE_NAMES = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
"""safetensors' name of a dtype, by numpy's name."""

NUMPY_DTYPE_NAMES = {name: numpy_name for numpy_name, name in DTYPE_NAMES.items()}

LENGTH_FIELD_BYTES = 8
"""Width of the header's length field in bytes, and the alignment of the data after the header."""


class TensorEntry(NamedTuple):
    """Entry of the header for one array."""

    begin: int
    end: int
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def decode(content: bytes | bytearray | memoryview, limit: int) -> dict[str, NDArray[Any] | str]:
    """Return the arrays by name, views of the content if they are aligned in it, and the strings of `__metadata__`."""
    memory = memoryview(content)
    header, start = _read_header(memory)
    options = _parse_options(header.pop(METADATA_KEY, {}))
    if len(options) > MAX_OPTIONS:
        raise NotParseable(
            f"the safetensors {METADATA_KEY} has {len(options):,} entries: at most {MAX_OPTIONS} are read"
        )
    if len(header) > MAX_TENSORS:
        raise NotParseable(f"the safetensors header has {len(header):,} tensors: at most {MAX_TENSORS} are read")
    for name in options.keys() & header.keys():
        message = f"{quote_name(name)} is both a tensor and a name in {METADATA_KEY}: send it once"
        raise InvalidRequest(message, errors=[FieldError(truncate_name(name), message)])
    entries = [_parse_entry(name, fields) for name, fields in header.items()]
    declared = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
    check_size(declared, limit, "all tensors together", "(body)")
    _check_coverage(entries, len(memory) - start)
    arrays = {
        entry.name: view_as_array(memory[start + entry.begin : start + entry.end], entry.dtype, entry.shape)
        for entry in entries
    }
    return {**options, **arrays}


def encode(arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file: its header, and the arrays' own memory, each aligned to its numbers."""
    # Arrays with the widest numbers are first: so all are aligned without gaps, which the format forbids.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {}
    parts: list[bytes | memoryview] = []
    at = 0
    for name, array in ordered:
        end = at + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [at, end]}
        parts.append(as_little_endian_bytes(array))
        at = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % LENGTH_FIELD_BYTES)
    return [len(text).to_bytes(LENGTH_FIELD_BYTES, "little") + text, *parts]


def _read_header(memory: memoryview) -> tuple[dict[str, Any], int]:
    """Return the header, and the offset of its end."""
    length = int.from_bytes(memory[:LENGTH_FIELD_BYTES], "little")
    if len(memory) < LENGTH_FIELD_BYTES or length > MAX_SAFETENSORS_HEADER_BYTES:
        if bytes(memory[LENGTH_FIELD_BYTES : LENGTH_FIELD_BYTES + 1]) != b"{":
            raise format_mismatch_error(memory, "a safetensors file")
        raise NotParseable(
            f"the safetensors header is {length:,} bytes long: at most {MAX_SAFETENSORS_HEADER_BYTES:,} are read"
        )
    text = bytes(memory[LENGTH_FIELD_BYTES : LENGTH_FIELD_BYTES + length])
    if len(text) < length:
        raise NotParseable(f"the body ends inside its safetensors header: it was cut off after {len(memory):,} bytes")
    try:
        header = orjson.loads(text)
        # orjson is the stricter parser; only json's shows duplicate names.
        json.loads(text, object_pairs_hook=_check_unique_names)
    except (ValueError, RecursionError) as error:
        raise NotParseable(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict) or text[:1] != b"{":
        raise NotParseable("the safetensors header is not a JSON object that begins with its first byte")
    return header, LENGTH_FIELD_BYTES + length


def _check_unique_names(pairs: list[tuple[str, Any]]) -> None:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise NotParseable(f"the safetensors header has {quote_name(name)} twice: send it once")
        names.add(name)


def _parse_options(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise NotParseable(
            f'the safetensors header\'s {METADATA_KEY} is not an object of strings, such as {{"mode": "same"}}'
        )
    return metadata


def _parse_entry(name: str, fields: object) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **other} if not other:
            pass
        case _:
            raise NotParseable(
                f"the safetensors header's {quote_name(name)} is not an object of dtype, shape and two data_offsets"
            )
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise NotParseable(
            f"the safetensors header's {quote_name(name)} has a shape or data_offsets that are not nonnegative integers"
        )
    numpy_dtype = resolve_dtype(NUMPY_DTYPE_NAMES.get(dtype, ""), truncate_name(name), received=quote_name(dtype))
    check_shape(tuple(shape), truncate_name(name))
    return TensorEntry(begin, end, name, numpy_dtype.newbyteorder("<"), tuple(shape))


def _check_coverage(entries: list[TensorEntry], length: int) -> None:
    at = 0
    for entry in sorted(entries):
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.end - entry.begin != size:
            raise NotParseable(
                f"{quote_name(entry.name)} has the data_offsets {entry.begin:,} to {entry.end:,}: "
                f"{truncate_name(str(entry.shape))} of {entry.dtype.name} has {size:,} bytes"
            )
        if entry.begin != at:
            problem = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            raise NotParseable(f"{quote_name(entry.name)} {problem}: it begins at {entry.begin:,}, expected {at:,}")
        at = entry.end
    if at != length:
        raise NotParseable(f"the safetensors header declares {at:,} bytes of tensors: {length:,} follow it")
