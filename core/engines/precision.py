"""Precision of the engines that do not sum directly: the error bound, and the computations that keep to it.

With Y64 the exact output, S the sum of |x| |k| over one output's window, n the number of taps and u the unit roundoff,
every output plane has max|Y - Y64| <= OF_OUTPUT max|Y64| + 4 sqrt(n) u max S; integers whose sums stay below 1 / (2u)
are exact. An engine estimates its own error. If the estimate exceeds the bound, for which S is sampled in a few
windows, the plane is computed again with more digits. Planes with numbers near the ends of the range are scaled by
powers of two. Values that are not finite are left out and added afterwards (core/engines/nonfinite.py).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.arrays import ConvolveFn
from core.engines import halide_jit, nonfinite
from core.engines.halide_jit import Plane
from core.shapes import Dtype, Pair, Problem

MIN_SAMPLED_ROWS = 16
"""Rows of the output that show how large it is, as a rule; where they mislead, the answer only takes longer."""

SLAB_VALUES = 1 << 18
"""Values that are computed once more at a time, unless the kernel is tall: bounds the memory that it takes."""

SLAB_TEMPORARY_ARRAYS = 10
"""Arrays of float32 as large as a slab, input or output, that computing it once more takes at most; measured."""

MIN_RECOMPUTED_SIDE = 64
"""Rows and columns of output that are computed at least, if there are as many: narrower ones save nothing."""

UNIT_ROUNDOFF: dict[np.dtype[Any], float] = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}
"""The largest relative error of rounding a number."""

OUTPUT_TOLERANCE: dict[np.dtype[Any], float] = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}
"""The error that is allowed whatever the sizes are, as a share of the largest output."""

MAX_FINITE = {np.dtype(dtype): float(np.finfo(dtype).max) for dtype in (np.float32, np.float64)}
MIN_FULL_PRECISION = {
    np.dtype(dtype): float(np.finfo(dtype).tiny / np.finfo(dtype).eps) for dtype in (np.float32, np.float64)
}
"""Products of numbers above that have all their digits."""

TRANSFORM_ERROR_FACTOR = 8
"""The largest error of a transform there and back, in unit roundoffs of the largest number that is transformed times
the kernel's Euclidean norm. Seen were errors up to 2, over thousands of random images and kernels of every size."""

MAX_DIRECT_TAPS = 1024
"""Taps that are summed directly, one after the other, where no transform has enough digits."""

MAX_ERROR_TO_ROUND = 0.25
"""An error below which rounding to integers is right."""


class TransformEstimate(NamedTuple):
    """The size of a plane's largest pixel, which is not finite where one is not, the kernel's norm, and the error.

    The error is the engine's own estimate of what the output may be off by.
    """

    size: float
    norm: float
    error: float


TransformFn: TypeAlias = Callable[[Plane, Plane, Plane], Sequence[TransformEstimate]]
"""Plane (H, W), kernel (h, w), output (oh, ow) to fill -> what was seen, of the whole or of parts."""


def allowed_error(dtype: np.dtype[Any], taps: int, output: Any, sums: Any) -> Any:
    """Return the error that is allowed for the largest output and the largest sum of |x| |k|: numbers or arrays."""
    return OUTPUT_TOLERANCE[dtype] * output + 4 * math.sqrt(taps) * UNIT_ROUNDOFF[dtype] * sums


def max_magnitude(values: NDArray[Any]) -> float:
    """Return the largest absolute value, without a copy; NaN if a value is NaN."""
    return max(float(values.max()), -float(values.min()))


def can_subtract_middle(low: Any, high: Any) -> Any:
    """Return whether all of a range has one sign and its smallest magnitude is at least half of its largest.

    Then the middle of the range can be subtracted from its numbers exactly (Sterbenz, Floating-Point Computation,
    1974). For numbers, tensors and Halide's expressions.
    """
    return ((high > 0) & (low + low >= high)) | ((low < 0) & (high + high <= low))


