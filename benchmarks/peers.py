"""The problems that benchmarks/engines.py measures, the right numbers, and everybody's way to get them.

Peers find what they like best: inputs in their layout, kernels already flipped or taken apart, and no cut where their
output has the input's size. core gets what OpenCV and scipy get, numpy's arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal
from torch import Tensor
from torch.nn import functional

import core

CellKind: TypeAlias = Literal["general", "separable", "conv2d"]
"""A plane under a kernel of random numbers, a plane under a product of a column and a row, or a layer."""

Array: TypeAlias = NDArray[Any]
Output: TypeAlias = Tensor | Array | core.Result
TimedCall: TypeAlias = Callable[[], Output]
"""One timed call; what it needs is prepared, its output it allocates."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A row's problem: square planes and kernels, mode valid, and how many threads may work on it."""

    kind: CellKind
    plane: int
    kernel: int
    dtype: core.Dtype = "float32"
    threads: int = 1
    channels: int = 1
    filters: int = 1
    groups: int = 1
    stride: int = 1

    def __str__(self) -> str:
        size = f"{self.plane}, {self.kernel} x {self.kernel}"
        if self.kind != "conv2d":
            return f"{self.kind} {size}"
        stride = "" if self.stride == 1 else f", stride {self.stride}"
        groups = "" if self.groups == 1 else f", {self.groups} groups"
        return f"conv2d {self.channels} -> {self.filters}, {size}{stride}{groups}"

    @property
    def setting(self) -> str:
        """What the row's table has in common, besides the kind."""
        return f"{self.dtype}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def side(self) -> int:
        """Rows, and columns, of an output plane."""
        return (self.plane - self.kernel) // self.stride + 1

    @property
    def problem(self) -> core.Problem:
        """The cell as core's engines see it, before anybody has looked at the kernel."""
        return core.Problem(
            batch=1,
            channels=self.channels,
            height=self.plane,
            width=self.plane,
            filters=self.filters,
            kernel_height=self.kernel,
            kernel_width=self.kernel,
            groups=self.groups,
            stride=(self.stride, self.stride),
            dtype=self.dtype,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CellTask:
    """A cell with its numbers and the machine as core knows it.

    images (C, P, P); weight (O, C / groups, k, k); factors (2, k), the column and the row whose product the kernel is,
    or (0, k) where it is none.
    """

    cell: Cell
    machine: core.Machine
    images: Array
    weight: Array
    factors: Array


def create_task(cell: Cell, machine: core.Machine) -> CellTask:
    """The same numbers every time."""
    rng = np.random.default_rng(1)
    dtype = np.dtype(cell.dtype)
    separable = cell.kind == "separable"
    factors = rng.standard_normal((2 if separable else 0, cell.kernel), dtype=dtype)
    shape = cell.filters, cell.channels // cell.groups, cell.kernel, cell.kernel
    weight = np.outer(*factors).reshape(shape) if separable else rng.standard_normal(shape, dtype=dtype)
    return CellTask(cell, machine, _draw_images(cell.channels, cell.plane, cell.dtype), weight, factors)


@lru_cache(maxsize=4)
def _draw_images(channels: int, plane: int, dtype: core.Dtype) -> Array:
    """(C, P, P), kept for the next kernel."""
    return np.random.default_rng(0).standard_normal((channels, plane, plane), dtype=np.dtype(dtype))


# The right numbers.


def compute_reference(task: CellTask) -> Array:
    """(O, oh, ow), by the correlation theorem in float64 with code that no contender uses, rounded to the dtype."""
    cell = task.cell
    together = cell.filters // cell.groups
    valid = cell.plane - cell.kernel + 1  # beyond, the kernel reads round the edge
    spectra = _compute_spectra(cell.channels, cell.plane, cell.dtype).reshape(
        cell.groups, -1, cell.plane, cell.plane // 2 + 1
    )
    expected = np.empty((cell.filters, cell.side, cell.side), cell.dtype)
    for number, filter in enumerate(task.weight):
        kernels = np.fft.rfft2(filter.astype(np.float64), (cell.plane, cell.plane))
        total = (spectra[number // together] * kernels.conj()).sum(0)
        plane = np.fft.irfft2(total, (cell.plane, cell.plane))
        expected[number] = plane[: valid : cell.stride, : valid : cell.stride]
    return expected


@lru_cache(maxsize=1)
def _compute_spectra(channels: int, plane: int, dtype: core.Dtype) -> Array:
    """(C, P, P // 2 + 1), kept for the next kernel: on large planes all contenders together take less time."""
    return np.fft.rfft2(_draw_images(channels, plane, dtype).astype(np.float64))


def compute_relative_error(output: Output, expected: Array, cell: Cell) -> float:
    """The largest error by the largest value that is expected; NaN where the output has one."""
    difference = crop_valid(output, cell) - expected
    return float(max(difference.max(), -difference.min()) / max(expected.max(), -expected.min()))


def crop_valid(output: Output, cell: Cell) -> Array:
    """(O, oh, ow), cut out of the output where that has the input's size."""
    array = np.asarray(output.output if isinstance(output, core.Result) else output)
    array = array.reshape(cell.filters, *array.shape[-2:])
    first = cell.kernel // 2 if array.shape[-1] == cell.plane else 0
    return array[:, first : first + cell.side, first : first + cell.side]


# The contenders. Each prepares what a task holds and returns the call to be timed.


def prepare_core_auto(task: CellTask) -> TimedCall:
    """The subject, as everybody calls it."""
    return _prepare_core(task)


def prepare_core_forced(engine: str, task: CellTask) -> TimedCall:
    """The subject with no choice; raises MethodUnavailable, when called, where that engine cannot."""
    return _prepare_core(task, engines=(engine,))


def _prepare_core(task: CellTask, **options: Any) -> TimedCall:
    cell = task.cell
    options |= {"device": "cpu", "dtype": cell.dtype, "machine": task.machine}
    if cell.kind == "conv2d":
        return partial(core.conv2d, task.images[None], task.weight, stride=cell.stride, groups=cell.groups, **options)
    return partial(core.correlate, task.images[0], task.weight[0, 0], **options)


def prepare_torch_conv2d(task: CellTask) -> TimedCall:
    """torch, in the layout that everybody has."""
    cell = task.cell
    batch, filters = torch.from_numpy(task.images[None]), torch.from_numpy(task.weight)
    return lambda: functional.conv2d(batch, filters, stride=cell.stride, groups=cell.groups)


def prepare_torch_channels_last(task: CellTask) -> TimedCall:
    """torch, in the layout that it likes best; nobody pays for the way there or back."""
    # .contiguous() would leave one channel as it is: its strides mean nothing, and yet torch chooses by them.
    cell = task.cell
    batch = torch.from_numpy(task.images[None]).to(memory_format=torch.channels_last)
    filters = torch.from_numpy(task.weight).to(memory_format=torch.channels_last)
    return lambda: functional.conv2d(batch, filters, stride=cell.stride, groups=cell.groups)


def prepare_scipy_correlate2d(task: CellTask) -> TimedCall:
    """The plain loops, one thread."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: signal.correlate2d(image, kernel, mode="valid")


def prepare_scipy_fftconvolve(task: CellTask) -> TimedCall:
    """One FFT over the whole plane; it convolves, so the kernel is flipped."""
    image, flipped = task.images[0], task.weight[0, 0, ::-1, ::-1].copy()
    return lambda: signal.fftconvolve(image, flipped, mode="valid")


def prepare_scipy_oaconvolve(task: CellTask) -> TimedCall:
    """An FFT by tiles, overlapped and added; it convolves, so the kernel is flipped."""
    image, flipped = task.images[0], task.weight[0, 0, ::-1, ::-1].copy()
    return lambda: signal.oaconvolve(image, flipped, mode="valid")


def prepare_scipy_ndimage(task: CellTask) -> TimedCall:
    """Loops for any number of dimensions, one thread; the output has the input's size."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: ndimage.correlate(image, kernel, mode="constant")


def prepare_opencv_filter2d(task: CellTask) -> TimedCall:
    """Direct sums, for large kernels an FFT by tiles; the output has the input's size."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_CONSTANT)


def prepare_opencv_sep_filter2d(task: CellTask) -> TimedCall:
    """Two passes, for the two factors, which it need not find; the output has the input's size."""
    image, (column, row) = task.images[0], task.factors
    return lambda: cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_CONSTANT)


def prepare_opencv_match_template(task: CellTask) -> TimedCall:
    """An FFT by tiles: template matching by plain correlation."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: cv2.matchTemplate(image, kernel, cv2.TM_CCORR)


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender other than core, and what it can solve."""

    prepare: Callable[[CellTask], TimedCall]
    kinds: tuple[CellKind, ...] = ("general", "separable")
    dtypes: tuple[core.Dtype, ...] = ("float32", "float64")


PEERS: Mapping[str, Peer] = {
    "torch conv2d": Peer(prepare_torch_conv2d, ("general", "separable", "conv2d")),
    "torch channels_last": Peer(prepare_torch_channels_last, ("general", "separable", "conv2d")),
    "scipy correlate2d": Peer(prepare_scipy_correlate2d),
    "scipy fftconvolve": Peer(prepare_scipy_fftconvolve),
    "scipy oaconvolve": Peer(prepare_scipy_oaconvolve),
    "scipy ndimage": Peer(prepare_scipy_ndimage),
    "OpenCV filter2D": Peer(prepare_opencv_filter2d),
    "OpenCV sepFilter2D": Peer(prepare_opencv_sep_filter2d, ("separable",)),
    "OpenCV matchTemplate": Peer(prepare_opencv_match_template, dtypes=("float32",)),
}

SUBJECT_NAME = "core"

CONTENDERS: Mapping[str, Callable[[CellTask], TimedCall]] = {
    SUBJECT_NAME: prepare_core_auto,
    **{name: peer.prepare for name, peer in PEERS.items()},
    **{engine: partial(prepare_core_forced, engine) for engine in core.ENGINES},
}
"""The subject, its peers, and its engines one by one."""


def list_peers(cell: Cell) -> list[str]:
    """The names of the peers that can solve the cell."""
    return [name for name, peer in PEERS.items() if cell.kind in peer.kinds and cell.dtype in peer.dtypes]
