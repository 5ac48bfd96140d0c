"""Cross-correlation, Conv2d and kernel fitting on numpy arrays and torch tensors; usable without the HTTP service.

>>> from core import correlate
>>> correlate([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]).output
tensor([[19., 25.],
        [37., 43.]])
"""

from core.conv2d import conv2d, conv2d_problem, plan_conv2d
from core.convolution import ConvolutionPlan
from core.correlate import correlate, plan_correlate
from core.device import available_devices, describe_devices, resolve_device
from core.engines import CALLING_THREAD_ENGINES, ENGINES
from core.engines.choice import Choice, Method, choose
from core.engines.compilation.pipelines import NotCompiled, compiled_only
from core.engines.run import Result, warm_up
from core.engines.slices import Check
from core.errors import (
    CoreError,
    Cost,
    DeviceUnavailable,
    InvalidArgument,
    InvalidNumbers,
    InvalidOption,
    InvalidShape,
    MethodUnavailable,
    TooLarge,
    UnknownKernel,
)
from core.explain import Candidate, explain
from core.fit.constrained.constraints import Symmetry
from core.fit.fit import FitPlan, fit_kernel, fit_kernel_steps, plan_fit_kernel, run_to_end
from core.fit.gradient_descent.optimizers import Solver
from core.fit.losses import Loss
from core.fit.result import RIDGE_PATH_FIELDS, FitResult, Forecast, Prediction, Progress, Reading, Status, Step
from core.fit.selection.size_range import DEFAULT_MAX_KERNEL_SIZE
from core.kernels import KERNELS, named_kernel
from core.limits import Limits
from core.machine import Machine, measure_machine, use_one_blas_thread
from core.problem import OVERFLOW_THRESHOLDS, Boundary, Dtype, PaddingMode, Problem
from core.resources import usable_cores, usable_memory
from core.shapes import Mode, Operation

__all__ = [
    "CALLING_THREAD_ENGINES",
    "DEFAULT_MAX_KERNEL_SIZE",
    "ENGINES",
    "KERNELS",
    "OVERFLOW_THRESHOLDS",
    "RIDGE_PATH_FIELDS",
    "Boundary",
    "Candidate",
    "Check",
    "Choice",
    "ConvolutionPlan",
    "CoreError",
    "Cost",
    "DeviceUnavailable",
    "Dtype",
    "FitPlan",
    "FitResult",
    "Forecast",
    "InvalidArgument",
    "InvalidNumbers",
    "InvalidOption",
    "InvalidShape",
    "Limits",
    "Loss",
    "Machine",
    "Method",
    "MethodUnavailable",
    "Mode",
    "NotCompiled",
    "Operation",
    "PaddingMode",
    "Prediction",
    "Problem",
    "Progress",
    "Reading",
    "Result",
    "Solver",
    "Status",
    "Step",
    "Symmetry",
    "TooLarge",
    "UnknownKernel",
    "available_devices",
    "choose",
    "compiled_only",
    "conv2d",
    "conv2d_problem",
    "correlate",
    "describe_devices",
    "explain",
    "fit_kernel",
    "fit_kernel_steps",
    "measure_machine",
    "named_kernel",
    "plan_conv2d",
    "plan_correlate",
    "plan_fit_kernel",
    "resolve_device",
    "run_to_end",
    "usable_cores",
    "usable_memory",
    "use_one_blas_thread",
    "warm_up",
]
