"""Pages of a TIFF (TIFF 6.0, and BigTIFF): their directories, parsed and checked."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs.images.transforms import UPRIGHT
from service.codecs.images.values import RGB_CHANNELS
from service.codecs.signatures import format_mismatch_error
from service.errors import FieldError, InvalidRequest, NotParseable

CLASSIC_VERSION, BIG_VERSION = 42, 43
BYTE_ORDERS = {b"II": "<", b"MM": ">"}

NEW_SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES = 266, 273, 274, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 322, 323, 324, 325
T4_OPTIONS, T6_OPTIONS, PALETTE, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES = 292, 293, 320, 332, 338, 339, 347
"""Numbers of the fields of a directory."""

NUMBER_CODES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
"""numpy's codes of the types of fields that hold integers."""

SAMPLE_KINDS = {1: "u", 2: "i", 3: "f"}
NUMPY_CODES = {
    **{(kind, bits): f"{kind}{bits // 8}" for kind in "iu" for bits in (8, 16, 32, 64)},
    **{("f", bits): f"f{bits // 8}" for bits in (16, 32, 64)},
}

PACKED_BITS = (1, 2, 4)
"""Bits of samples of which a byte holds several."""

UNCOMPRESSED = 1
JPEG_COMPRESSION, FAX_COMPRESSIONS = 7, (2, 3, 4)
COMPRESSIONS = {
    UNCOMPRESSED: "none",
    **dict.fromkeys(FAX_COMPRESSIONS, "CCITT"),
    5: "LZW",
    JPEG_COMPRESSION: "JPEG",
    8: "Deflate",
    32773: "PackBits",
    32946: "Deflate",
}
PREDICTED_COMPRESSIONS = (5, 8, 32946)
"""Compressions that use a predictor: with others, libtiff ignores it."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE_COLOUR, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6
STORED_COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE_COLOUR: 1, SEPARATED: 4, YCBCR: 3}
"""Samples of a pixel without alpha, by photometric interpretation."""

CMYK_INKS = 1
PREDICTOR_NONE, PREDICTOR_DIFFERENCE, PREDICTOR_FLOAT = 1, 2, 3
SEPARATE_PLANES = 2
PREMULTIPLIED_ALPHA = 1
REDUCED_IMAGE_FLAG = 1
"""Bit of the subfile type of thumbnails, which are skipped."""

MAX_PAGES = 4096
MAX_FIELDS = 512
MAX_CHUNKS = 1 << 16
"""Maximum number of strips or tiles in a file: Pillow keeps an object for each of them."""


class Page(NamedTuple):
    """Fields of a page; `chunks` are the offsets and sizes of its strips or tiles, in bytes.

    bits: of a stored sample. dtype: of a decoded one. samples: number of stored samples of a pixel. palette: colours
    (n, 3), or None. fax_fields, jpeg_tables: parameters of the compression.
    """

    width: int
    height: int
    dtype: np.dtype[Any]
    bits: int
    samples: int
    photometric: int
    is_premultiplied: bool
    orientation: int
    compression: int
    predictor: int
    is_planar: bool
    is_tiled: bool
    chunk_width: int
    chunk_height: int
    chunks: NDArray[np.int64]
    palette: NDArray[np.uint8] | None
    fax_fields: dict[int, int]
    jpeg_tables: bytes

    @property
    def colours(self) -> int:
        """The number of planes of the decoded image without alpha."""
        return 1 if self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) else RGB_CHANNELS

    @property
    def has_alpha(self) -> bool:
        """True if pixels have alpha."""
        return self.samples > STORED_COLOURS[self.photometric]

    @property
    def layout(self) -> tuple[object, ...]:
        """The properties that all pages of an image have in common."""
        return (
            self.width, self.height, self.dtype, self.colours, self.has_alpha, self.is_premultiplied, self.orientation
        )  # fmt: skip


def iterate_pages(memory: memoryview) -> Iterator[Page]:
    """Yield the pages, without thumbnails."""
    order = BYTE_ORDERS.get(bytes(memory[:2]), "<")
    version = int.from_bytes(memory[2:4], "little" if order == "<" else "big") if len(memory) >= 8 else 0
    if bytes(memory[:2]) not in BYTE_ORDERS or version not in (CLASSIC_VERSION, BIG_VERSION):
        raise format_mismatch_error(memory, "a TIFF image")
    offset_code = order + ("u4" if version == CLASSIC_VERSION else "u8")
    at = _read_number(memory, 4 if version == CLASSIC_VERSION else 8, offset_code)
    seen: set[int] = set()
    pages = 0
    while at:
        if at in seen or len(seen) >= MAX_PAGES:
            raise NotParseable(f"the TIFF image has more than {MAX_PAGES:,} pages, or repeats one")
        seen.add(at)
        fields, at = _read_directory(memory, at, order, offset_code)
        if not _first(fields, NEW_SUBFILE_TYPE, 0) & REDUCED_IMAGE_FLAG:
            pages += 1
            yield _parse_page(fields, order)
    if not pages:
        raise NotParseable("the TIFF image has no pages")


def _read_number(memory: memoryview, at: int, code: str) -> int:
    return int(_read_numbers(memory, at, code, 1)[0])


def _read_numbers(memory: memoryview, at: int, code: str, count: int) -> NDArray[Any]:
    if at + count * np.dtype(code).itemsize > len(memory):
        raise NotParseable(f"the TIFF image is cut off after {len(memory):,} bytes")
    return np.frombuffer(memory, code, count, at)


def _read_directory(
    memory: memoryview, at: int, order: str, offset_code: str
) -> tuple[dict[int, NDArray[np.int64]], int]:
    """Return the fields with integers by tag, and the offset of the next directory."""
    inline_bytes = np.dtype(offset_code).itemsize
    count_code = order + ("u2" if inline_bytes == 4 else "u8")
    count = _read_number(memory, at, count_code)
    if count > MAX_FIELDS:
        raise NotParseable(f"the TIFF image has a directory of {count:,} fields: at most {MAX_FIELDS} are read")
    start = at + np.dtype(count_code).itemsize
    entry = np.dtype([("tag", order + "u2"), ("type", order + "u2"), ("count", offset_code), ("value", offset_code)])
    if start + count * entry.itemsize > len(memory):
        raise NotParseable(f"the TIFF image is cut off after {len(memory):,} bytes")
    fields: dict[int, NDArray[np.int64]] = {}
    for number, (tag, kind, length, offset) in enumerate(np.frombuffer(memory, entry, count, start).tolist()):
        if kind in NUMBER_CODES and tag in READ_TAGS:
            code = order + NUMBER_CODES[kind]
            value_at = start + (number + 1) * entry.itemsize - inline_bytes
            is_inline = length * np.dtype(code).itemsize <= inline_bytes
            numbers = _read_numbers(memory, value_at if is_inline else offset, code, length)
            fields[tag] = numbers[:MAX_CHUNKS].astype(np.int64)
    return fields, _read_number(memory, start + count * entry.itemsize, offset_code)


READ_TAGS = frozenset(
    (
        NEW_SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION,
        SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES,
        T4_OPTIONS, T6_OPTIONS, PALETTE, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES,
    )
)  # fmt: skip


def _first(fields: dict[int, NDArray[np.int64]], tag: int, default: int) -> int:
    """Return the first number of a field."""
    numbers = fields.get(tag)
    return default if numbers is None or not len(numbers) else int(numbers[0])


def _parse_page(fields: dict[int, NDArray[np.int64]], order: str) -> Page:
    width, height = _first(fields, WIDTH, 0), _first(fields, HEIGHT, 0)
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise NotParseable(f"the TIFF image is {width} x {height} pixels: its sides must be at least 1")
    bits, code = _check_kind(fields)
    photometric = _first(fields, PHOTOMETRIC, BLACK_IS_ZERO)
    compression, samples = _first(fields, COMPRESSION, UNCOMPRESSED), _first(fields, SAMPLES, 1)
    is_tiled = TILE_OFFSETS in fields
    offsets, sizes = (
        fields.get(tag, np.empty(0, np.int64))
        for tag in ((TILE_OFFSETS, TILE_BYTES) if is_tiled else (STRIP_OFFSETS, STRIP_BYTES))
    )
    chunk_width = _first(fields, TILE_WIDTH, 0) if is_tiled else width
    chunk_height = _first(fields, TILE_HEIGHT, 0) if is_tiled else min(height, _first(fields, ROWS_PER_STRIP, height))
    is_planar = _is_planar(fields)
    if not (0 < chunk_width < 2**31 and 0 < chunk_height < 2**31):
        raise NotParseable(f"the TIFF image has strips or tiles of {chunk_width} x {chunk_height} pixels")
    needed = -(-width // chunk_width) * -(-height // chunk_height) * (samples if is_planar else 1)
    if min(len(offsets), len(sizes)) < needed or needed > MAX_CHUNKS:
        raise NotParseable(
            f"the TIFF image has {min(len(offsets), len(sizes)):,} strips or tiles: it needs {needed:,}, and at most "
            f"{MAX_CHUNKS:,} are read"
        )
    orientation = _first(fields, ORIENTATION, UPRIGHT)
    return Page(
        width, height, np.dtype(order + code), bits, samples, photometric,
        _first(fields, EXTRA_SAMPLES, 0) == PREMULTIPLIED_ALPHA, orientation if 1 <= orientation <= 8 else UPRIGHT,
        compression, _predictor(fields), is_planar, is_tiled, chunk_width, chunk_height,
        np.stack([offsets[:needed], sizes[:needed]], 1),
        _parse_palette(fields, bits) if photometric == PALETTE_COLOUR else None,
        {tag: _first(fields, tag, 0) for tag in (FILL_ORDER, T4_OPTIONS, T6_OPTIONS) if tag in fields},
        fields.get(JPEG_TABLES, np.empty(0)).astype(np.uint8).tobytes(),
    )  # fmt: skip


def _check_kind(fields: dict[int, NDArray[np.int64]]) -> tuple[int, str]:
    """Return the bits of a stored sample and numpy's code of a decoded one. Raises InvalidRequest."""
    samples, photometric = _first(fields, SAMPLES, 1), _first(fields, PHOTOMETRIC, BLACK_IS_ZERO)
    compression, predictor = _first(fields, COMPRESSION, UNCOMPRESSED), _predictor(fields)
    kind = SAMPLE_KINDS.get(_first(fields, SAMPLE_FORMAT, 1), "")
    all_bits = set(fields.get(BITS, np.ones(1, np.int64)).tolist())
    bits = max(all_bits, default=1)
    code = NUMPY_CODES.get((kind, bits)) if len(all_bits) == 1 else None
    is_packed = all_bits <= set(PACKED_BITS) and len(all_bits) == 1 and kind == "u" and samples == 1
    colours = STORED_COLOURS.get(photometric, 0)
    has_valid_predictor = predictor == PREDICTOR_NONE or (
        not is_packed and (predictor == PREDICTOR_DIFFERENCE or (predictor == PREDICTOR_FLOAT and kind == "f"))
    )
    is_jpeg, is_fax = compression == JPEG_COMPRESSION, compression in FAX_COMPRESSIONS
    is_plain_jpeg = (
        code == "u1" and samples == colours and photometric not in (PALETTE_COLOUR, SEPARATED)
        and not (_is_planar(fields) and photometric == YCBCR)
    )  # fmt: skip
    checks = (
        (code is not None or is_packed,
         f"samples of {sorted(all_bits)} bits in format {_first(fields, SAMPLE_FORMAT, 1)}",
         "integers of 8 to 64 bits, floating point of 16 to 64 bits, or one sample of 1, 2 or 4 bits"),
        (colours > 0 and (photometric != YCBCR or is_jpeg), f"photometric interpretation {photometric}",
         "grey (0 or 1), RGB (2), palette (3) or CMYK (5); YCbCr (6) only with JPEG"),
        (colours <= samples <= colours + 1, f"{samples} samples per pixel", "grey, RGB or CMYK, with or without alpha"),
        (photometric != WHITE_IS_ZERO or kind == "u", "inverted grey that is not of unsigned integers", "grey"),
        (photometric != PALETTE_COLOUR or (kind == "u" and bits <= 8 and samples == 1),
         f"a palette for {samples} samples of {bits} bits", "one sample of 1, 2, 4 or 8 bits"),
        (photometric != SEPARATED or (code in ("u1", "u2") and not _is_planar(fields)
         and _first(fields, INK_SET, CMYK_INKS) == CMYK_INKS),
         f"inks of {bits} bits", "CMYK of 8 or 16 bits, not in separate planes"),
        (compression in COMPRESSIONS, f"compression {compression}", ", ".join(dict.fromkeys(COMPRESSIONS.values()))),
        (not is_jpeg or is_plain_jpeg, "this combination of JPEG compression and samples",
         "grey, RGB or YCbCr of 8 bits without alpha"),
        (not is_fax or (is_packed and bits == 1 and photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)),
         f"CCITT compression of {samples} samples of {bits} bits", "grey of 1 bit"),
        (has_valid_predictor, f"predictor {predictor}", "none, differences (2), or floating point (3)"),
        (is_fax or _first(fields, FILL_ORDER, 1) == 1, "reversed bits (fill order)", "fill order 1"),
    )  # fmt: skip
    for is_supported, got, allowed in checks:
        if not is_supported:
            message = f"input is a TIFF image with {got}: supported: {allowed}; convert it, or send application/x-npy"
            raise InvalidRequest(message, errors=[FieldError("input", message, got, allowed)])
    return bits, code or "u1"


def _predictor(fields: dict[int, NDArray[np.int64]]) -> int:
    is_used = _first(fields, COMPRESSION, UNCOMPRESSED) in PREDICTED_COMPRESSIONS
    return _first(fields, PREDICTOR, PREDICTOR_NONE) if is_used else PREDICTOR_NONE


def _is_planar(fields: dict[int, NDArray[np.int64]]) -> bool:
    return _first(fields, PLANAR, 1) == SEPARATE_PLANES and _first(fields, SAMPLES, 1) > 1


def _parse_palette(fields: dict[int, NDArray[np.int64]], bits: int) -> NDArray[np.uint8]:
    """Return the colours, (n, 3), in 8 bits: the high bytes, or the low ones where a program wrote those."""
    numbers = fields.get(PALETTE, np.empty(0, np.int64))
    if len(numbers) != RGB_CHANNELS * 2**bits:
        raise NotParseable(
            f"the TIFF image has a palette of {len(numbers):,} numbers, expected {RGB_CHANNELS * 2**bits}"
        )
    values = numbers >> 8 if numbers.max() >= 256 else numbers
    return values.reshape(RGB_CHANNELS, -1).T.astype(np.uint8)