def plan_within_bound(problem: Problem, tile: Pair, transform: TransformFn) -> ConvolveFn:
    """A solution within the bound, plane by plane; borders are no narrower than a tile."""

    def fill_part(pixels: Plane, output: Plane, weight: Plane) -> None:
        for plane, target in zip(pixels[:, 0], output[:, 0], strict=True):
            correlate_within_bound(plane, weight[0, 0], target, transform)

    return halide_jit.allocate_and_fill(
        problem, halide_jit.split_interior_and_borders(problem, tile, lambda _: fill_part)
    )


def temporary_bytes(problem: Problem, tile: Pair) -> int:
    """Memory of copies with a border, and of what is computed once more."""
    rows = problem.output_size[0]
    slab = 2 * max(SLAB_VALUES, 4 * problem.kernel_height * problem.padded_size[1])
    again = SLAB_TEMPORARY_ARRAYS * 4 * min(slab, (rows + problem.kernel_height) * problem.padded_size[1])
    if problem.dtype == "float64":
        again *= 3
    return halide_jit.border_bytes(problem, tile) + again


def correlate_within_bound(
    plane: Plane, kernel: Plane, output: Plane, transform: TransformFn, bound: np.dtype[Any] | None = None
) -> None:
    """Fill the output (oh, ow), which may be a part of a larger one, within the bound for its type, or for another."""
    bound = bound or plane.dtype
    seen = transform(plane, kernel, output)
    size, norm, error = max(each.size for each in seen), seen[0].norm, max(each.error for each in seen)
    if not all(math.isfinite(each.size) for each in seen) or not math.isfinite(norm):
        if not (np.isfinite(plane).all() and np.isfinite(kernel).all()):
            _fill_by_slabs(_fill_with_nonfinite, plane, kernel, output, transform)
            return
        size, norm, error = math.inf, math.inf, math.inf
    if size <= MIN_FULL_PRECISION[plane.dtype]:
        # Compiled comparisons may take the smallest numbers for zero.
        size = max_magnitude(plane)
    if norm <= MIN_FULL_PRECISION[plane.dtype]:
        # Squares of the smallest numbers are zero.
        norm = max_magnitude(kernel)
    integers = _yields_exact_integers(plane, kernel, size)
    if not _is_in_safe_range(size, norm, max(plane.shape) ** 2, plane.dtype):
        _fill_by_slabs(_fill_with_more_range, plane, kernel, output, transform)
    elif not _is_within_bound(plane, kernel, output, error, bound, integers=integers):
        rows, columns = nonzero_support(kernel)
        if (inside := kernel[rows, columns]).shape != kernel.shape:
            # Pixels that meet only zeros may be of any size.
            read = plane[rows.start :, columns.start :][: len(output) + len(inside) - 1]
            correlate_within_bound(read[:, : output.shape[1] + inside.shape[1] - 1], inside, output, transform, bound)
        else:
            _fill_by_slabs(_fill_with_more_digits, plane, kernel, output, transform)
    if integers:
        np.rint(output, out=output)
        # Zeros have no sign.
        output += 0.0


