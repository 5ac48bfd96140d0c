"""Normal equations by autocorrelation, for kernels with stride 1 and dilation 1.

The entry of the normal equations for two taps is the sum, over all windows, of the product of the two pixels under the
taps: an autocorrelation of the image, which depends on few lags. All windows share the core of the image, whose lagged
sums are computed by Fourier cross-correlation of blocks, so that the cost is linear in the number of pixels. The strips
along the borders, as wide as the kernel, that they do not share are multiplied directly and added by running sums down
the diagonals. In exact arithmetic the result is that of multiplying all windows.
"""

import bisect
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, Interruptible
from core.machine import Machine
from core.problem import Problem
from core.shapes import Pair

CorrelateFn = Callable[[Tensor, Tensor, Pair], Interruptible[Tensor]]
"""Function that does what correlate_at_lags does."""

TRANSFORM_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Allowed sides of the transforms of blocks."""

MIN_TRANSFORM_SIDE = 192
"""Minimum side of a block, if the image is large enough: for smaller ones, call overhead exceeds the transform."""

TRANSFORM_OVERHEAD_S = 5e-4
"""Measured seconds of overhead for each group."""

MAX_CHUNK_SPECTRA_BYTES = 32_000_000
"""Maximum memory of the spectra of images that are transformed in one call."""


MAX_CHANNEL_PAIRS = 64
"""Maximum pairs of channels; each pair has a spectrum of about 1 MB."""


def unsupported_reason(problem: Problem) -> str | None:
    """Return the reason why a problem is not supported; None if it is."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "works without stride or dilation"
    rows, columns = problem.output_size
    if rows < 2 * problem.kernel_height or columns < 2 * problem.kernel_width:
        return "works if the output is at least twice as large as the kernel"
    if max(problem.kernel_height, problem.kernel_width) > TRANSFORM_SIDES[-1] // 4:
        return f"works for kernels of at most {TRANSFORM_SIDES[-1] // 4} rows and columns"
    depth, filters = problem.channels // problem.groups, problem.filters // problem.groups
    if depth * max(depth, filters) > MAX_CHANNEL_PAIRS:
        return f"works for at most {MAX_CHANNEL_PAIRS} pairs of channels"
    return None


def predict_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of compute_gram and compute_moments: transforms, products of spectra, strips."""
    strips = _count_strip_operations(problem)
    if problem.device != "cpu":
        return predict_moments_seconds(problem, machine) + 2e-3 * problem.groups + strips / 5e12
    depth = problem.channels // problem.groups
    transforms = _predict_transform_seconds(problem, machine, 2 * depth, depth * depth)
    return predict_moments_seconds(problem, machine) + transforms + strips / (0.25 * machine.flops * machine.threads)


def predict_moments_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds of compute_moments."""
    if problem.device != "cpu":
        return (
            1e-3 * problem.groups
            + _count_transform_points(problem) * problem.batch * (problem.channels + problem.filters) / 1e10
        )
    depth, filters = problem.channels // problem.groups, problem.filters // problem.groups
    return _predict_transform_seconds(problem, machine, depth + filters, depth * filters)


def count_operations(problem: Problem) -> int:
    """Return the multiplications and additions of the transforms and the strips."""
    depth, filters = problem.channels // problem.groups, problem.filters // problem.groups
    points = _count_transform_points(problem)
    transforms = problem.batch * problem.groups * (3 * depth + filters)
    return int(2.5 * transforms * points * math.log2(max(points, 2))) + _count_strip_operations(problem)


