"""Shared code of the engines compiled by Halide: the compiler, unsupported reasons and vector sizes.

Halide (https://halide-lang.org) compiles a formula and a schedule for the current processor. It does not have wheels
for every platform; if it is not installed, these engines report that as their unsupported reason.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.arrays import Array, ConvolveFn, as_numpy
from core.engines.compilation import pipelines
from core.problem import Dtype, Problem, SliceUnits

Plane: TypeAlias = NDArray[Any]
PipelineSpec: TypeAlias = tuple[Any, list[Any]]
"""A scheduled Func or Pipeline, and the inputs of the compiled function in their order."""

FillFn: TypeAlias = Callable[..., object]
"""A function that fills an output: (pixels to read, output to fill, *arrays of the kernel)."""

MAX_ARRAY_VALUES = 2**31 - 1

DIRECT_SLICE_UNITS: SliceUnits = {"batch": 1, "groups": 1, "rows": 16, "filters": 16, "columns": 1024}
"""Slice units of direct sums: nothing is computed twice, and tiles are not split."""


@functools.cache
def import_halide() -> Any:
    """Return the halide module. Only the process that compiles loads it: see core/engines/compilation."""
    return importlib.import_module("halide")


@functools.cache
def platform_unsupported_reason() -> str | None:
    """Return why Halide is not available on this machine, or None."""
    return None if importlib.util.find_spec("halide") else "needs Halide, which is not installed"


def unsupported_reason(problem: Problem) -> str | None:
    """Return why no compiled engine supports the problem, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.max_array_values > MAX_ARRAY_VALUES:
        return f"supports arrays of at most {MAX_ARRAY_VALUES} values, not {problem.max_array_values}"
    return platform_unsupported_reason()


def single_plane_unsupported_reason(problem: Problem) -> str | None:
    """Return why no compiled engine for single planes supports the problem, or None."""
    if not problem.is_single_plane:
        return "supports only single planes with one kernel, without stride or dilation"
    return unsupported_reason(problem)


def halide_type(dtype: Dtype) -> Any:
    """Return Halide's type for the dtype."""
    return import_halide().Float(32 if dtype == "float32" else 64)


@functools.cache
def vector_lanes(dtype: Dtype) -> int:
    """Return how many values of the dtype one vector register of this processor holds."""
    return pipelines.vector_bytes() // np.dtype(dtype).itemsize


def choose_lanes(values: int, dtype: Dtype) -> int:
    """Return the largest vector size that does not exceed this number of values, but at least 4."""
    return next((lanes for lanes in (16, 8) if lanes <= min(values, vector_lanes(dtype))), 4)


def magnitude_bits(value: Any, bits: int) -> Any:
    """Return |value| of a Halide expression of a float type with so many bits, as a bit pattern.

    As integers, these patterns compare NaN > Inf > finite values. The sign bit is cleared explicitly: hl.abs may return
    -0.0 for 0.0, whose bit pattern is above all others.
    """
    hl = import_halide()
    pattern = hl.UInt(bits)
    return hl.reinterpret(pattern, value) & hl.cast(pattern, hl.u64((1 << (bits - 1)) - 1))


def allocate_and_fill(problem: Problem, fill: FillFn) -> ConvolveFn:
    """Return a convolution with one filter that fills a new output, or `out`, and adds the bias."""
    shape, dtype = (problem.batch, problem.filters, *problem.output_size), np.dtype(problem.dtype)

    def convolve(images: Array, weight: Any, bias: Array | None, out: Array | None = None) -> Array:
        output = np.empty(shape, dtype) if out is None else out
        fill(images, output, weight)
        if bias is not None:
            output += as_numpy(bias)
        return output

    return convolve
