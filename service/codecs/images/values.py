"""Conversion of arrays to the pixels of an image, for encoders of 8 bits per sample."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import NotAcceptable

RGB_CHANNELS = 3


def convert_to_pixels(array: NDArray[Any], form: str, *, clip: bool, white: int = 255) -> NDArray[Any]:
    """Return a plane (H, W), or three (3, H, W), as unsigned integers; leading sides of 1 are dropped.

    The values are scaled from their own minimum and maximum to 0..255 or, with `clip`, rounded and clamped to 0..white.
    Raises NotAcceptable, which names `form`, for any other shape, and for values that are not finite.
    """
    planes = array
    while planes.ndim > 2 and len(planes) == 1:
        planes = planes[0]
    if 0 in planes.shape or (planes.ndim != 2 and planes.shape[:-2] != (RGB_CHANNELS,)):
        raise NotAcceptable(
            f"the output {array.shape} is not an image: a {form} holds one plane (H, W) or three (3, H, W); "
            "request application/x-npy instead"
        )
    low, high = float(planes.min()), float(planes.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotAcceptable(
            f"the output has values that are not finite: a {form} holds finite values only; "
            "request application/x-npy instead"
        )
    return _clip(planes, white) if clip else _scale(planes, low, high)


def _clip(planes: NDArray[Any], white: int) -> NDArray[Any]:
    """Return the values rounded and clamped to 0..white, in the smallest dtype."""
    # float16, in which numpy rounds small integers, cannot hold 65535.
    rounded = np.rint(planes, dtype=np.promote_types(planes.dtype, np.float32))
    pixels: NDArray[Any] = np.clip(rounded, 0, white).astype(np.min_scalar_type(white))
    return pixels


def _scale(planes: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if high == low:
        return np.zeros(planes.shape, np.uint8)
    span = high - low
    if not 1e-30 < span < 1e30:
        # Scale the numbers to near 1: nothing below can overflow then, and no precision is lost.
        exponent = -math.frexp(max(abs(low), abs(high)))[1]
        planes = np.ldexp(planes.astype(np.float64), exponent)
        low, high = math.ldexp(low, exponent), math.ldexp(high, exponent)
        span = high - low
    # float32 for dtypes that it holds exactly, float64 for wider ones.
    values = np.subtract(planes, low, dtype=np.promote_types(planes.dtype, np.float32))
    values *= 255 / span
    scaled: NDArray[np.uint8] = np.rint(values, out=values).astype(np.uint8)
    return scaled
