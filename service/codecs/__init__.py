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
from service.codecs.options import AnswerOptions, OutputOptions, option_value

Buffer: TypeAlias = bytes | bytearray | memoryview

Parts: TypeAlias = Sequence[bytes | memoryview]
"""What is to be sent, one part after the other: an array's own memory is one, so that nothing is copied."""

Fields: TypeAlias = Mapping[str, Any]
"""An answer: arrays (numpy's), numbers, texts, lists and objects by name, the array that was asked for first."""

UNLIMITED = 1 << 62


Decode: TypeAlias = Callable[..., Any]
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

    decode: Decode | None
    encode: Callable[[Fields, AnswerOptions], Parts] | None
    seconds_to_decode: Callable[[Buffer, int], float] = lambda *_: 0.0
    seconds_to_encode: float = 0.0
    carries: str = "the first array alone"
    by_name: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()


def _input(decode: Decode) -> Decode:
    """A format of one array carries the input."""
    return lambda *arguments: {"input": decode(*arguments)}


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
        name: json.as_array(value)
        for name, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], (float, int))
    }
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)} | series


def _first_array(fields: Fields) -> NDArray[Any]:
    return next(value for value in fields.values() if isinstance(value, np.ndarray))


def _picture(fields: Fields, options: AnswerOptions) -> Parts:
    return png.encode(_first_array(fields), clip=isinstance(options, OutputOptions) and options.png == "clip")


ARRAYS = "the arrays by name"

SECONDS_A_BYTE = 1e-9
"""Of an array that is taken as it lies, for a look at all its numbers."""

FORMATS: Mapping[str, Format] = {
    json.MEDIA_TYPE: Format(
        lambda body, *_: json.decode(body),
        json.encode,
        lambda body, _: json.seconds_to_decode(body),
        25e-9,
        "everything",
        by_name=True,
    ),
    npy.MEDIA_TYPE: Format(
        _input(lambda body, limit, *_: npy.decode(body, limit)),
        lambda fields, _: npy.encode(_first_array(fields)),
        lambda body, _: npy.seconds_to_decode(body),
    ),
    npz.MEDIA_TYPE: Format(
        npz.decode, lambda fields, _: npz.encode(arrays_of(fields)), npz.seconds_to_decode, 1.5e-9, ARRAYS, by_name=True
    ),
    safetensors.MEDIA_TYPE: Format(
        lambda body, limit, *_: _tensors_and_options(body, limit),
        lambda fields, _: safetensors.encode(arrays_of(fields)),
        lambda body, _: SECONDS_A_BYTE * len(body),
        carries=ARRAYS,
        by_name=True,
    ),
    png.MEDIA_TYPE: Format(_input(png.decode), _picture, lambda body, _: png.seconds_to_decode(body), 12e-9),
    jpeg.MEDIA_TYPE: Format(_input(jpeg.decode), None, lambda body, _: jpeg.seconds_to_decode(body)),
}
"""What bodies may be and answers can be, the one that is preferred first."""


CODINGS: Mapping[str, tuple[float, float, int]] = {
    "gzip": (5e-9, 5e-9, 1032),
    "x-gzip": (5e-9, 5e-9, 1032),
    "deflate": (5e-9, 5e-9, 1032),
    "zstd": (7e-9, 2e-9, 1 << 15),
}
"""Of a content coding: seconds for a compressed byte and for a decompressed one, and how many of these one may make."""


SECONDS_A_DECOMPRESSED_BYTE = 5e-9
"""To decode it, whatever its format."""


def predict_decode_seconds(served: Format, coding: str | None, body: Buffer, limit: int) -> float:
    """The predicted time to undo the content coding of a body and to decode it, on one core.

    What a compressed body becomes is not known: it counts as the most that it may become.
    """
    if coding is None:
        return served.seconds_to_decode(body, limit)
    a_compressed_byte, a_byte, ratio = CODINGS[coding]
    size = min(limit, ratio * len(body))
    return a_compressed_byte * len(body) + (a_byte + SECONDS_A_DECOMPRESSED_BYTE) * size


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
