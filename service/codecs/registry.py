"""Tables of the formats of request and response bodies, of the content codings, and of the files of the command line.

To add a format, write its module and list it here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.codecs import json, json_encoder, multipart, npy, npz, safetensors
from service.codecs.buffers import Buffer, BufferList
from service.codecs.decode_limits import DecodeCheck, no_check
from service.codecs.header_checks import quote_name
from service.codecs.images import jpeg, png, tiff, webp
from service.codecs.images.options import ImageOptions
from service.codecs.response_options import OutputResponseOptions, ResponseOptions, parse_option
from service.codecs.signatures import detect_media_type, format_mismatch_error
from service.errors import FieldError, InvalidRequest, UnsupportedMediaType

ResponseFields: TypeAlias = Mapping[str, Any]
"""Fields of a response by name: numpy arrays, numbers, strings, lists and objects; the main array is the first."""

UNLIMITED_BYTES = 1 << 62

DecodeFn: TypeAlias = Callable[..., Any]
"""Function decode(body, limit, check); `check` is optional.

Those of images, and of forms, which may contain one, take the options of the query string in addition, and use those of
ImageOptions. They raise pydantic's ValidationError for invalid ones.
"""

EncodeFn: TypeAlias = Callable[[ResponseFields, ResponseOptions], BufferList]


@dataclass(frozen=True, slots=True)
class Format:
    """Decoder and encoder of a media type, and their predicted times.

    decode: takes a body, the maximum number of decoded bytes and a function to call at intervals; returns the request's
    fields by name. It raises NotParseable, InvalidRequest, BodyTooLarge and what that function raises. encode: takes
    the fields of a response, returns its parts; raises NotAcceptable if the format cannot hold them. None: the format
    is not supported in that direction. estimate_decode_seconds: takes a body and that limit; predicts the seconds on
    one core from a small part of the body, in a few microseconds. encode_seconds_per_number: predicted seconds per
    number of a response (`benchmarks/formats.py` measures both). content_doc: the part of a response that the format
    holds. has_named_arrays: whether a body names its arrays. has_metadata: whether other programs write entries into a
    body that are not arrays: of these, only options are read. headers: sent with a response. encoded_bytes_per_byte:
    encoded bytes per byte of an array; 0 if its own memory is sent. is_image: whether `decode` takes options. suffixes:
    of the files that the command line reads and writes.
    """

    decode: DecodeFn | None
    encode: EncodeFn | None
    estimate_decode_seconds: Callable[[Buffer, int], float] = lambda *_: 0.0
    encode_seconds_per_number: float = 0.0
    content_doc: str = "the first array alone"
    has_named_arrays: bool = False
    has_metadata: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()
    encoded_bytes_per_byte: float = 0.0
    is_image: bool = False
    suffixes: Sequence[str] = ()


def _wrap_as_input(decode: DecodeFn) -> DecodeFn:
    """Return a decoder that names the array of a format with a single array "input"."""
    return lambda *arguments: {"input": decode(*arguments)}


NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def _decode_image(decode: Callable[..., NDArray[Any]]) -> DecodeFn:
    """Return a decoder that reads ImageOptions among the options, and names the image "input"."""

    def decode_image(
        body: Buffer, limit: int, check: DecodeCheck = no_check, options: Mapping[str, Any] = NO_OPTIONS
    ) -> ResponseFields:
        chosen = {name: value for name, value in options.items() if name in ImageOptions.model_fields}
        return {"input": decode(body, limit, check, ImageOptions.model_validate(chosen))}

    return decode_image


def check_image_options(media_format: "Format", options: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if there are options of images, and the format is not one."""
    names = [] if media_format.is_image else [name for name in ImageOptions.model_fields if name in options]
    if names:
        errors = [FieldError(name, f'"{name}" applies to images only: remove it, or send an image') for name in names]
        raise InvalidRequest(errors[0].message, errors=errors)


class MetadataOption(NamedTuple):
    """Option in the metadata of a file, where other programs write entries of their own."""

    value: Any


def _decode_safetensors(body: Buffer, limit: int) -> ResponseFields:
    """Return the arrays of a safetensors file, and its metadata as options like those of a query string."""
    return {
        name: MetadataOption(parse_option(value)) if isinstance(value, str) else value
        for name, value in safetensors.decode(body, limit).items()
    }


