"""Formats: one file each, and the tables that name them.

To add one, write its file and its lines here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.codecs import jpeg, json, npy, npz, png, safetensors
from service.codecs.response_options import OutputResponseOptions, ResponseOptions, parse_option

Buffer: TypeAlias = bytes | bytearray | memoryview

BufferList: TypeAlias = Sequence[bytes | memoryview]
"""What is to be sent, one part after the other: an array's own memory is one, so that nothing is copied."""

ResponseFields: TypeAlias = Mapping[str, Any]
"""An answer: arrays (numpy's), numbers, texts, lists and objects by name, the array that was asked for first."""

UNLIMITED_BYTES = 1 << 62


DecodeFn: TypeAlias = Callable[..., Any]
"""decode(body, limit, check), of which `check` may be left out."""


@dataclass(frozen=True, slots=True)
class Format:
    """What a media type is read and written by, and how long that takes.

    decode: a body, the most bytes that it may decode to, and a function that is called meanwhile -> the request's
    fields by name; raises NotParseable, InvalidRequest and BodyTooLarge, and what that function raises. encode: an
    answer -> its parts; raises NotAcceptable where the format cannot hold it. None: not served that way.
    seconds_to_decode: a body and that limit -> the predicted time on one core, from the body's head in a few
    microseconds. seconds_to_encode: for a number of the answer (`benchmarks/formats.py` measures both). `carries` says
    what there is of an answer in it. `by_name`: so are the arrays of a body. `headers` go with an answer.
    """

    decode: DecodeFn | None
    encode: Callable[[ResponseFields, ResponseOptions], BufferList] | None
    estimate_decode_seconds: Callable[[Buffer, int], float] = lambda *_: 0.0
    encode_seconds_per_number: float = 0.0
    content_doc: str = "the first array alone"
    has_named_arrays: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()


def _wrap_as_input(decode: DecodeFn) -> DecodeFn:
    """A format of one array carries the input."""
    return lambda *arguments: {"input": decode(*arguments)}


FOREIGN_METADATA_KEY = "format"
"""What safetensors' own libraries write into the metadata of a file: {"format": "pt"}."""


def _decode_safetensors(body: Buffer, limit: int) -> ResponseFields:
    """The arrays of a safetensors file, and its metadata as the options that a query string would hold."""
    return {
        name: parse_option(value) if isinstance(value, str) else value
        for name, value in safetensors.decode(body, limit).items()
        if not (name == FOREIGN_METADATA_KEY and isinstance(value, str))
    }


def collect_arrays(fields: ResponseFields) -> dict[str, NDArray[Any]]:
    """The arrays of an answer, lists of numbers (a loss history) among them."""
    series = {
        name: json.list_to_array(value)
        for name, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], (float, int))
    }
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)} | series


def _first_array(fields: ResponseFields) -> NDArray[Any]:
    return next(value for value in fields.values() if isinstance(value, np.ndarray))


def _encode_png(fields: ResponseFields, options: ResponseOptions) -> BufferList:
    return png.encode(_first_array(fields), clip=isinstance(options, OutputResponseOptions) and options.png == "clip")


ARRAYS_BY_NAME_DOC = "the arrays by name"

CHECK_SECONDS_PER_BYTE = 1e-9
"""Of an array that is taken as it lies, for a look at all its numbers."""

FORMATS: Mapping[str, Format] = {
    json.MEDIA_TYPE: Format(
        lambda body, *_: json.decode(body),
        json.encode,
        lambda body, _: json.estimate_decode_seconds(body),
        25e-9,
        "everything",
        has_named_arrays=True,
    ),
    npy.MEDIA_TYPE: Format(
        _wrap_as_input(lambda body, limit, *_: npy.decode(body, limit)),
        lambda fields, _: npy.encode(_first_array(fields)),
        lambda body, _: npy.estimate_decode_seconds(body),
    ),
    npz.MEDIA_TYPE: Format(
        npz.decode,
        lambda fields, _: npz.encode(collect_arrays(fields)),
        npz.estimate_decode_seconds,
        1.5e-9,
        ARRAYS_BY_NAME_DOC,
        has_named_arrays=True,
    ),
    safetensors.MEDIA_TYPE: Format(
        lambda body, limit, *_: _decode_safetensors(body, limit),
        lambda fields, _: safetensors.encode(collect_arrays(fields)),
        lambda body, _: CHECK_SECONDS_PER_BYTE * len(body),
        content_doc=ARRAYS_BY_NAME_DOC,
        has_named_arrays=True,
    ),
    png.MEDIA_TYPE: Format(
        _wrap_as_input(png.decode), _encode_png, lambda body, _: png.estimate_decode_seconds(body), 12e-9
    ),
    jpeg.MEDIA_TYPE: Format(_wrap_as_input(jpeg.decode), None, lambda body, _: jpeg.estimate_decode_seconds(body)),
}
"""What bodies may be and answers can be, the one that is preferred first."""


CODING_COSTS: Mapping[str, tuple[float, float, int]] = {
    "gzip": (5e-9, 5e-9, 1032),
    "x-gzip": (5e-9, 5e-9, 1032),
    "deflate": (5e-9, 5e-9, 1032),
    "zstd": (7e-9, 2e-9, 1 << 15),
}
"""Of a content coding: seconds for a compressed byte and for a decompressed one, and how many of these one may make."""


DECODE_SECONDS_PER_DECOMPRESSED_BYTE = 5e-9
"""To decode it, whatever its format."""


def predict_decode_seconds(media_format: Format, coding: str | None, body: Buffer, limit: int) -> float:
    """The predicted time to undo the content coding of a body and to decode it, on one core.

    What a compressed body becomes is not known: it counts as the most that it may become.
    """
    if coding is None:
        return media_format.estimate_decode_seconds(body, limit)
    seconds_per_compressed_byte, seconds_per_byte, ratio = CODING_COSTS[coding]
    size = min(limit, ratio * len(body))
    return seconds_per_compressed_byte * len(body) + (seconds_per_byte + DECODE_SECONDS_PER_DECOMPRESSED_BYTE) * size


DECODABLE_MEDIA_TYPES = tuple(media_type for media_type, media_format in FORMATS.items() if media_format.decode)
ENCODABLE_FORMATS: Mapping[str, Format] = {
    media_type: media_format for media_type, media_format in FORMATS.items() if media_format.encode
}

FILE_READERS: Mapping[str, Callable[[Buffer], NDArray[Any]]] = {
    ".npy": partial(npy.decode, limit=UNLIMITED_BYTES),
    ".png": partial(png.decode, limit=UNLIMITED_BYTES),
    ".jpg": partial(jpeg.decode, limit=UNLIMITED_BYTES),
    ".jpeg": partial(jpeg.decode, limit=UNLIMITED_BYTES),
}
"""What the command line reads, by suffix."""

FILE_WRITERS: Mapping[str, Callable[[NDArray[Any]], BufferList]] = {
    ".npy": npy.encode,
    ".png": png.encode,
}
"""What the command line writes, by suffix."""
