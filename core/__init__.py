"""Cross-correlation, Conv2d and kernel fitting on numpy arrays and torch tensors; usable without the HTTP service.

>>> from core import correlate
>>> correlate([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]).output
tensor([[19., 25.],
        [37., 43.]])

Importing torch takes seconds, so the names that need it are imported when the first of them is used.
"""

from typing import TYPE_CHECKING, Any

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
from core.kernels import KERNELS, named_kernel
from core.limits import Limits
from core.problem import OVERFLOW_THRESHOLDS, Boundary, Dtype, PaddingMode, Problem
from core.resources import usable_cores, usable_memory
from core.shapes import Mode, Operation

if TYPE_CHECKING:
    from core.torch_api import *

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
    "Conv2d",
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

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import the names of `core.torch_api`, and return the one of that name."""
        if name not in __all__:
            raise AttributeError(f"module 'core' has no attribute {name!r}")
        from core import torch_api

        globals().update((public, getattr(torch_api, public)) for public in torch_api.__all__)
        return globals()[name]
