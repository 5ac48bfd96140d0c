"""Windows of images as columns of a matrix (im2col), in chunks, for any stride and dilation."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from core.fit.interruption import YIELD_INTERVAL_OPERATIONS
from core.machine import Machine
from core.problem import Problem

MAX_CHUNK_BYTES = 16_000_000
"""Maximum memory of the windows of one chunk; chunks that fit into a large cache are multiplied fastest."""


@dataclass(frozen=True, slots=True)
class WindowChunk:
    """Some windows (taps, positions), and the images, rows and columns of the output that they belong to."""

    windows: Tensor
    images: slice
    rows: slice
    columns: slice

    def select(self, planes: Tensor) -> Tensor:
        """Return the values of planes (N, O, oh, ow) at these positions, (O, positions)."""
        return planes[self.images, :, self.rows, self.columns].transpose(0, 1).flatten(1)


def iterate_chunks(
    bordered: Tensor, problem: Problem, max_bytes: int | None = None, min_windows: int = 1
) -> Iterator[WindowChunk]:
    """Yield all windows of padded images (N, C, H, W); N and C may differ from the problem's.

    A chunk takes at most max_bytes (default: MAX_CHUNK_BYTES), but has at least min_windows windows if there are as
    many.
    """
    count, channels = bordered.shape[:2]
    rows, columns = problem.output_size
    taps = channels * problem.kernel_height * problem.kernel_width
    positions = max(1, (max_bytes or MAX_CHUNK_BYTES) // (bordered.element_size() * taps))
    # Multiplying a chunk takes at most the interval between two yields.
    positions = max(min_windows, min(positions, int(YIELD_INTERVAL_OPERATIONS / taps**2)))
    wide = min(columns, positions)
    high = min(rows, max(1, positions // columns))
    together = max(1, positions // (rows * columns))
    for image in range(0, count, together):
        some = slice(image, min(image + together, count))
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                part = slice(top, min(top + high, rows)), slice(left, min(left + wide, columns))
                yield WindowChunk(_extract_windows(bordered, problem, some, *part), some, *part)


def predict_seconds(problem: Problem, machine: Machine) -> float:
    """Predict the seconds to extract all windows and to multiply their matrix by its transpose."""
    rows, columns = problem.output_size
    positions, taps = problem.batch * rows * columns * problem.groups, problem.taps
    if problem.device != "cpu":
        return 1e-3 + 2 * positions * taps * taps / 5e12
    # A matrix product with few rows is limited by memory bandwidth; float64 takes twice as long as float32.
    speed = 0.5 * machine.flops * machine.threads * min(1.0, taps / 70)
    return 1e-4 + positions * taps * (24 / machine.bandwidth + 2 * taps / speed)


def count_operations(problem: Problem) -> int:
    """Return the multiplications and additions of the product of the windows' matrix with its transpose."""
    rows, columns = problem.output_size
    return 2 * problem.batch * rows * columns * problem.groups * problem.taps**2


def _extract_windows(bordered: Tensor, problem: Problem, images: slice, rows: slice, columns: slice) -> Tensor:
    step, spacing = problem.stride, problem.dilation
    of_image, of_channel, of_row, of_column = bordered.stride()
    first = images.start * of_image + rows.start * step[0] * of_row + columns.start * step[1] * of_column
    counts = (part.stop - part.start for part in (images, rows, columns))
    size = (bordered.shape[1], problem.kernel_height, problem.kernel_width, *counts)
    strides = (of_channel, spacing[0] * of_row, spacing[1] * of_column, of_image, step[0] * of_row, step[1] * of_column)
    windows = bordered.as_strided(size, strides, bordered.storage_offset() + first)
    return windows.reshape(size[0] * size[1] * size[2], -1)
