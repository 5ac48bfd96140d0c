"""The problems that benchmarks/engines.py measures, their correct outputs, and the calls of core and its peers.

Peers are called in their most favourable form: inputs in their preferred layout, kernels already flipped or factorized,
and no crop if their output has the size of the input. core is called with numpy arrays, as OpenCV and scipy are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import cv2
import diplib
import numpy as np
import pyvips
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal
from torch import Tensor
from torch.nn import functional

import core

CellKind: TypeAlias = Literal["general", "separable", "conv2d"]
"""A plane and a kernel of random numbers, a plane and the product of a column and a row, or a layer."""

Array: TypeAlias = NDArray[Any]
Output: TypeAlias = Tensor | Array | core.Result
TimedCall: TypeAlias = Callable[[], Output]
"""One timed call, which allocates its output; its inputs are prepared."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The problem of a row: square planes and kernels, mode valid, and the number of threads."""

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
        """The dtype and number of threads, which all rows of a table share."""
        return f"{self.dtype}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def side(self) -> int:
        """Number of rows, and of columns, of an output plane."""
        return (self.plane - self.kernel) // self.stride + 1

    @property
    def problem(self) -> core.Problem:
        """The cell as a Problem of core, with unknown rank of the kernel."""
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
    """A cell with its arrays and the machine as measured by core.

    images (C, P, P); weight (O, C / groups, k, k); factors (2, k), the column and the row whose product is the kernel,
    or (0, k) if the kernel is not separable.
    """

    cell: Cell
    machine: core.Machine
    images: Array
    weight: Array
    factors: Array


def create_task(cell: Cell, machine: core.Machine) -> CellTask:
    """Return the task of a cell; its random numbers are always the same."""
    rng = np.random.default_rng(1)
    dtype = np.dtype(cell.dtype)
    separable = cell.kind == "separable"
    factors = rng.standard_normal((2 if separable else 0, cell.kernel), dtype=dtype)
    shape = cell.filters, cell.channels // cell.groups, cell.kernel, cell.kernel
    weight = np.outer(*factors).reshape(shape) if separable else rng.standard_normal(shape, dtype=dtype)
    return CellTask(cell, machine, _draw_images(cell.channels, cell.plane, cell.dtype), weight, factors)


@lru_cache(maxsize=4)
def _draw_images(channels: int, plane: int, dtype: core.Dtype) -> Array:
    """Return images (C, P, P), cached for the next kernel."""
    return np.random.default_rng(0).standard_normal((channels, plane, plane), dtype=np.dtype(dtype))


# The correct outputs.


