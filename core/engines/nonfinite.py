"""Infinities and NaN for engines that use Fourier transforms, which would spread one such value over a whole tile.

The engine transforms the finite values only. The outputs that are not finite, and whether they are +Inf, -Inf or NaN,
follow from the signs of both factors of every product that is not finite. Sums of signs are correlations too, and the
same engine computes them.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

CorrelateFn: TypeAlias = Callable[[Any, Any], Any]
"""Images and weight of small integers -> their correlation, with an error below 0.5."""


def add_nonfinite_products(output: Any, images: Any, weight: Any, correlate: CorrelateFn, xp: Any) -> None:
    """Add the products that are not finite to an output that is the sum of all finite products.

    `xp` is the module of all three arrays, numpy or torch; their shapes are those that `correlate` takes and returns.

    The result depends on two sums. An infinite product adds 1 to `count` and its sign to `signed`. A product that is
    NaN adds 1 or 2 to `count` and 0 to `signed`, like two infinities of opposite signs. So count + signed is positive
    if one of the products is +Inf, count - signed is positive if one is -Inf, and both are positive if the sum is NaN.
    """
    outside, infinite = _nonfinite_mask_and_signs(images, xp)
    taps_outside, infinite_taps = _nonfinite_mask_and_signs(weight, xp)
    taps = _cast_like(weight > 0, weight, xp) - _cast_like(weight < 0, weight, xp)
    # First the products of any tap and a nonfinite pixel, then those of a finite pixel and a nonfinite tap.
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
        # Twice the largest number overflows to infinity; this is several times faster than selecting with a mask.
        largest = _cast_like(count + sign * signed > 0.5, output, xp) * (sign * xp.finfo(output.dtype).max)
        output += 2 * largest


def _nonfinite_mask_and_signs(values: Any, xp: Any) -> tuple[Any, Any]:
    """Return a mask of the values that are not finite, as numbers, and their signs: 1, -1, or 0 for NaN and others."""
    signs = _cast_like(values == math.inf, values, xp) - _cast_like(values == -math.inf, values, xp)
    return _cast_like(~xp.isfinite(values), values, xp), signs


def _cast_like(condition: Any, like: Any, xp: Any) -> Any:
    return xp.asarray(condition, dtype=like.dtype)


def _relative_sign(one: Any, other: Any) -> int:
    """Return the sign, 1 or -1, for which `one` equals sign * `other`; 0 if there is none."""
    return next((sign for sign in (1, -1) if bool((one == sign * other).all())), 0)
