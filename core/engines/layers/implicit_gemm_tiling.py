"""Division of implicit_gemm's sums: tiles of filters and pixels, bands of short rows, and strips that are copied."""

import functools
from typing import NamedTuple

from core.engines import halide_costs, halide_jit
from core.machine import Machine
from core.problem import Problem
from core.shapes import Pair, dilated_size

GEMM_TILES: dict[Pair, float] = {(4, 4): 1.0, (8, 2): 0.94}
"""(filters, vectors) of a tile -> relative speed. The second tile wastes less time on short rows or many filters."""

MAX_BAND_POSITIONS = 1024
"""Maximum number of positions of a band, for each filter of a tile; a longer single row is one band."""

STRIP_TILE: Pair = (8, 2)
"""(filters, vectors) of a tile in a padded strip."""

MAX_STRIP_BYTES = 1 << 19
"""Maximum bytes of a strip, half of the second-level cache: every block of filters reads it. Measured."""

MAX_STRIP_STRIDE, MIN_COPIED_LANES, MIN_STRIP_TAPS = 2, 4, 64
"""Largest stride within strips, minimum pixels of a row that are copied at once into a strip, and minimum taps for
which strips are faster than long rows."""

COPIED_VECTOR_TAPS = 3.0
"""Time to copy one vector of pixels into a strip, in units of the time of one tap for one vector."""

ROW_TILE_OVERHEAD_TAPS, BAND_TILE_OVERHEAD_TAPS, BAND_OVERHEAD_TAPS = 2, 12, 20
"""Overhead of a tile in a row, of a tile in a band, and of a band, in units of the time of one tap."""


class SumShape(NamedTuple):
    """Sizes of the sum over one group of one image, by which the tiling is chosen."""

    taps: int
    filters: int
    rows: int
    columns: int
    pitch: int
    lanes: int
    dense: bool = True


class Band(NamedTuple):
    """Rows and columns that are summed into one buffer, the number of such bands, and the cost of all of them."""

    rows: int
    columns: int
    items: int
    cost: float


class Tiling(NamedTuple):
    """A tile, its bands (None if tiles follow rows), and the cost in tiles times taps."""

    cost: float
    tile: Pair
    band: Band | None


@functools.lru_cache(maxsize=256)
def choose_tiling(shape: SumShape) -> Tiling:
    """Return the tile and the bands with the least cost."""
    tilings = []
    for tile, speed in GEMM_TILES.items():
        filters, width = tile[0], tile[1] * shape.lanes
        blocks = -(-shape.filters // filters)
        if shape.columns >= width and shape.filters >= filters:
            tiles = shape.rows * -(-shape.columns // width) * blocks
            tilings.append(Tiling(tiles * (shape.taps + ROW_TILE_OVERHEAD_TAPS) / speed, tile, None))
        band = _choose_band(shape, width)
        tilings.append(Tiling(band.cost * blocks, tile, band))
    return min(tilings, key=lambda tiling: tiling.cost)


def kernel_rows(problem: Problem) -> int:
    """Return the rows of pixels that one output reads, including those between the rows of the kernel."""
    return dilated_size(problem.kernel_height, problem.dilation[0])


class Strips(NamedTuple):
    """Rows of a strip, items of blocks of filters per strip, pitch, and the cost of one thread in tiles times taps."""

    rows: int
    groups: int
    pitch: int
    cost: float


@functools.lru_cache(maxsize=256)
def choose_strips(problem: Problem, machine: Machine) -> Strips | None:
    """Return the division of a layer with a border of zeros or a stride into strips, or None if they do not pay.

    A copy of the whole images would be made by one thread, and its pixels would move from the cache of one core to that
    of another. With one thread and long rows, sums that are stored directly in the output are faster.
    """
    (down, across), (height, columns) = problem.stride, problem.output_size
    is_copied = problem.is_padded or problem.stride != (1, 1)
    if (
        not is_copied
        or problem.boundary != "zeros"
        or max(problem.stride) > MAX_STRIP_STRIDE
        or problem.is_single_plane
    ):
        return None
    if problem.kernel_height < down or problem.kernel_width < across or problem.width // across < MIN_COPIED_LANES:
        return None
    lanes, pitch = halide_jit.vector_lanes(problem.dtype), -(-problem.padded_size[1] // across)
    if across == 1:
        # The zeros after a row are those before the next one.
        pitch = max(columns, problem.width + max(problem.padding[2:]))
    each, channels = problem.filters // problem.groups, problem.channels // problem.groups
    is_short = choose_tiling(SumShape(problem.taps, each, height, columns, pitch, lanes)).band is not None
    is_parallel = machine.threads > 1 and problem.taps >= MIN_STRIP_TAPS
    if problem.stride == (1, 1) and not is_short and not is_parallel:
        return None
    filters, vectors = STRIP_TILE
    blocks, images = -(-each // filters), problem.batch * problem.groups
    most_lines = MAX_STRIP_BYTES // (problem.itemsize * channels * pitch * across)
    largest = max(1, (most_lines - count_lines(problem, 0)) // down)

    def item_cost(rows: int, groups: int) -> float:
        tiles = -(-((rows - 1) * pitch + columns) // (vectors * lanes))
        copied = channels * count_lines(problem, rows) * -(-pitch // lanes) * across
        taps = -(-blocks // groups) * (BAND_OVERHEAD_TAPS + tiles * (problem.taps + BAND_TILE_OVERHEAD_TAPS))
        return COPIED_VECTOR_TAPS * copied / (filters * vectors) + taps

    division = halide_costs.divide(height, largest, min(blocks, machine.threads), images, machine.threads, item_cost)
    return Strips(division.rows, division.groups, pitch, division.cost)


def count_lines(problem: Problem, rows: int) -> int:
    """Return the rows of pixels that so many rows of the output read."""
    return (rows - 1) * problem.stride[0] + kernel_rows(problem)


def component_size(problem: Problem, rows: int, pitch: int) -> int:
    """Return the pixels of a polyphase component of a strip of so many rows of the output."""
    return -(-count_lines(problem, rows) // problem.stride[0]) * pitch


def _choose_band(shape: SumShape, width: int) -> Band:
    rows, columns, pitch = shape.rows, shape.columns, shape.pitch
    if pitch == columns and shape.dense:
        rows, columns, pitch = 1, rows * columns, rows * columns
    positions = (rows - 1) * pitch + columns
    if rows == 1:
        sizes = [(1, min(columns, width * many)) for many in range(1, MAX_BAND_POSITIONS // width + 1)]
    else:
        most = max(1, MAX_BAND_POSITIONS // pitch, -(-width // pitch) + 1)
        sizes = [(some, columns) for some in range(1, min(rows, most) + 1)]
    bands = []
    for some, wide in sizes:
        length = (some - 1) * pitch + wide
        if length >= min(width, positions):
            items = -(-rows // some) * -(-columns // wide)
            cost = items * (BAND_OVERHEAD_TAPS + -(-length // width) * (shape.taps + BAND_TILE_OVERHEAD_TAPS))
            bands.append(Band(some, wide, items, cost))
    return min(bands, key=lambda band: band.cost)
