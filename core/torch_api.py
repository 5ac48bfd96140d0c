"""The public names of core that need torch; `core` imports this module when one of them is used."""

from core.conv2d_layer import Conv2d, conv2d, conv2d_problem, plan_conv2d
from core.convolution import ConvolutionPlan
from core.correlation import correlate, plan_correlate
from core.device import available_devices, describe_devices, resolve_device
from core.engines import CALLING_THREAD_ENGINES, ENGINES
from core.engines.choice import Choice, Method, choose
from core.engines.compilation.pipelines import NotCompiled, compiled_only
from core.engines.run import Result, warm_up
from core.engines.slices import Check
from core.explanation import Candidate, explain
from core.fit.constrained.constraints import Symmetry
from core.fit.fit import FitPlan, fit_kernel, fit_kernel_steps, plan_fit_kernel, run_to_end
from core.fit.gradient_descent.optimizers import Solver
from core.fit.losses import Loss
from core.fit.result import RIDGE_PATH_FIELDS, FitResult, Forecast, Prediction, Progress, Reading, Status, Step
from core.fit.selection.size_range import DEFAULT_MAX_KERNEL_SIZE
from core.machine import Machine, measure_machine, use_one_blas_thread

__all__ = [
    "CALLING_THREAD_ENGINES",
    "DEFAULT_MAX_KERNEL_SIZE",
    "ENGINES",
    "RIDGE_PATH_FIELDS",
    "Candidate",
    "Check",
    "Choice",
    "Conv2d",
    "ConvolutionPlan",
    "FitPlan",
    "FitResult",
    "Forecast",
    "Loss",
    "Machine",
    "Method",
    "NotCompiled",
    "Prediction",
    "Progress",
    "Reading",
    "Result",
    "Solver",
    "Status",
    "Step",
    "Symmetry",
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
    "plan_conv2d",
    "plan_correlate",
    "plan_fit_kernel",
    "resolve_device",
    "run_to_end",
    "use_one_blas_thread",
    "warm_up",
]