def collect_arrays(fields: ResponseFields) -> dict[str, NDArray[Any]]:
    """Return the arrays of a response by name, including lists of numbers such as a loss history."""
    series = {
        name: json_encoder.list_to_array(value)
        for name, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], (float, int))
    }
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)} | series


def _first_array(fields: ResponseFields) -> NDArray[Any]:
    return next(value for value in fields.values() if isinstance(value, np.ndarray))


def _encode_pixels(encode: Callable[..., BufferList]) -> EncodeFn:
    """Return an encoder of an image of bytes, to which the values are scaled or clipped."""
    return lambda fields, options: encode(_first_array(fields), clip=_get_png_option(options) != "scale")


def _encode_png(fields: ResponseFields, options: ResponseOptions) -> BufferList:
    values = _get_png_option(options)
    return png.encode(_first_array(fields), clip=values != "scale", deep=values == "clip16")


def _get_png_option(options: ResponseOptions) -> str:
    return options.png if isinstance(options, OutputResponseOptions) else "scale"


UNSPECIFIC_MEDIA_TYPES = ("", "application/octet-stream", "application/zip", "application/x-zip-compressed")
"""Media types that browsers send for files whose type they do not know."""


def _get_file_format(file: multipart.FilePart) -> "Format":
    """Return the format of the file of a form: that of its media type, or of its first bytes."""
    media_type = file.media_type
    if media_type in UNSPECIFIC_MEDIA_TYPES:
        media_type = detect_media_type(file.content)
        if media_type not in FORMATS:
            raise format_mismatch_error(file.content, "in a supported format", "the file")
    found = FORMATS.get(media_type)
    if found is None or found.decode is None or media_type == multipart.MEDIA_TYPE:
        supported = ", ".join(name for name in DECODABLE_MEDIA_TYPES if name != multipart.MEDIA_TYPE)
        raise UnsupportedMediaType(f"the file has Content-Type {quote_name(media_type)}; supported: {supported}")
    return found


def _decode_form(
    body: Buffer, limit: int, check: DecodeCheck = no_check, options: Mapping[str, Any] = NO_OPTIONS
) -> Any:
    """Return the fields of a form, and those of its file; an array without a name gets that of the file's part."""
    form = multipart.parse(body, check)
    fields = {name: parse_option(text) for name, text in form.fields.items()}
    if form.file is None:
        return fields
    file_format = _get_file_format(form.file)
    assert file_format.decode is not None  # noqa: S101 - _get_file_format returns decodable formats only
    arguments: tuple[Any, ...] = (form.file.content, limit, check)
    if file_format.is_image:
        _check_unrepeated(fields.keys() & options.keys() & ImageOptions.model_fields.keys(), "the query string")
        chosen = {name: fields.pop(name) for name in ImageOptions.model_fields if name in fields}
        arguments += ({**options, **chosen},)
    check_image_options(file_format, {**options, **fields})
    decoded = file_format.decode(*arguments)
    if not isinstance(decoded, dict):
        return decoded
    if not file_format.has_named_arrays:
        decoded = {form.file.name: decoded["input"]}
    _check_unrepeated(fields.keys() & decoded.keys(), "its file")
    return {**fields, **decoded}


def _check_unrepeated(names: set[str], place: str) -> None:
    if names:
        errors = [FieldError(name, f'"{name}" is in the form and in {place}: send it once') for name in sorted(names)]
        raise InvalidRequest(errors[0].message, errors=errors)


def _estimate_form_seconds(body: Buffer, limit: int) -> float:
    """Return the predicted seconds to parse a form and decode its file, whose format is read from its first bytes."""
    seconds = 5e-5 + 1e-9 * len(body)
    file = multipart.find_file(body)
    if file is None:
        is_short = len(body) <= multipart.INSPECTED_BYTES
        return seconds + (0 if is_short else DECODE_SECONDS_PER_DECOMPRESSED_BYTE * limit)
    media_type = file.media_type
    found = FORMATS.get(detect_media_type(file.content) if media_type in UNSPECIFIC_MEDIA_TYPES else media_type)
    if found is None or media_type == multipart.MEDIA_TYPE:
        return seconds
    return seconds + found.estimate_decode_seconds(file.content, limit)


ARRAYS_BY_NAME_DOC = "the arrays by name"

