"""Copies of strips of rows into a thread's cache, with a border of zeros, as Halide expressions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from core.engines import halide_jit


class StripPixels(NamedTuple):
    """The pixels that a strip reads from images (N, C, H, W), as Halide expressions.

    `begin`: the first row, which may be above the image. `lines`: number of rows. `before`: columns of zeros before the
    image. `lanes` pixels, which are `across` columns apart, are copied at once, at most W / across.
    """

    images: Any
    channel: Any
    image: Any
    begin: Any
    lines: Any
    before: Any
    across: int
    lanes: int


def define_copy(
    copy: Any, pixels: StripPixels, place: Callable[[Any, Any], tuple[Any, ...]], outer: tuple[Any, ...] = ()
) -> None:
    """Define and schedule the updates of a Func of zeros that copy the pixels inside of the image.

    `place(column, line)` returns where a pixel is stored; columns include those before the image. `outer` are the loops
    around those over lines.
    """
    hl = halide_jit.import_halide()
    images, across, lanes = pixels.images, pixels.across, pixels.lanes
    width, height = (images.dim(axis).extent() for axis in range(2))
    whole = width // across

    def update(domain: Any, column: Any, line: Any) -> None:
        row = pixels.begin + line
        domain.where((row >= 0) & (row < height))
        inside = hl.unsafe_promise_clamped(row, 0, height - 1)
        copy[place(column + pixels.before, line)] = images[column, inside, pixels.channel, pixels.image]

    # The last pixels that are copied in a row overlap those before.
    sizes = lanes, across, (whole + lanes - 1) // lanes, pixels.lines
    r = hl.RDom([hl.Range(0, size) for size in sizes], "r")
    update(r, (hl.min(r.z * lanes, whole - lanes) + r.x) * across + r.y, r.w)
    copy.update(0).allow_race_conditions().reorder(r.x, r.y, r.z, r.w, *outer).unroll(r.y).vectorize(r.x)
    if across > 1:
        rest = hl.RDom([hl.Range(0, width % across), hl.Range(0, pixels.lines)], "rest")
        update(rest, whole * across + rest.x, rest.y)
        copy.update(1).unscheduled()
