"""Infinities and NaN for engines that transform: a transform would spread one over all that it touches.

The finite values are transformed without them. Which outputs are not finite, and how, follows from the signs of both
factors of every product that is not finite, and sums of signs are correlations too, which the same engine computes.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

CorrelateFn: TypeAlias = Callable[[Any, Any], Any]
"""Images and weight of small integers -> their correlation, off by less than a half."""


def add_nonfinite_products(output: Any, images: Any, weight: Any, correlate: CorrelateFn, xp: Any) -> None:
    """Add the products that are not finite to an output that is the sum of all others.

    `xp` is numpy or torch, the module of all three arrays, whose shapes are those that `correlate` takes and returns.

    Two sums decide. An infinite product adds 1 to `count` and its sign to `signed`. A product that is NaN adds 1 or 2
    to `count` and nothing to `signed`, like two infinities of opposite signs. So count + signed is positive if one of
    the products is +Inf, count - signed if one is -Inf, and both are if the sum is NaN.
    """
    outside, infinite = _nonfinite_mask_and_signs(images, xp)
    taps_outside, infinite_taps = _nonfinite_mask_and_signs(weight, xp)
    taps = _cast_like(weight > 0, weight, xp) - _cast_like(weight < 0, weight, xp)
    # Products of any tap and a pixel that is not finite; of a finite pixel and a tap that is not.
    products = []
    if bool(outside.any()):
        products.append((outside, 2 - xp.abs(taps), infinite, taps))
    if bool(taps_outside.any()):
        signs = _cast_like(images > 0, images, xp) - _cast_like(images < 0, images, xp) - infinite
        products.append((2 - 2 * outside - xp.abs(signs), taps_outside, signs, infinite_taps))
    count: Any = 0
    signed: Any = 0
    for pixels, kernel, signed_pixels, signed_kernel in products:
        counted = correlate(pixels, kernel)
        count = count + counted
        sign = _relative_sign(signed_kernel, kernel) and _relative_sign(signed_kernel, kernel) * _relative_sign(
            signed_pixels, pixels
        )
        signed = signed + (sign * counted if sign else correlate(signed_pixels, signed_kernel))
    for sign in (1, -1):
        # Twice the largest number is an infinity, and several times faster than a choice by a mask.
        largest = _cast_like(count + sign * signed > 0.5, output, xp) * (sign * xp.finfo(output.dtype).max)
        output += 2 * largest


def _nonfinite_mask_and_signs(values: Any, xp: Any) -> tuple[Any, Any]:
    """1 for values that are not finite, and their signs: 1, -1 or, for NaN, 0; all others are 0."""
    signs = _cast_like(values == math.inf, values, xp) - _cast_like(values == -math.inf, values, xp)
    return _cast_like(~xp.isfinite(values), values, xp), signs


def _cast_like(condition: Any, like: Any, xp: Any) -> Any:
    return xp.asarray(condition, dtype=like.dtype)


def _relative_sign(one: Any, other: Any) -> int:
    """1 or -1 if that times `other` is `one`, else 0."""
    return next((sign for sign in (1, -1) if bool((one == sign * other).all())), 0)
