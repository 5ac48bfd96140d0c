"""Sums of products of shifted images, for kernels that move pixel by pixel.

The entry of the normal equations for two taps is the sum, over all windows, of the product of the two pixels that they
see: of an image and itself, a lag apart. So few lags decide about all pairs of taps. The windows of all taps share the
image's core, whose lagged sums come out of one Fourier cross-correlation, block by block, so that the cost is linear in
the pixels. What they do not share are strips as wide as the kernel along the borders, which are multiplied out and
added in running sums down the diagonals. In exact arithmetic the result is that of multiplying all windows.
"""

import bisect
import math

import torch
from torch import Tensor

from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, Interruptible
from core.machine import Machine
from core.shapes import Pair, Problem

TRANSFORM_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Sides that the blocks' transforms may have."""

MIN_TRANSFORM_SIDE = 192
"""Blocks with a smaller side would take longer to call for than to transform."""

TRANSFORM_OVERHEAD_S = 5e-4
"""Seconds, measured."""

MAX_CHUNK_SPECTRA_BYTES = 32_000_000
"""The most memory for the spectra of images that are transformed together."""


MAX_CHANNEL_PAIRS = 64
"""Pairs of channels whose sums are kept apart: each has a spectrum of about a megabyte."""


def unsupported_reason(problem: Problem) -> str | None:
    """What keeps a problem from being solved by lags, or None."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "works without stride or dilation"
    rows, columns = problem.output_size
    if rows < 2 * problem.kernel_height or columns < 2 * problem.kernel_width:
        return "works where the output is at least twice as large as the kernel"
    if max(problem.kernel_height, problem.kernel_width) > TRANSFORM_SIDES[-1] // 4:
        return f"works for kernels of at most {TRANSFORM_SIDES[-1] // 4} rows and columns"
    depth, filters = problem.channels // problem.groups, problem.filters // problem.groups
    if depth * max(depth, filters) > MAX_CHANNEL_PAIRS:
        return f"works for at most {MAX_CHANNEL_PAIRS} pairs of channels"
    return None


def predict_seconds(problem: Problem, machine: Machine) -> float:
    """Predicted time of `gram` and `moments`: transforms, products of spectra, strips."""
    strips = _count_strip_operations(problem)
    if problem.device != "cpu":
        return predict_moments_seconds(problem, machine) + 2e-3 * problem.groups + strips / 5e12
    depth = problem.channels // problem.groups
    transforms = _predict_transform_seconds(problem, machine, 2 * depth, depth * depth)
    return predict_moments_seconds(problem, machine) + transforms + strips / (0.25 * machine.flops * machine.threads)


def predict_moments_seconds(problem: Problem, machine: Machine) -> float:
    """Predicted time of `moments`."""
    if problem.device != "cpu":
        return (
            1e-3 * problem.groups
            + _count_transform_points(problem) * problem.batch * (problem.channels + problem.filters) / 1e10
        )
    depth, filters = problem.channels // problem.groups, problem.filters // problem.groups
    return _predict_transform_seconds(problem, machine, depth + filters, depth * filters)


def count_operations(problem: Problem) -> int:
    """Multiplications and additions of the transforms and the strips."""
    depth, filters = problem.channels // problem.groups, problem.filters // problem.groups
    points = _count_transform_points(problem)
    transforms = problem.batch * problem.groups * (3 * depth + filters)
    return int(2.5 * transforms * points * math.log2(max(points, 2))) + _count_strip_operations(problem)


def compute_gram(bordered: Tensor, size: Pair) -> Interruptible[Tensor]:
    """Products of all windows of size (h, w) with themselves, summed: images (N, C, H, W) -> (C h w, C h w)."""
    h, w = size
    channels = bordered.shape[1]
    rows, columns = bordered.shape[2] - h + 1, bordered.shape[3] - w + 1
    core = bordered[:, :, h - 1 : rows, w - 1 : columns]
    of_core = yield from correlate_at_lags(core, bordered[:, :, h - 1 :], (h, 2 * w - 1))
    # By rows apart (0 to h - 1), for every two columns of the kernel: the core, and what lies beside it.
    beside = yield from _sum_side_strips(bordered[:, :, h - 1 :], (h, w), rows - h + 1, columns)
    lag = torch.arange(w, device=bordered.device)
    by_rows = of_core[..., lag - lag[:, None] + w - 1] + beside
    upper = yield from _sum_top_and_bottom_strips(bordered, size, rows, columns)
    for apart in range(h):
        for row in range(h - apart):
            upper[:, row, :, :, row + apart] += by_rows[:, :, apart].transpose(1, 2)
        yield
    # Where the second tap stands above the first, the same sum stands on the other side of the diagonal.
    for row in range(1, h):
        for other in range(row):
            upper[:, row, :, :, other] = upper[:, other, :, :, row].permute(2, 3, 0, 1)
        yield
    return upper.reshape(channels * h * w, channels * h * w)


def compute_moments(bordered: Tensor, planes: Tensor, size: Pair) -> Interruptible[Tensor]:
    """Windows times what stands at their positions, summed: images, planes (N, O, oh, ow) -> (C h w, O)."""
    sums = yield from correlate_at_lags(planes, bordered, size)
    return sums.flatten(2).permute(1, 2, 0).flatten(0, 1)


def sum_windows(bordered: Tensor, size: Pair) -> Tensor:
    """The sum of all windows: images (N, C, H, W) -> (C h w)."""
    h, w = size
    rows, columns = bordered.shape[2] - h + 1, bordered.shape[3] - w + 1
    by_row = _sum_sliding_rows(bordered.sum(0), h, rows).transpose(1, 2)
    sums: Tensor = _sum_sliding_rows(by_row, w, columns).transpose(1, 2).flatten()
    return sums


def correlate_at_lags(first: Tensor, second: Tensor, lags: Pair) -> Interruptible[Tensor]:
    """Sum over n, i and j of first[n, a, i, j] * second[n, b, i + y, j + x], for y and x up to `lags`.

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


