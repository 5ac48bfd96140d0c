"""Formats: one file each, and the tables that name them.

To add one, write its file and its lines here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.codecs import jpeg, json, npy, npz, png, safetensors
from service.codecs.options import AnswerOptions, OutputOptions, option_value

Buffer: TypeAlias = bytes | bytearray | memoryview

Parts: TypeAlias = Sequence[bytes | memoryview]
"""What is to be sent, one part after the other: an array's own memory is one, so that nothing is copied."""

Fields: TypeAlias = Mapping[str, Any]
"""An answer: arrays (numpy's), numbers, texts, lists and objects by name, the array that was asked for first."""

UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Format:
    """What a media type is read and written by, and how long that takes.

    decode: a body and the most bytes that it may decode to -> the request's fields by name; raises NotParseable,
    InvalidRequest and BodyTooLarge. encode: an answer -> its parts; raises NotAcceptable where the format cannot hold
    it. None: not served that way. Seconds are for a byte of the body and a number of the answer, on one core
    (`benchmarks/formats.py` prints them); infinite where a small body may become a large array, so that nothing can be
    told from its size. `carries` says what there is of an answer in it. `by_name`: so are the arrays of a body.
    `headers` go with an answer.
    """

    decode: Callable[[Buffer, int], Any] | None
    encode: Callable[[Fields, AnswerOptions], Parts] | None
    seconds_to_decode: float = 0.0
    seconds_to_encode: float = 0.0
    carries: str = "the first array alone"
    by_name: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()


def _input(decode: Callable[[Buffer, int], NDArray[Any]]) -> Callable[[Buffer, int], Fields]:
    """A format of one array carries the input."""
    return lambda body, limit: {"input": decode(body, limit)}


OTHER_TOOLS_METADATA = "format"
"""What safetensors' own libraries write into the metadata of a file: {"format": "pt"}."""


def _tensors_and_options(body: Buffer, limit: int) -> Fields:
    """The arrays of a safetensors file, and its metadata as the options that a query string would hold."""
    return {
        name: option_value(value) if isinstance(value, str) else value
        for name, value in safetensors.decode(body, limit).items()
        if not (name == OTHER_TOOLS_METADATA and isinstance(value, str))
    }


def arrays_of(fields: Fields) -> dict[str, NDArray[Any]]:
    """The arrays of an answer, lists of numbers (a loss history) among them."""
    series = {
        name: np.array(value)
        for name, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], (float, int))
    }
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)} | series


def _first_array(fields: Fields) -> NDArray[Any]:
    return next(value for value in fields.values() if isinstance(value, np.ndarray))


def _picture(fields: Fields, options: AnswerOptions) -> Parts:
    return png.encode(_first_array(fields), clip=isinstance(options, OutputOptions) and options.png == "clip")


ARRAYS = "the arrays by name"

REORDERED = 1e-9
"""Seconds for a byte of an array that has to be copied, as one in column order has; most are taken as they lie."""

FORMATS: Mapping[str, Format] = {
    json.MEDIA_TYPE: Format(lambda body, _: json.decode(body), json.encode, 1.2e-9, 25e-9, "everything", by_name=True),
    npy.MEDIA_TYPE: Format(_input(npy.decode), lambda fields, _: npy.encode(_first_array(fields)), REORDERED),
    npz.MEDIA_TYPE: Format(
        npz.decode, lambda fields, _: npz.encode(arrays_of(fields)), math.inf, 1.5e-9, ARRAYS, by_name=True
    ),
    safetensors.MEDIA_TYPE: Format(
        _tensors_and_options,
        lambda fields, _: safetensors.encode(arrays_of(fields)),
        REORDERED,
        carries=ARRAYS,
        by_name=True,
    ),
    png.MEDIA_TYPE: Format(
        _input(png.decode),
        _picture,
        math.inf,
        12e-9,
    ),
    jpeg.MEDIA_TYPE: Format(_input(jpeg.decode), None, math.inf),
}
"""What bodies may be and answers can be, the one that is preferred first."""

DECODED = tuple(media_type for media_type, served in FORMATS.items() if served.decode)
ENCODED: Mapping[str, Format] = {media_type: served for media_type, served in FORMATS.items() if served.encode}

FILE_READERS: Mapping[str, Callable[[Buffer], NDArray[Any]]] = {
    ".npy": partial(npy.decode, limit=UNLIMITED),
    ".png": partial(png.decode, limit=UNLIMITED),
    ".jpg": partial(jpeg.decode, limit=UNLIMITED),
    ".jpeg": partial(jpeg.decode, limit=UNLIMITED),
}
"""What the command line reads, by suffix."""

FILE_WRITERS: Mapping[str, Callable[[NDArray[Any]], Parts]] = {
    ".npy": npy.encode,
    ".png": png.encode,
}
"""What the command line writes, by suffix."""
