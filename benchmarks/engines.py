"""How long core.correlate and core.conv2d take beside torch, scipy and OpenCV: on the CPU, in float32.

    make bench                                       everything, in about two minutes
    .venv/bin/python benchmarks/engines.py --help    other threads, more time, a Markdown file

How to read the table. A row is a problem: "correlate 256, 7 x 7" is one plane of 256 x 256 under one kernel of 7 x 7,
"conv2d 3 -> 8, 256, 5 x 5" makes 8 channels out of 3. A number is the shortest time in milliseconds that the column's
function ever took; "-" stands where it does not solve the problem or should need more than a second. "core / best" is
core's time by that of the fastest peer in the row: 1 is a draw, 0.5 twice as fast, 10 a defeat. The lines below the
table sum that column up.

How it is measured. All run in this process, with the same number of threads, and take turns of a few milliseconds until
each has had its share of the row's time. Before that, every one of them must give the right numbers. Peers find what
they like best: inputs in their layout, kernels already flipped, and no cut where their output has the input's size.
Every call allocates its output. Keep the machine idle meanwhile: other work hurts torch, and core on it, most, because
their threads wait for one another.
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeAlias

import cv2
import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal
from torch import Tensor
from torch.nn import functional

import core

Array: TypeAlias = NDArray[np.float32]
Call: TypeAlias = Callable[[], Tensor | Array]
"""One timed call; what it needs is prepared."""

PLANES = (64, 128, 256, 512, 1024)
KERNELS = (3, 7, 15, 31)
SECONDS_PER_ROW = 4.0

SLOWEST_CALL = 1.0
"""Seconds: a peer that should need more for one call is left out of the row."""

TURN = 0.005
"""Seconds of one turn. A single call would find caches and cores as the threads of whoever came before left them: with
such turns, core and torch came out up to four times slower on two cores."""

TOLERANCE = 1e-5
"""The largest error allowed, relative to the largest output: right answers in float32 stay about ten times below it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A row's problem: square planes and kernels, mode valid, stride 1."""

    verb: Literal["correlate", "conv2d"]
    plane: int
    kernel: int
    channels: int = 1
    filters: int = 1

    def __str__(self) -> str:
        channels = f" {self.channels} -> {self.filters}," if self.verb == "conv2d" else ""
        return f"{self.verb}{channels} {self.plane}, {self.kernel} x {self.kernel}"


