"""Copies of strips of rows into a thread's cache, with a border of zeros, as Halide expressions."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from core.engines import halide_jit


class StripPixels(NamedTuple):
    """The pixels that a strip reads from images (N, C, H, W), as Halide expressions.

    `begin`: the first row, which may be above the image. `lines`: number of rows. `before`: columns of zeros before the
    image. `lanes` pixels, which are `across` columns apart, are copied at once, at most W / across. `columns`: columns
    with the border, at least those of the image; if it is given, the border is set to zero, otherwise it must be zero.
    """

    images: Any
    channel: Any
    image: Any
    begin: Any
    lines: Any
    before: Any
    across: int
    lanes: int
    columns: Any = None


def define_copy(
    copy: Any, pixels: StripPixels, place: Callable[[Any, Any], tuple[Any, ...]], outer: tuple[Any, ...] = ()
) -> None:
    """Define and schedule the updates of a Func that copy the pixels inside of the image, and may clear its border.

    `place(column, line)` returns where a pixel is stored; columns include those before the image. `outer` are the loops
    around those over lines.
    """
    hl = halide_jit.import_halide()
    images, across, lanes = pixels.images, pixels.across, pixels.lanes
    width, height = (images.dim(axis).extent() for axis in range(2))
    stages = itertools.count()

    def copy_columns(domain: Any, column: Any, line: Any) -> Any:
        row = pixels.begin + line
        domain.where((row >= 0) & (row < height))
        inside = hl.unsafe_promise_clamped(row, 0, height - 1)
        copy[place(column + pixels.before, line)] = images[column, inside, pixels.channel, pixels.image]
        return copy.update(next(stages))

    def clear_rows(domain: Any, column: Any, line: Any) -> Any:
        row = pixels.begin + line
        domain.where((row < 0) | (row >= height))
        copy[place(column, line)] = hl.cast(images.type(), 0)
        return copy.update(next(stages))

    def clear_columns(first: Any, count: Any) -> None:
        r = hl.RDom([hl.Range(0, count), hl.Range(0, pixels.lines)], "side")
        copy[place(first + r.x, r.y)] = hl.cast(images.type(), 0)
        copy.update(next(stages)).reorder(r.y, r.x, *outer)

    def define(columns: Any, update: Callable[[Any, Any, Any], Any]) -> None:
        """Define an update for so many columns. The last vector of a row overlaps the one before it."""
        whole = columns // across
        sizes = lanes, across, (whole + lanes - 1) // lanes, pixels.lines
        r = hl.RDom([hl.Range(0, size) for size in sizes], "r")
        vectors = update(r, (hl.min(r.z * lanes, whole - lanes) + r.x) * across + r.y, r.w)
        vectors.allow_race_conditions().reorder(r.x, r.y, r.z, r.w, *outer).unroll(r.y).vectorize(r.x)
        if across > 1:
            rest = hl.RDom([hl.Range(0, columns % across), hl.Range(0, pixels.lines)], "rest")
            update(rest, whole * across + rest.x, rest.y).unscheduled()

    if pixels.columns is not None:
        define(pixels.columns, clear_rows)
        clear_columns(0, pixels.before)
        clear_columns(pixels.before + width, pixels.columns - pixels.before - width)
    define(width, copy_columns)
