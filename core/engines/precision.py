"""Error bound of the engines that do not sum directly, and the computations that keep within it.

Let Y be the computed and Y64 the exact output, S the sum of |x| |k| over one output's window, n the number of taps and
u the unit roundoff. Every output plane has max|Y - Y64| <= OUTPUT_TOLERANCE max|Y64| + 4 sqrt(n) u max S, and integer
outputs whose sums stay below 1 / (2u) are exact. An engine estimates its own error. If the estimate exceeds the bound,
for which S is sampled in a few windows, the plane is recomputed with higher precision. Planes with values near the ends
of the floating-point range are scaled by powers of two. Products of values that are not finite are left out and added
afterwards (core/engines/nonfinite.py).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.arrays import ConvolveFn
from core.engines import halide_jit, interior, nonfinite
from core.engines.halide_jit import Plane
from core.engines.interior import Borders
from core.problem import Dtype, Problem
from core.shapes import Pair

MIN_SAMPLED_ROWS = 16
"""Minimum number of output rows that are sampled to estimate the largest output; a low estimate only costs time."""

SLAB_VALUES = 1 << 18
"""Output values that are recomputed at a time (more for tall kernels); limits the memory of a recomputation."""

SLAB_TEMPORARY_ARRAYS = 10
"""Maximum number of temporary float32 arrays of the size of a slab in a recomputation; measured."""

MIN_RECOMPUTED_SIDE = 64
"""Minimum rows and columns of a recomputed part of an output, if it has as many; a smaller part is not faster."""

UNIT_ROUNDOFF: dict[np.dtype[Any], float] = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}
"""Maximum relative error of rounding a number."""

OUTPUT_TOLERANCE: dict[np.dtype[Any], float] = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}
"""Allowed error as a fraction of the largest output, independent of the number of taps."""

MAX_FINITE = {np.dtype(dtype): float(np.finfo(dtype).max) for dtype in (np.float32, np.float64)}
MIN_FULL_PRECISION = {
    np.dtype(dtype): float(np.finfo(dtype).tiny / np.finfo(dtype).eps) for dtype in (np.float32, np.float64)
}
"""Smallest magnitude at which products keep their full relative precision."""

TRANSFORM_ERROR_FACTOR = 8
"""Typical maximum error of a forward and inverse transform of a random image, in unit roundoffs times the largest
transformed number times the kernel's Euclidean norm. Smooth images and kernels have larger errors, proportional to
their largest output; the terms of the bound for max|Y64| and max S are larger still."""

PIXEL_ERROR_FACTOR, OUTPUT_ERROR_FACTOR = 32, 16
"""Estimated largest error of a transform: unit roundoffs times PIXEL_ERROR_FACTOR times the largest transformed number
and the kernel's norm, plus OUTPUT_ERROR_FACTOR times the largest |output|. The largest measured error of random, smooth
and piecewise constant images was 1.3 times this; MAX_ERROR_TO_ROUND allows for it."""

MAX_DIRECT_TAPS = 1024
"""Maximum number of taps of a direct sum that replaces a transform of insufficient precision."""

MAX_ERROR_TO_ROUND = 0.25
"""Largest estimated error of integers that are rounded, half of the error at which rounding fails."""


class TransformEstimate(NamedTuple):
    """Values that a transform reports: largest |pixel| (not finite if a pixel is not), kernel norm and error.

    `error` is the engine's own estimate of the maximum error of the output.
    """

    max_pixel: float
    kernel_norm: float
    error: float


TransformFn: TypeAlias = Callable[[Plane, Plane, Plane], Sequence[TransformEstimate]]
"""Plane (H, W), kernel (h, w), output (oh, ow) to fill -> estimates of the whole plane, or of each of its parts.
If a value is not finite or an intermediate result overflows, the output is replaced; the function must not warn."""


def allowed_error(dtype: np.dtype[Any], taps: int, output: Any, sums: Any) -> Any:
    """Return the allowed error for the largest |output| and the largest sum of |x| |k|; both are numbers or arrays."""
    return OUTPUT_TOLERANCE[dtype] * output + 4 * math.sqrt(taps) * UNIT_ROUNDOFF[dtype] * sums


def rounding_error(dtype: np.dtype[Any], transform_error: Any, max_output: Any) -> Any:
    """Return the largest error of outputs, from the estimated error of random images and the largest |output|."""
    per_pixel = PIXEL_ERROR_FACTOR / TRANSFORM_ERROR_FACTOR * transform_error
    return per_pixel + OUTPUT_ERROR_FACTOR * UNIT_ROUNDOFF[dtype] * max_output


def max_magnitude(values: NDArray[Any]) -> float:
    """Return the largest absolute value, without a copy; NaN if a value is NaN."""
    return max(float(values.max()), -float(values.min()))


def can_subtract_middle(low: Any, high: Any) -> Any:
    """Return whether a range has one sign and its smallest magnitude is at least half of its largest.

    If so, subtracting the middle of the range from numbers in it is exact (Sterbenz, Floating-Point Computation,
    1974). Accepts numbers, tensors and Halide expressions.
    """
    return ((high > 0) & (low + low >= high)) | ((low < 0) & (high + high <= low))


def plan_within_bound(problem: Problem, borders: Borders, transform: TransformFn) -> ConvolveFn:
    """Return a convolution within the error bound, computed plane by plane."""

    def fill_part(pixels: Plane, output: Plane, weight: Plane) -> None:
        for plane, target in zip(pixels[:, 0], output[:, 0], strict=True):
            correlate_within_bound(plane, weight[0, 0], target, transform)

    return halide_jit.allocate_and_fill(
        problem, interior.split_interior_and_borders(problem, borders, lambda _: fill_part)
    )


def temporary_bytes(problem: Problem, borders: Borders) -> int:
    """Return the bytes of padded copies and of a recomputation."""
    rows = problem.output_size[0]
    slab = 2 * max(SLAB_VALUES, 4 * problem.kernel_height * problem.padded_size[1])
    again = SLAB_TEMPORARY_ARRAYS * 4 * min(slab, (rows + problem.kernel_height) * problem.padded_size[1])
    if problem.dtype == "float64":
        again *= 3
    return interior.border_bytes(problem, borders) + again


def correlate_within_bound(
    plane: Plane, kernel: Plane, output: Plane, transform: TransformFn, bound: np.dtype[Any] | None = None
) -> None:
    """Fill the output (oh, ow) within the error bound of its dtype, or of `bound` if given.

    The output may be a view of a larger array.
    """
    bound = bound or plane.dtype
    estimates = transform(plane, kernel, output)
    sizes, norm = [each.max_pixel for each in estimates], estimates[0].kernel_norm
    if max(sizes) <= MIN_FULL_PRECISION[plane.dtype]:
        # Compiled comparisons may treat subnormal numbers as zero.
        sizes = [max_magnitude(plane)]
    if norm <= MIN_FULL_PRECISION[plane.dtype]:
        # Squares of the smallest numbers underflow to zero.
        norm = max_magnitude(kernel)
    size, error = max(sizes), max(each.error for each in estimates)
    if not all(map(math.isfinite, (*sizes, norm))):
        if not (np.isfinite(plane).all() and np.isfinite(kernel).all()):
            _fill_by_slabs(_fill_with_nonfinite, plane, kernel, output, transform)
            return
        size, norm, error = math.inf, math.inf, math.inf
    integers = _yields_exact_integers(plane, kernel, size)
    if not _is_in_safe_range(size, norm, max(plane.shape) ** 2, plane.dtype):
        _fill_by_slabs(_fill_with_more_range, plane, kernel, output, transform)
    elif not _is_within_bound(plane, kernel, output, error, bound, integers=integers):
        rows, columns = nonzero_support(kernel)
        if (inside := kernel[rows, columns]).shape != kernel.shape:
            # Large pixels that are only multiplied by zero taps at the kernel's border do not count for the bound.
            read = plane[rows.start :, columns.start :][: len(output) + len(inside) - 1]
            correlate_within_bound(read[:, : output.shape[1] + inside.shape[1] - 1], inside, output, transform, bound)
        else:
            _fill_by_slabs(_fill_with_more_digits, plane, kernel, output, transform)
    if integers:
        np.rint(output, out=output)
        # Turns -0.0 into 0.0.
        output += 0.0


def nonzero_support(kernel: NDArray[Any]) -> tuple[slice, slice]:
    """Return the smallest ranges of rows and columns with all nonzero taps of a kernel (..., h, w).

    If all taps are zero, the ranges cover the whole kernel.
    """
    taps = (kernel != 0).reshape(-1, *kernel.shape[-2:]).any(0)
    if not taps.any():
        return slice(0, kernel.shape[-2]), slice(0, kernel.shape[-1])
    sides = (np.flatnonzero(taps.any(axis)) for axis in (1, 0))
    rows, columns = (slice(int(side[0]), int(side[-1]) + 1) for side in sides)
    return rows, columns


def _yields_exact_integers(plane: Plane, kernel: Plane, size: float) -> bool:
    """Return whether all outputs, and all partial sums, are integers that the type represents exactly."""
    if not (kernel.item(0, 0).is_integer() and plane.item(0, 0).is_integer()):
        return False
    if not size * float(np.abs(kernel).sum(dtype=np.float64)) < 0.5 / UNIT_ROUNDOFF[plane.dtype]:
        return False
    return bool((kernel == np.rint(kernel)).all()) and _is_integer_valued(plane)


def _is_integer_valued(plane: Plane) -> bool:
    """Return whether all values are integers. Checks a few rows at a time: most planes fail in the first ones."""
    rows = max(1, (1 << 15) // plane.shape[1])
    parts = (plane[first : first + rows] for first in range(0, len(plane), rows))
    return all(bool((part == np.rint(part)).all()) for part in parts)


def _is_in_safe_range(size: float, norm: float, points: int, dtype: np.dtype[Any]) -> bool:
    """Return whether intermediate results, such as spectra of `points` values, neither overflow nor underflow."""
    least = MIN_FULL_PRECISION[dtype]
    has_digits = size > least and norm > least * points and size * norm > least * points
    return size * norm * points < MAX_FINITE[dtype] and (size == 0 or norm == 0 or has_digits)


def _is_within_bound(
    plane: Plane, kernel: Plane, output: Plane, error: float, bound: np.dtype[Any], *, integers: bool
) -> bool:
    """Return whether the error is within the bound, which is estimated from samples of output and input."""
    if integers and rounding_error(plane.dtype, error, max_magnitude(output)) > MAX_ERROR_TO_ROUND:
        return False
    reached = 0.0
    for some in (output[len(output) // 2], output[:: 1 + len(output) // MIN_SAMPLED_ROWS]):
        reached = max_magnitude(some)
        if error <= allowed_error(bound, kernel.size, reached, reached):
            return True
    return any(
        error <= allowed_error(bound, kernel.size, reached, sums) for sums in _sample_magnitude_sums(plane, kernel)
    )


def _sample_magnitude_sums(plane: Plane, kernel: Plane) -> Iterator[float]:
    """Yield sums of |x| |k| of a few windows; in the last one the largest pixel is multiplied by the largest tap."""
    (h, w), taps = kernel.shape, np.abs(kernel).astype(np.float64)
    last_corner = plane.shape[0] - h, plane.shape[1] - w

    def of_window(row: int, column: int) -> float:
        return float((np.abs(plane[row : row + h, column : column + w]) * taps).sum())

    yield from itertools.starmap(of_window, sample_corners(last_corner))
    pixel, tap = (np.unravel_index(int(sizes.argmax()), sizes.shape) for sizes in (np.abs(plane), taps))
    yield of_window(*align_corner(pixel, tap, last_corner))


def sample_corners(last_corner: Pair) -> list[Pair]:
    """Return the first row and column of nine windows, the middle one first.

    `last_corner` is the first row and column of the last possible window.
    """
    parts = (1 / 2, 0, 1)
    return [(int(last_corner[0] * down), int(last_corner[1] * across)) for down in parts for across in parts]


def align_corner(pixel: Sequence[Any], tap: Sequence[Any], last_corner: Pair) -> Pair:
    """Return the first row and column of the window in which `tap` reads `pixel`, or of the nearest window."""
    row, column = (
        min(max(0, int(at) - int(within)), last) for at, within, last in zip(pixel, tap, last_corner, strict=True)
    )
    return row, column


def _fill_by_slabs(
    fill: Callable[[Plane, Plane, Plane, TransformFn], None],
    plane: Plane,
    kernel: Plane,
    output: Plane,
    transform: TransformFn,
) -> None:
    """Call `fill` for a few output rows at a time, which limits the temporary memory."""
    h, rows = len(kernel), len(output)
    # Slabs are several times as tall as the kernel; otherwise most rows would be read twice.
    slabs = max(1, rows // max(SLAB_VALUES // plane.shape[1], 4 * h, MIN_RECOMPUTED_SIDE))
    for slab in range(slabs):
        first, last = slab * rows // slabs, (slab + 1) * rows // slabs
        fill(plane[first : last + h - 1], kernel, output[first:last], transform)


def _fill_with_nonfinite(plane: Plane, kernel: Plane, output: Plane, transform: TransformFn) -> None:
    """Fill the output from the finite values, then add the products that are not finite."""
    affected = slice(0, output.shape[0]), slice(0, output.shape[1])
    if not np.isfinite(kernel).all():
        # Every output reads every tap, so no output is finite.
        output[...] = 0
    elif (finite := np.isfinite(plane)).all():
        correlate_within_bound(plane, kernel, output, transform)
        return
    else:
        # Outputs that read a nonfinite pixel are replaced below, so any finite value can stand for such a pixel.
        other = plane.flat[int(finite.argmax())] if finite.any() else plane.dtype.type(0)
        correlate_within_bound(np.where(finite, plane, other), kernel, output, transform)
        rows, columns = (np.flatnonzero(~finite.all(axis=axis)) for axis in (1, 0))
        affected = (
            _outputs_reading(rows, kernel.shape[0], output.shape[0]),
            _outputs_reading(columns, kernel.shape[1], output.shape[1]),
        )
    read = tuple(slice(side.start, side.stop + taps - 1) for side, taps in zip(affected, kernel.shape, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        nonfinite.add_nonfinite_products(
            output[affected], plane[read], kernel, functools.partial(_correlate_integers, transform), np
        )


def _outputs_reading(positions: NDArray[np.intp], taps: int, outputs: int) -> slice:
    """Return the range of outputs that read any pixel from the first to the last position."""
    first, last = max(0, int(positions[0]) - taps + 1), min(outputs, int(positions[-1]) + 1)
    first = max(0, min(first, outputs - MIN_RECOMPUTED_SIDE))
    return slice(first, min(outputs, max(last, first + MIN_RECOMPUTED_SIDE)))


def _correlate_integers(transform: TransformFn, pixels: Plane, kernel: Plane) -> Plane:
    output = np.empty(
        tuple(side - taps + 1 for side, taps in zip(pixels.shape, kernel.shape, strict=True)), pixels.dtype
    )
    transform(pixels, kernel, output)
    return output


def _fill_with_more_range(pixels: Plane, kernel: Plane, output: Plane, transform: TransformFn) -> None:
    """Fill the output without overflow or underflow: float32 in float64, float64 scaled by powers of two."""
    if pixels.dtype == np.float32:
        _fill_with_more_digits(pixels, kernel, output, transform)
        return
    of_pixels, of_kernel = (int(np.frexp(np.abs(values).max())[1]) for values in (pixels, kernel))
    correlate_within_bound(np.ldexp(pixels, -of_pixels), np.ldexp(kernel, -of_kernel), output, transform)
    with np.errstate(over="ignore"):
        np.ldexp(output, of_pixels + of_kernel, out=output)


def _fill_with_more_digits(pixels: Plane, kernel: Plane, output: Plane, transform: TransformFn) -> None:
    """Fill the output in float64 if the input is float32, otherwise as precisely as possible."""
    if pixels.dtype == np.float32:
        precise = np.empty(output.shape)
        correlate_within_bound(pixels.astype(np.float64), kernel.astype(np.float64), precise, transform, pixels.dtype)
        with np.errstate(over="ignore"):
            output[...] = precise
    else:
        output[...] = correlate_most_precisely(pixels, kernel)


def correlate_most_precisely(pixels: Plane, kernel: Plane) -> NDArray[Any]:
    """Compute the correlation (oh, ow) tap by tap, or by transforms in long double if there are many taps."""
    if np.count_nonzero(kernel) > MAX_DIRECT_TAPS:
        return correlate_with_numpy_fft(pixels, kernel, np.longdouble)
    rows, columns = (side - taps + 1 for side, taps in zip(pixels.shape, kernel.shape, strict=True))
    sums = np.zeros((rows, columns))
    for row, column in np.argwhere(kernel):
        sums += pixels[row : row + rows, column : column + columns] * kernel[row, column]
    return sums


def correlate_with_numpy_fft(pixels: Plane, kernel: Plane, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Return the correlation (oh, ow), computed with numpy's Fourier transforms in the given dtype."""
    size = pixels.shape
    spectrum = np.fft.rfft2(pixels.astype(dtype), s=size)
    spectrum *= np.conj(np.fft.rfft2(kernel.astype(dtype), s=size))
    sums: NDArray[Any] = np.fft.irfft2(spectrum, s=size)
    return sums[: size[0] - kernel.shape[0] + 1, : size[1] - kernel.shape[1] + 1]


def dtype_name(array: Plane) -> Dtype:
    """Return the name of the array's dtype, as in Problem.dtype."""
    return "float32" if array.dtype == np.float32 else "float64"