CHECK_SECONDS_PER_BYTE = 1e-9
"""Predicted seconds per byte to check the numbers of an array that is not copied."""

FORMATS: Mapping[str, Format] = {
    json.MEDIA_TYPE: Format(
        lambda body, *_: json.decode(body),
        json_encoder.encode,
        lambda body, _: json.estimate_decode_seconds(body),
        25e-9,
        "everything",
        has_named_arrays=True,
        encoded_bytes_per_byte=3.25,
        suffixes=(".json",),
    ),
    npy.MEDIA_TYPE: Format(
        _wrap_as_input(lambda body, limit, *_: npy.decode(body, limit)),
        lambda fields, _: npy.encode(_first_array(fields)),
        lambda body, _: npy.estimate_decode_seconds(body),
        suffixes=(".npy",),
    ),
    npz.MEDIA_TYPE: Format(
        npz.decode,
        lambda fields, _: npz.encode(collect_arrays(fields)),
        npz.estimate_decode_seconds,
        1.5e-9,
        ARRAYS_BY_NAME_DOC,
        has_named_arrays=True,
        suffixes=(".npz",),
    ),
    safetensors.MEDIA_TYPE: Format(
        lambda body, limit, *_: _decode_safetensors(body, limit),
        lambda fields, _: safetensors.encode(collect_arrays(fields)),
        lambda body, _: CHECK_SECONDS_PER_BYTE * len(body),
        content_doc=ARRAYS_BY_NAME_DOC,
        has_named_arrays=True,
        has_metadata=True,
        suffixes=(".safetensors",),
    ),
    png.MEDIA_TYPE: Format(
        _decode_image(png.decode),
        _encode_png,
        lambda body, _: png.estimate_decode_seconds(body),
        12e-9,
        encoded_bytes_per_byte=1.0,
        is_image=True,
        suffixes=(".png",),
    ),
    jpeg.MEDIA_TYPE: Format(
        _decode_image(jpeg.decode),
        _encode_pixels(jpeg.encode),
        lambda body, _: jpeg.estimate_decode_seconds(body),
        20e-9,
        encoded_bytes_per_byte=1.0,
        is_image=True,
        suffixes=(".jpg", ".jpeg"),
    ),
    webp.MEDIA_TYPE: Format(
        _decode_image(webp.decode),
        _encode_pixels(webp.encode),
        lambda body, _: webp.estimate_decode_seconds(body),
        60e-9,
        encoded_bytes_per_byte=1.5,
        is_image=True,
        suffixes=(".webp",),
    ),
    tiff.MEDIA_TYPE: Format(
        _decode_image(tiff.decode),
        lambda fields, _: tiff.encode(_first_array(fields)),
        tiff.estimate_decode_seconds,
        is_image=True,
        suffixes=(".tif", ".tiff"),
    ),
    multipart.MEDIA_TYPE: Format(
        _decode_form,
        None,
        _estimate_form_seconds,
        has_named_arrays=True,
        has_metadata=True,
        is_image=True,
    ),
}
"""Formats of request and response bodies by media type, the preferred one first."""


CODING_COSTS: Mapping[str, tuple[float, float, int]] = {
    "gzip": (5e-9, 5e-9, 1032),
    "x-gzip": (5e-9, 5e-9, 1032),
    "deflate": (5e-9, 5e-9, 1032),
    "zstd": (7e-9, 2e-9, 1 << 15),
}
"""By content coding: seconds per compressed byte, seconds per decompressed byte, and the maximum expansion factor."""


DECODE_SECONDS_PER_DECOMPRESSED_BYTE = 5e-9
"""Predicted seconds to decode one decompressed byte, for any format."""


def predict_decode_seconds(media_format: Format, coding: str | None, body: Buffer, limit: int) -> float:
    """Return the predicted seconds to decompress and decode a body, on one core.

    The decompressed size is unknown, so the largest possible size is used.
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


FILE_FORMATS: Mapping[str, Format] = {
    suffix: media_format for media_format in FORMATS.values() for suffix in media_format.suffixes
}
"""Formats of the files of the command line, by suffix."""

READABLE_SUFFIXES = tuple(suffix for suffix, media_format in FILE_FORMATS.items() if media_format.decode)
WRITABLE_SUFFIXES = tuple(suffix for suffix, media_format in FILE_FORMATS.items() if media_format.encode)