def _sum_side_strips(lower: Tensor, size: Pair, rows: int, columns: int) -> Interruptible[Tensor]:
    """What the windows' columns left and right of the core add, for the core's rows.

    Images without the rows above the core -> (C, C, rows apart, column of one tap, column of the other).
    """
    h, w = size
    left, right = [], []
    for apart in range(h):
        one, other = lower[:, :, :rows], lower[:, :, apart : apart + rows]
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
    """What the windows' rows above and below the core add: (C, h, w, C, h, w), where the second tap is not above."""
    h, w = size
    channels = bordered.shape[1]
    above = bordered.new_zeros((channels, w, channels, w, h - 1, 2 * h - 1))
    below = bordered.new_zeros((channels, w, channels, w, h - 1, h - 1))
    # A few columns at a time: all the windows of the strips together may take more memory than the images.
    together = max(1, MAX_CHUNK_SPECTRA_BYTES // (8 * channels * w * (2 * h - 1) * len(bordered)))
    # And longer than a step should.
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
    """Running sums down the diagonals of the last two axes, in place, from each entry to where its row is the last."""
    for row in range(sums.shape[-2] - 2, -1, -1):
        sums[..., row, :-1] += sums[..., row + 1, 1:]
    return sums


def _accumulate_forward(sums: Tensor) -> Tensor:
    """Running sums down the diagonals of the last two axes, in place, from where the row is the first to each entry."""
    for row in range(1, sums.shape[-2]):
        sums[..., row, 1:] += sums[..., row - 1, :-1]
    return sums


def _sum_sliding_rows(values: Tensor, taps: int, count: int) -> Tensor:
    """Sums of `count` rows (axis 1) from the first, the second ... of `taps` rows on; no sum is subtracted again."""
    shared = values[:, taps - 1 : count].sum(1, keepdim=True)
    before = values[:, : taps - 1].flip(1).cumsum(1).flip(1)
    after = values[:, count:].cumsum(1)
    none = torch.zeros_like(shared)
    return shared + torch.cat([before, none], 1) + torch.cat([none, after], 1)


def _choose_transform_side(outputs: int, lags: int) -> int:
    """The side of the blocks' transforms that costs least for so many outputs."""
    whole = TRANSFORM_SIDES[min(bisect.bisect_left(TRANSFORM_SIDES, outputs + lags - 1), len(TRANSFORM_SIDES) - 1)]
    least = min(whole, max(MIN_TRANSFORM_SIDE, 2 * lags))
    sides = [side for side in TRANSFORM_SIDES if least <= side <= whole]
    return min(sides, key=lambda side: -(-outputs // (side - lags + 1)) * side * math.log2(side))


def _count_strip_operations(problem: Problem) -> int:
    return 6 * problem.batch * problem.groups * problem.taps**2 * sum(problem.output_size)


def _predict_transform_seconds(problem: Problem, machine: Machine, planes: int, pairs: int) -> float:
    """To transform so many planes of every group, and to multiply so many pairs of spectra."""
    points = problem.batch * problem.groups * _count_transform_points(problem)
    arithmetic = 2.5 * planes * points * 15 / (0.08 * machine.flops)
    moved = 40 * pairs * points / machine.bandwidth
    return TRANSFORM_OVERHEAD_S * problem.groups + (arithmetic + moved) / machine.threads


def _count_transform_points(problem: Problem) -> int:
    """Points of all blocks' transforms, for one image of one channel."""
    rows, columns = problem.output_size
    lags = problem.kernel_height, 2 * problem.kernel_width - 1
    sides = _choose_transform_side(rows, lags[0]), _choose_transform_side(columns, lags[1])
    blocks = [-(-outputs // (side - lag + 1)) for outputs, side, lag in zip((rows, columns), sides, lags, strict=True)]
    return blocks[0] * blocks[1] * sides[0] * sides[1]