def correlate_at_lags(first: Tensor, second: Tensor, lags: Pair) -> Interruptible[Tensor]:
    """Sum first[n, a, i, j] * second[n, b, i + y, j + x] over n, i and j, for all y and x below `lags`.

    first (N, A, m, n), second (N, B, m + lags[0] - 1, n + lags[1] - 1) -> (A, B, *lags).
    """
    height, width = first.shape[2:]
    sides = _choose_transform_side(height, lags[0]), _choose_transform_side(width, lags[1])
    step = sides[0] - lags[0] + 1, sides[1] - lags[1] + 1
    spectrum = first.new_zeros((first.shape[1], second.shape[1], sides[0], sides[1] // 2 + 1), dtype=torch.complex128)
    of_one = 16 * (first.shape[1] + second.shape[1]) * sides[0] * (sides[1] // 2 + 1)
    together = max(1, MAX_CHUNK_SPECTRA_BYTES // of_one)
    for start in range(0, len(first), together):
        one, other = first[start : start + together], second[start : start + together]
        for top in range(0, height, step[0]):
            for left in range(0, width, step[1]):
                if start or top or left:
                    yield
                block = one[:, :, top : top + step[0], left : left + step[1]]
                seen = other[:, :, top : top + sides[0], left : left + sides[1]]
                spectra = torch.fft.rfft2(block, s=sides).conj(), torch.fft.rfft2(seen, s=sides)
                for channel in range(first.shape[1]):
                    spectrum[channel] += (spectra[0][:, channel, None] * spectra[1]).sum(0)
    sums: Tensor = torch.fft.irfft2(spectrum, s=sides)[..., : lags[0], : lags[1]].contiguous()
    return sums


def compute_gram(bordered: Tensor, size: Pair, correlate: CorrelateFn = correlate_at_lags) -> Interruptible[Tensor]:
    """Sum the outer products of all windows of size (h, w) with themselves: images (N, C, H, W) -> (C h w, C h w).

    `correlate` computes the lagged sums of the core.
    """
    h, w = size
    channels = bordered.shape[1]
    rows, columns = bordered.shape[2] - h + 1, bordered.shape[3] - w + 1
    core = bordered[:, :, h - 1 : rows, w - 1 : columns]
    of_core = yield from correlate(core, bordered[:, :, h - 1 :], (h, 2 * w - 1))
    # For each row lag (0 to h - 1) and each pair of kernel columns: the core, and the strips on its left and right.
    side_strips = yield from _sum_side_strips(bordered[:, :, h - 1 :], (h, w), rows - h + 1, columns)
    lag = torch.arange(w, device=bordered.device)
    by_rows = of_core[..., lag - lag[:, None] + w - 1] + side_strips
    upper = yield from _sum_top_and_bottom_strips(bordered, size, rows, columns)
    for row_lag in range(h):
        for row in range(h - row_lag):
            upper[:, row, :, :, row + row_lag] += by_rows[:, :, row_lag].transpose(1, 2)
        yield
    # The matrix is symmetric: if the second tap is above the first, copy the entry across the diagonal.
    for row in range(1, h):
        for other in range(row):
            upper[:, row, :, :, other] = upper[:, other, :, :, row].permute(2, 3, 0, 1)
        yield
    return upper.reshape(channels * h * w, channels * h * w)


def compute_moments(
    bordered: Tensor, planes: Tensor, size: Pair, correlate: CorrelateFn = correlate_at_lags
) -> Interruptible[Tensor]:
    """Sum the windows times the plane values at their positions: images, planes (N, O, oh, ow) -> (C h w, O)."""
    sums = yield from correlate(planes, bordered, size)
    return sums.flatten(2).permute(1, 2, 0).flatten(0, 1)


def sum_windows(bordered: Tensor, size: Pair) -> Tensor:
    """Sum all windows: images (N, C, H, W) -> (C h w)."""
    h, w = size
    rows, columns = bordered.shape[2] - h + 1, bordered.shape[3] - w + 1
    by_row = _sum_sliding_rows(bordered.sum(0), h, rows).transpose(1, 2)
    sums: Tensor = _sum_sliding_rows(by_row, w, columns).transpose(1, 2).flatten()
    return sums


def _sum_side_strips(lower: Tensor, size: Pair, rows: int, columns: int) -> Interruptible[Tensor]:
    """Sum the products of window columns left and right of the core, for the core's rows.

    Images without the rows above the core -> (C, C, row lag, column of one tap, column of the other).
    """
    h, w = size
    left, right = [], []
    for row_lag in range(h):
        one, other = lower[:, :, :rows], lower[:, :, row_lag : row_lag + rows]
        left.append(torch.einsum("ncrp,ndrq->cdpq", one[..., : w - 1], other[..., : 2 * w - 1]))
        right.append(torch.einsum("ncrp,ndrq->cdpq", one[..., columns:], other[..., columns - w + 1 :]))
        yield
    on_the_left = _accumulate_backward(torch.stack(left, 2))
    on_the_right = _accumulate_forward(torch.stack(right, 2))
    sums = lower.new_zeros((lower.shape[1], lower.shape[1], h, w, w))
    sums[..., : w - 1, :] += on_the_left[..., :w]
    sums[..., 1:, :] += on_the_right[..., w - 2 : 2 * w - 2] if w > 1 else 0
    return sums


def _sum_top_and_bottom_strips(bordered: Tensor, size: Pair, rows: int, columns: int) -> Interruptible[Tensor]:
    """Sum the products of window rows above and below the core: (C, h, w, C, h, w), if the second tap is not above."""
    h, w = size
    channels = bordered.shape[1]
    above = bordered.new_zeros((channels, w, channels, w, h - 1, 2 * h - 1))
    below = bordered.new_zeros((channels, w, channels, w, h - 1, h - 1))
    # A few columns at a time: all windows of the strips together may take more memory than the images.
    together = max(1, MAX_CHUNK_SPECTRA_BYTES // (8 * channels * w * (2 * h - 1) * len(bordered)))
    # Their product takes at most the interval between two yields.
    together = min(together, max(1, int(YIELD_INTERVAL_OPERATIONS / (6 * len(bordered) * (channels * w * h) ** 2))))
    for left in range(0, columns, together):
        wide = min(together, columns - left)
        windows = bordered[..., left : left + wide + w - 1].unfold(3, wide, 1)
        top, bottom = windows[:, :, : 2 * h - 1], windows[:, :, rows:]
        above += torch.einsum("ncrbj,ndsej->cbders", top[:, :, : h - 1], top)
        below += torch.einsum("ncrbj,ndsej->cbders", bottom, bottom)
        yield
    total = bordered.new_zeros((channels, w, channels, w, h, h))
    total[..., : h - 1, :] = _accumulate_backward(above)[..., :h]
    yield
    total[..., 1:, 1:] += _accumulate_forward(below)
    return total.permute(0, 4, 1, 2, 5, 3)


def _accumulate_backward(sums: Tensor) -> Tensor:
    """Replace entries by running sums down the diagonals of the last two axes, from the entry to the last row."""
    for row in range(sums.shape[-2] - 2, -1, -1):
        sums[..., row, :-1] += sums[..., row + 1, 1:]
    return sums


def _accumulate_forward(sums: Tensor) -> Tensor:
    """Replace entries by running sums down the diagonals of the last two axes, from the first row to the entry."""
    for row in range(1, sums.shape[-2]):
        sums[..., row, 1:] += sums[..., row - 1, :-1]
    return sums


def _sum_sliding_rows(values: Tensor, taps: int, count: int) -> Tensor:
    """Sum `count` rows (axis 1) from each of the first `taps` rows on, without subtractions."""
    shared = values[:, taps - 1 : count].sum(1, keepdim=True)
    before = values[:, : taps - 1].flip(1).cumsum(1).flip(1)
    after = values[:, count:].cumsum(1)
    none = torch.zeros_like(shared)
    return shared + torch.cat([before, none], 1) + torch.cat([none, after], 1)


@functools.lru_cache(maxsize=1024)
def _choose_transform_side(outputs: int, lags: int) -> int:
    """Return the side of the blocks' transforms with the least cost for this number of outputs."""
    whole = TRANSFORM_SIDES[min(bisect.bisect_left(TRANSFORM_SIDES, outputs + lags - 1), len(TRANSFORM_SIDES) - 1)]
    least = min(whole, max(MIN_TRANSFORM_SIDE, 2 * lags))
    sides = [side for side in TRANSFORM_SIDES if least <= side <= whole]
    return min(sides, key=lambda side: -(-outputs // (side - lags + 1)) * side * math.log2(side))


def _count_strip_operations(problem: Problem) -> int:
    return 6 * problem.batch * problem.groups * problem.taps**2 * sum(problem.output_size)


def _predict_transform_seconds(problem: Problem, machine: Machine, planes: int, pairs: int) -> float:
    """Predict the seconds to transform `planes` planes and multiply `pairs` pairs of spectra in each group."""
    points = problem.batch * problem.groups * _count_transform_points(problem)
    arithmetic = 2.5 * planes * points * 15 / (0.08 * machine.flops)
    moved = 40 * pairs * points / machine.bandwidth
    return TRANSFORM_OVERHEAD_S * problem.groups + (arithmetic + moved) / machine.threads


def _count_transform_points(problem: Problem) -> int:
    """Return the points of all blocks' transforms, for one channel of one image."""
    rows, columns = problem.output_size
    lags = problem.kernel_height, 2 * problem.kernel_width - 1
    sides = _choose_transform_side(rows, lags[0]), _choose_transform_side(columns, lags[1])
    blocks = [-(-outputs // (side - lag + 1)) for outputs, side, lag in zip((rows, columns), sides, lags, strict=True)]
    return blocks[0] * blocks[1] * sides[0] * sides[1]