def compute_reference(task: CellTask) -> Array:
    """Compute the output (O, oh, ow) by the correlation theorem in float64, with numpy.fft, rounded to the dtype."""
    cell = task.cell
    group_filters = cell.filters // cell.groups
    valid = cell.plane - cell.kernel + 1  # beyond, the circular correlation wraps around
    spectra = _compute_spectra(cell.channels, cell.plane, cell.dtype).reshape(
        cell.groups, -1, cell.plane, cell.plane // 2 + 1
    )
    expected = np.empty((cell.filters, cell.side, cell.side), cell.dtype)
    for number, filter in enumerate(task.weight):
        kernels = np.fft.rfft2(filter.astype(np.float64), (cell.plane, cell.plane))
        total = (spectra[number // group_filters] * kernels.conj()).sum(0)
        plane = np.fft.irfft2(total, (cell.plane, cell.plane))
        expected[number] = plane[: valid : cell.stride, : valid : cell.stride]
    return expected


@lru_cache(maxsize=1)
def _compute_spectra(channels: int, plane: int, dtype: core.Dtype) -> Array:
    """Return spectra (C, P, P // 2 + 1), cached because they can take longer than all contenders together."""
    return np.fft.rfft2(_draw_images(channels, plane, dtype).astype(np.float64))


def compute_relative_error(output: Output, expected: Array, cell: Cell) -> float:
    """Return the largest error divided by the largest expected value; NaN if the output contains NaN."""
    difference = crop_valid(output, cell) - expected
    return float(max(difference.max(), -difference.min()) / max(expected.max(), -expected.min()))


def crop_valid(output: Output, cell: Cell) -> Array:
    """Return the valid part (O, oh, ow) of an output, which may have the size of the input."""
    array = np.asarray(output.output if isinstance(output, core.Result) else output)
    array = array.reshape(cell.filters, *array.shape[-2:])
    first = cell.kernel // 2 if array.shape[-1] == cell.plane else 0
    return array[:, first : first + cell.side, first : first + cell.side]


# The contenders. Each function prepares the arrays of a task and returns the call to be timed.


def prepare_core_auto(task: CellTask) -> TimedCall:
    """Return a call of core with the engine that it chooses."""
    return _prepare_core(task)


def prepare_core_forced(engine: str, task: CellTask) -> TimedCall:
    """Return a call of core with one engine, which raises MethodUnavailable if the engine cannot compute the task."""
    return _prepare_core(task, engines=(engine,))


def _prepare_core(task: CellTask, **options: Any) -> TimedCall:
    cell = task.cell
    options |= {"device": "cpu", "dtype": cell.dtype, "machine": task.machine}
    if cell.kind == "conv2d":
        return partial(core.conv2d, task.images[None], task.weight, stride=cell.stride, groups=cell.groups, **options)
    return partial(core.correlate, task.images[0], task.weight[0, 0], **options)


def prepare_torch_conv2d(task: CellTask) -> TimedCall:
    """Return a call of torch with contiguous tensors."""
    cell = task.cell
    batch, filters = torch.from_numpy(task.images[None]), torch.from_numpy(task.weight)
    return lambda: functional.conv2d(batch, filters, stride=cell.stride, groups=cell.groups)


def prepare_torch_channels_last(task: CellTask) -> TimedCall:
    """Return a call of torch with channels_last tensors; the conversion is not timed."""
    # .contiguous() would not change the strides of a single channel, by which torch chooses its algorithm.
    cell = task.cell
    batch = torch.from_numpy(task.images[None]).to(memory_format=torch.channels_last)
    filters = torch.from_numpy(task.weight).to(memory_format=torch.channels_last)
    return lambda: functional.conv2d(batch, filters, stride=cell.stride, groups=cell.groups)


def prepare_scipy_correlate2d(task: CellTask) -> TimedCall:
    """Return a call of scipy's plain loops, which use one thread."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: signal.correlate2d(image, kernel, mode="valid")


def prepare_scipy_fftconvolve(task: CellTask) -> TimedCall:
    """Return a call of scipy's FFT of the whole plane; the kernel is flipped, because it convolves."""
    image, flipped = task.images[0], task.weight[0, 0, ::-1, ::-1].copy()
    return lambda: signal.fftconvolve(image, flipped, mode="valid")


def prepare_scipy_oaconvolve(task: CellTask) -> TimedCall:
    """Return a call of scipy's overlap-add FFT; the kernel is flipped, because it convolves."""
    image, flipped = task.images[0], task.weight[0, 0, ::-1, ::-1].copy()
    return lambda: signal.oaconvolve(image, flipped, mode="valid")


def prepare_scipy_ndimage(task: CellTask) -> TimedCall:
    """Return a call of scipy.ndimage, which uses one thread; the output has the size of the input."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: ndimage.correlate(image, kernel, mode="constant")


def prepare_opencv_filter2d(task: CellTask) -> TimedCall:
    """Return a call of filter2D: direct sums, or FFT tiles for large kernels; the output has the size of the input."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_CONSTANT)


def prepare_opencv_sep_filter2d(task: CellTask) -> TimedCall:
    """Return a call of sepFilter2D with the known factors; the output has the size of the input."""
    image, (column, row) = task.images[0], task.factors
    return lambda: cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_CONSTANT)


def prepare_opencv_match_template(task: CellTask) -> TimedCall:
    """Return a call of matchTemplate with plain correlation, which uses FFT tiles."""
    image, kernel = task.images[0], task.weight[0, 0]
    return lambda: cv2.matchTemplate(image, kernel, cv2.TM_CCORR)


def prepare_libvips_convf(task: CellTask) -> TimedCall:
    """Return a call that computes a prepared pipeline of libvips: the valid part of one pass, or of one per factor."""
    # Not convsep, which uses the same factor for columns and rows.
    masks = [task.factors[1:], task.factors[:1].T] if task.factors.size else [task.weight[0, 0]]
    image = pyvips.Image.new_from_array(task.images[0])
    for mask in masks:
        image = image.convf(pyvips.Image.new_from_array(mask.tolist()))
    first, side = task.cell.kernel // 2, task.cell.side
    compute: TimedCall = image.crop(first, first, side, side).numpy
    return compute


def prepare_diplib(convolve: Callable[[diplib.Image, diplib.Image], diplib.Image], task: CellTask) -> TimedCall:
    """Return a call of DIPlib; the kernel is flipped, because it convolves; the output has the size of the input."""
    image, flipped = diplib.Image(task.images[0]), diplib.Image(task.weight[0, 0, ::-1, ::-1].copy())
    return lambda: np.asarray(convolve(image, flipped))


def prepare_diplib_separable(task: CellTask) -> TimedCall:
    """Return a call of SeparableConvolution with the known factors; the output has the size of the input."""
    image = diplib.Image(task.images[0])
    row, column = (diplib.OneDimensionalFilter(factor[::-1].tolist()) for factor in task.factors[::-1])
    return lambda: np.asarray(diplib.SeparableConvolution(image, [row, column]))


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender other than core, with the kinds and dtypes that it supports."""

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

IMAGE_LIBRARIES: Mapping[str, Peer] = {
    "libvips convf": Peer(prepare_libvips_convf),
    "DIPlib GeneralConvolution": Peer(partial(prepare_diplib, diplib.GeneralConvolution), ("general",)),
    "DIPlib ConvolveFT": Peer(partial(prepare_diplib, diplib.ConvolveFT)),
    "DIPlib SeparableConvolution": Peer(prepare_diplib_separable, ("separable",)),
}
"""Peers that are slower than the fastest of PEERS, measured on few cells, which have kernels with odd sides."""

SUBJECT_NAME = "core"

CONTENDERS: Mapping[str, Callable[[CellTask], TimedCall]] = {
    SUBJECT_NAME: prepare_core_auto,
    **{name: peer.prepare for name, peer in {**PEERS, **IMAGE_LIBRARIES}.items()},
    **{engine: partial(prepare_core_forced, engine) for engine in core.ENGINES},
}
"""core, its peers, and each of its engines."""


def list_peers(cell: Cell, peers: Mapping[str, Peer] = PEERS) -> list[str]:
    """Return the names of the peers that can compute the cell."""
    return [name for name, peer in peers.items() if cell.kind in peer.kinds and cell.dtype in peer.dtypes]