def nonzero_support(kernel: NDArray[Any]) -> tuple[slice, slice]:
    """Return the rows and columns of a kernel (..., h, w) outside which it is zero; all of them if it is all zeros."""
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
    """Return whether all values are integers. Most planes with others have one in the first rows."""
    rows = max(1, (1 << 15) // plane.shape[1])
    parts = (plane[first : first + rows] for first in range(0, len(plane), rows))
    return all(bool((part == np.rint(part)).all()) for part in parts)


def _is_in_safe_range(size: float, norm: float, points: int, dtype: np.dtype[Any]) -> bool:
    """Return whether intermediate results, such as spectra of so many points, neither overflow nor underflow."""
    least = MIN_FULL_PRECISION[dtype]
    has_digits = size > least and norm > least * points and size * norm > least * points
    return size * norm * points < MAX_FINITE[dtype] and (size == 0 or norm == 0 or has_digits)


def _is_within_bound(
    plane: Plane, kernel: Plane, output: Plane, error: float, bound: np.dtype[Any], *, integers: bool
) -> bool:
    """Return whether the bound, estimated from samples of output and input, allows that error."""
    if integers and error > MAX_ERROR_TO_ROUND:
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
    """Compute sums of |x| |k| in a few windows, the last of which is that in which the largest pixel and tap meet."""
    (h, w), taps = kernel.shape, np.abs(kernel).astype(np.float64)
    last_corner = plane.shape[0] - h, plane.shape[1] - w

    def of_window(row: int, column: int) -> float:
        return float((np.abs(plane[row : row + h, column : column + w]) * taps).sum())

    yield from itertools.starmap(of_window, sample_corners(last_corner))
    pixel, tap = (np.unravel_index(int(sizes.argmax()), sizes.shape) for sizes in (np.abs(plane), taps))
    yield of_window(*align_corner(pixel, tap, last_corner))


def sample_corners(last_corner: Pair) -> list[Pair]:
    """Return the first row and column of nine windows, the middle one first; `most`: those of the last window."""
    parts = (1 / 2, 0, 1)
    return [(int(last_corner[0] * down), int(last_corner[1] * across)) for down in parts for across in parts]


def align_corner(pixel: Sequence[Any], tap: Sequence[Any], last_corner: Pair) -> Pair:
    """Return the first row and column of the window in which that tap reads that pixel, or of the nearest window."""
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
    """Fill some rows of the output after the other, to bound the memory that it takes."""
    h, rows = len(kernel), len(output)
    # Slabs are several times as tall as the kernel, or most rows would be read twice.
    slabs = max(1, rows // max(SLAB_VALUES // plane.shape[1], 4 * h, MIN_RECOMPUTED_SIDE))
    for slab in range(slabs):
        first, last = slab * rows // slabs, (slab + 1) * rows // slabs
        fill(plane[first : last + h - 1], kernel, output[first:last], transform)


def _fill_with_nonfinite(plane: Plane, kernel: Plane, output: Plane, transform: TransformFn) -> None:
    """Fill the output from the finite values, then add the products that are not."""
    seen = slice(0, output.shape[0]), slice(0, output.shape[1])
    if not np.isfinite(kernel).all():
        # Every output reads every tap, and is not finite.
        output[...] = 0
    elif (finite := np.isfinite(plane)).all():
        correlate_within_bound(plane, kernel, output, transform)
        return
    else:
        # No output that reads such a pixel will be finite: any of the other values will do there.
        other = plane.flat[int(finite.argmax())] if finite.any() else plane.dtype.type(0)
        correlate_within_bound(np.where(finite, plane, other), kernel, output, transform)
        rows, columns = (np.flatnonzero(~finite.all(axis=axis)) for axis in (1, 0))
        seen = (
            _outputs_reading(rows, kernel.shape[0], output.shape[0]),
            _outputs_reading(columns, kernel.shape[1], output.shape[1]),
        )
    read = tuple(slice(side.start, side.stop + taps - 1) for side, taps in zip(seen, kernel.shape, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        nonfinite.add_nonfinite_products(
            output[seen], plane[read], kernel, functools.partial(_correlate_integers, transform), np
        )


def _outputs_reading(positions: NDArray[np.intp], taps: int, outputs: int) -> slice:
    """The outputs that read any of the pixels from the first to the last position."""
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
    """Fill the output in float64, in which products of float32 have all their digits, or scaled by powers of two."""
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
    """The correlation (oh, ow) by numpy's Fourier transforms in that type."""
    size = pixels.shape
    spectrum = np.fft.rfft2(pixels.astype(dtype), s=size)
    spectrum *= np.conj(np.fft.rfft2(kernel.astype(dtype), s=size))
    sums: NDArray[Any] = np.fft.irfft2(spectrum, s=size)
    return sums[: size[0] - kernel.shape[0] + 1, : size[1] - kernel.shape[1] + 1]


def dtype_name(array: Plane) -> Dtype:
    """The array's dtype, as problems name it."""
    return "float32" if array.dtype == np.float32 else "float64"
