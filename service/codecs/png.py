"""PNG pictures: grey as (H, W), colour as (3, H, W), values 0..255 (0..65535 where a grey one has 16 bits)."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

PLANES_OF_COLOUR = 3


def decode(content: bytes) -> NDArray[Any]:
    """The picture; an alpha channel is dropped, a palette resolved. Raises ValueError where it is no PNG."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            if picture.mode.startswith("I"):
                return np.asarray(picture)
            grey = picture.mode in ("1", "L", "LA")
            pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG picture: {error}") from error
    return pixels if grey else np.moveaxis(pixels, 2, 0)


def encode(planes: NDArray[Any]) -> bytes:
    """A plane (H, W) in grey or three (3, H, W) in colour, scaled from their own minimum and maximum to 0..255.

    Raises ValueError for any other shape, and for values that are not finite.
    """
    while planes.ndim > 2 and len(planes) == 1:
        planes = planes[0]
    if planes.ndim != 2 and planes.shape[:-2] != (PLANES_OF_COLOUR,):
        raise ValueError(f"a PNG holds one plane (H, W) or three (3, H, W), not {planes.shape}: write .npy instead")
    if not np.isfinite(planes).all():
        raise ValueError("a PNG holds finite values only: write .npy instead")
    low, high = float(planes.min()), float(planes.max())
    scaled = (planes.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
    pixels = np.rint(scaled).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if planes.ndim == 2 else np.moveaxis(pixels, 0, 2)).save(buffer, format="PNG")
    return buffer.getvalue()
