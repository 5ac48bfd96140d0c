"""A convolution whose arguments have been checked: its cost, its engine, and `run`."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.arrays import NUMPY_DTYPES, Array, as_array
from core.engines import ENGINES
from core.engines.choice import Method, estimate_cost
from core.engines.precision import UNIT_ROUNDOFF, allowed_error, max_magnitude
from core.engines.run import Result, run_engine
from core.engines.slices import Check
from core.errors import Cost
from core.machine import Machine
from core.prepared_weight import PreparedWeight
from core.problem import Problem


class ConvolutionPlan(NamedTuple):
    """A call of `correlate` or `conv2d` whose arguments have been checked.

    input: as received; it is converted by `run`. input_shape: (N, C, H, W). filters (O, C/groups, h, w) and bias (O):
    in the problem's dtype, on the device. output_shape: the shape of the result. prepared: the filters of a layer that
    is called again, otherwise None.
    """

    problem: Problem
    input: Array
    input_shape: tuple[int, ...]
    filters: Array
    bias: Array | None
    output_shape: tuple[int, ...]
    method: Method
    device: torch.device
    machine: Machine
    engines: tuple[str, ...]
    prepared: PreparedWeight | None = None

    @property
    def cost(self) -> Cost:
        """Predicted memory, arithmetic and time. Raises MethodUnavailable if no engine can compute the problem."""
        return estimate_cost(self.problem, self.method, self.machine, self.engines)

    @property
    def engine(self) -> str:
        """The engine that `cost` is for. A kernel that turns out to have a low rank may run on `separable` instead."""
        return self.cost.engine

    def run(self, check: Check | None = None, *, error_bound: bool = False) -> Result:
        """Compute the output, and with `error_bound` the bound of `compute_error_bound`.

        `check` is called between slices of a long computation, of about 0.05 s of predicted time each; an exception
        that it raises ends the computation. Raises InvalidNumbers if the input cannot be converted.
        """
        problem, received, input_shape, filters, bias, output_shape, method, device, machine, engines, prepared = self
        images = as_array("input", received, problem.dtype, device).reshape(input_shape)
        result = run_engine(problem, images, filters, bias, output_shape, method, machine, engines, check, prepared)
        if error_bound:
            bound = compute_error_bound(result, problem, images, filters, bias)
            result = result._replace(error_bound=bound)
        return result


def compute_error_bound(
    result: Result, problem: Problem, images: Array, filters: Array, bias: Array | None
) -> float | None:
    """Return a bound that no error of the output exceeds: the precision contract as one number. None if not finite.

    (m + 1) u S for an engine that sums directly, 1e-6 max|Y| + 4 sqrt(m) u S for others (1e-14 in float64), with m taps
    and S at most the largest |input| times the largest sum of the |taps| of one filter.
    """
    dtype = np.dtype(NUMPY_DTYPES[problem.dtype])
    taps = np.abs(_as_numpy(filters), dtype=np.float64).reshape(len(filters), -1)
    offset = 0.0 if bias is None else max_magnitude(_as_numpy(bias))
    output = max_magnitude(_as_numpy(result.array))
    pixel = max(max_magnitude(_as_numpy(images)), abs(problem.fill_value))
    with np.errstate(over="ignore", invalid="ignore"):
        sums = pixel * float(taps.sum(1).max())
        if ENGINES[result.engine].METHOD == "direct":
            bound = (int(np.count_nonzero(taps, axis=1).max()) + 1) * UNIT_ROUNDOFF[dtype] * (sums + offset)
        else:
            bound = float(allowed_error(dtype, taps.shape[1], output, sums)) + UNIT_ROUNDOFF[dtype] * (offset + output)
    return bound if math.isfinite(bound) else None


def _as_numpy(values: Array) -> NDArray[Any]:
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