CELLS = (
    *(Cell("correlate", plane, kernel) for plane in PLANES for kernel in KERNELS),
    *(Cell("conv2d", plane, 5, 1, 1) for plane in (128, 512)),
    *(Cell("conv2d", plane, 5, 3, 8) for plane in (128, 512)),
    *(Cell("conv2d", plane, 3, 16, 32) for plane in (64, 256)),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A cell and the best time of each contender that took part, in seconds."""

    cell: Cell
    seconds: Mapping[str, float]

    @property
    def best_peer(self) -> str:
        """The fastest contender that is not core."""
        return min(self.seconds.keys() - {"core"}, key=self.seconds.__getitem__)

    @property
    def ratio(self) -> float:
        """Core's time by the best peer's."""
        return self.seconds["core"] / self.seconds[self.best_peer]


# The contenders. Each takes images (C, H, W) and weight (O, C, h, w), prepares them and returns the call to be timed.


def core_correlate(images: Array, weight: Array) -> Call:
    """The subject."""
    plane, kernel = torch.from_numpy(images[0]), torch.from_numpy(weight[0, 0])
    return lambda: core.correlate(plane, kernel, device="cpu").output


def core_conv2d(images: Array, weight: Array) -> Call:
    """The subject's other verb."""
    batch, filters = torch.from_numpy(images[None]), torch.from_numpy(weight)
    return lambda: core.conv2d(batch, filters, device="cpu").output


def torch_conv2d(images: Array, weight: Array) -> Call:
    """torch, in the layout that everybody has."""
    batch, filters = torch.from_numpy(images[None]), torch.from_numpy(weight)
    return lambda: functional.conv2d(batch, filters)


def torch_channels_last(images: Array, weight: Array) -> Call:
    """torch, in the layout that it likes best; nobody pays for the way there or back."""
    # .contiguous() would leave one channel as it is: its strides mean nothing, and yet torch chooses by them.
    batch = torch.from_numpy(images[None]).to(memory_format=torch.channels_last)
    filters = torch.from_numpy(weight).to(memory_format=torch.channels_last)
    return lambda: functional.conv2d(batch, filters)


def scipy_correlate2d(images: Array, weight: Array) -> Call:
    """The plain loops, one thread."""
    return lambda: signal.correlate2d(images[0], weight[0, 0], mode="valid")


def scipy_fftconvolve(images: Array, weight: Array) -> Call:
    """One FFT over the whole plane; it convolves, so the kernel is flipped."""
    flipped = weight[0, 0, ::-1, ::-1].copy()
    return lambda: signal.fftconvolve(images[0], flipped, mode="valid")


def scipy_ndimage(images: Array, weight: Array) -> Call:
    """Loops for any number of dimensions, one thread; the output has the input's size."""
    return lambda: ndimage.correlate(images[0], weight[0, 0], mode="constant")


def opencv_filter2d(images: Array, weight: Array) -> Call:
    """Direct sums, from about 11 x 11 up an FFT by tiles; the output has the input's size."""
    return lambda: cv2.filter2D(images[0], -1, weight[0, 0], borderType=cv2.BORDER_CONSTANT)


def opencv_match_template(images: Array, weight: Array) -> Call:
    """An FFT by tiles: template matching by plain correlation."""
    return lambda: cv2.matchTemplate(images[0], weight[0, 0], cv2.TM_CCORR)


CONTENDERS: Mapping[str, Mapping[str, Callable[[Array, Array], Call]]] = {
    "correlate": {
        "core": core_correlate,
        "torch conv2d": torch_conv2d,
        "torch channels_last": torch_channels_last,
        "scipy correlate2d": scipy_correlate2d,
        "scipy fftconvolve": scipy_fftconvolve,
        "scipy ndimage": scipy_ndimage,
        "OpenCV filter2D": opencv_filter2d,
        "OpenCV matchTemplate": opencv_match_template,
    },
    "conv2d": {
        "core": core_conv2d,
        "torch conv2d": torch_conv2d,
        "torch channels_last": torch_channels_last,
    },
}
COLUMNS = tuple(CONTENDERS["correlate"])


# Measuring.


def measure(cell: Cell, earlier: Sequence[Row], seconds: float) -> Row:
    """Check and time everybody who can solve the cell in acceptable time."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((cell.channels, cell.plane, cell.plane), dtype=np.float32)
    weight = rng.standard_normal((cell.filters, cell.channels, cell.kernel, cell.kernel), dtype=np.float32)
    calls = {
        name: prepare(images, weight)
        for name, prepare in CONTENDERS[cell.verb].items()
        if name == "core" or predicted_seconds(name, cell, earlier) <= SLOWEST_CALL
    }
    expected = reference(images, weight)
    for name, call in calls.items():
        error = np.abs(valid_part(call(), cell) - expected).max() / np.abs(expected).max()
        if not error <= TOLERANCE:  # so written, NaN is an error too
            sys.exit(f"{name} is wrong on {cell}: off by {error:.1g} of the largest output, allowed is {TOLERANCE:g}")
    return Row(cell, best_times(calls, seconds))


def predicted_seconds(name: str, cell: Cell, earlier: Sequence[Row]) -> float:
    """What a call should take, by its time for the same kernel on the last smaller plane: work grows with the area."""
    for row in reversed(earlier):
        if replace(row.cell, plane=cell.plane) == cell:
            return row.seconds.get(name, math.inf) * (cell.plane / row.cell.plane) ** 2
    return 0.0


def reference(images: Array, weight: Array) -> NDArray[np.float64]:
    """The right numbers: in float64, by the correlation theorem, with code that no contender uses."""
    plane, kernel = images.shape[-1], weight.shape[-1]
    spectra = np.fft.rfft2(images.astype(np.float64))
    outputs = [
        np.fft.irfft2((spectra * np.fft.rfft2(filter.astype(np.float64), (plane, plane)).conj()).sum(0), (plane, plane))
        for filter in weight
    ]
    valid = plane - kernel + 1  # beyond, the kernel reads round the edge
    return np.stack(outputs)[:, :valid, :valid]


def valid_part(output: Tensor | Array, cell: Cell) -> Array:
    """(O, oh, ow), cut out of the output where that has the input's size."""
    array = np.asarray(output).reshape(cell.filters, *output.shape[-2:])
    valid = cell.plane - cell.kernel + 1
    first = cell.kernel // 2 if array.shape[-1] == cell.plane else 0
    return array[:, first : first + valid, first : first + valid]


def best_times(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """The shortest time of each call. The turn is always with whoever has had least time: A B C A B C ..."""
    best = dict.fromkeys(calls, math.inf)
    spent = dict.fromkeys(calls, 0.0)
    while min(spent.values()) < seconds / len(calls):
        name = min(spent, key=spent.__getitem__)
        end_of_turn = spent[name] + TURN
        while spent[name] < end_of_turn:
            start = perf_counter()
            calls[name]()
            elapsed = perf_counter() - start
            best[name] = min(best[name], elapsed)
            spent[name] += elapsed
    return best


# Reporting: the same Markdown on the screen and in the file.


def heading() -> str:
    """The table's first two lines."""
    return f"{table_line('milliseconds', [*COLUMNS, 'best peer', 'core / best'])}\n{'| --- ' * (len(COLUMNS) + 3)}|"


def table_row(row: Row) -> str:
    """One line of the table."""
    milliseconds = [digits(row.seconds[name] * 1e3) if name in row.seconds else "-" for name in COLUMNS]
    return table_line(str(row.cell), [*milliseconds, row.best_peer, digits(row.ratio)])


def table_line(label: str, entries: Sequence[str]) -> str:
    """One line, its columns as wide as their names so that a terminal shows a table too."""
    widths = [*(max(6, len(name)) for name in COLUMNS), max(map(len, COLUMNS)), len("core / best")]
    padded = [entry.rjust(width) for entry, width in zip(entries, widths, strict=True)]
    return f"| {' | '.join([label.ljust(max(len(str(cell)) for cell in CELLS)), *padded])} |"


def digits(number: float) -> str:
    """Three digits at most, and never an exponent."""
    return f"{number:.3g}" if 1e-3 <= number < 999.5 else f"{number:.3f}" if number < 1 else f"{number:.0f}"


def summary(rows: Sequence[Row]) -> str:
    """How often core is slower, how much at worst, and on average."""
    slower = sum(row.ratio > 1 for row in rows)
    worst = max(rows, key=lambda row: row.ratio)
    mean = math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))
    return (
        f"core is slower than its best peer in {slower} of {len(rows)} rows.\n"
        f"Worst core / best: {digits(worst.ratio)} ({worst.cell}, against {worst.best_peer}).\n"
        f"Geometric mean of core / best: {digits(mean)}."
    )


def circumstances(threads: int) -> str:
    """When, on what and with what this was measured."""
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "OpenCV": cv2.__version__,
    }
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{datetime.now(UTC):%Y-%m-%d}, {cpu_model()}, {threads} thread{'' if threads == 1 else 's'}; {listed}"


def cpu_model() -> str:
    """The processor's name: Linux keeps it in a file, elsewhere Python knows something."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    """Measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=core.usable_cores(), help="default: all usable, %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS_PER_ROW, help="time per row (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    arguments = parser.parse_args()
    output: Path | None = arguments.output
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: at least 1")
    if output is not None and not output.parent.is_dir():  # better now than after two minutes
        parser.error(f"--output {output}: there is no folder {output.parent}")

    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    print(circumstances(arguments.threads), heading(), sep="\n\n", flush=True)
    rows: list[Row] = []
    with scipy.fft.set_workers(arguments.threads):
        for cell in CELLS:
            rows.append(measure(cell, rows, arguments.seconds))
            print(table_row(rows[-1]), flush=True)
    print("", summary(rows), sep="\n")
    if output is not None:
        table = "\n".join([heading(), *map(table_row, rows)])
        output.write_text(f"{circumstances(arguments.threads)}\n\n{table}\n\n{summary(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
