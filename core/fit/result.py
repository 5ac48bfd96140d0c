"""Events and result of a fit: Readings of the examples, a Forecast, a Step for each update, and the FitResult."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from torch import Tensor

CONFIDENCE_LEVEL = 0.95
"""Probability that a confidence interval contains the true value."""

RIDGE_PATH_FIELDS = (
    "ridge_path",
    "ridge_path_gcv",
    "ridge_path_degrees_of_freedom",
    "ridge_path_losses",
    "ridge_path_kernels",
    "ridge_path_biases",
)
"""Fields of a FitResult that hold a path of ridges."""

Prediction = Literal["converges", "diverges"]


class Status(StrEnum):
    """Status of a finished fit."""

    CONVERGED = "converged"
    """The kernel is the best one, or within the tolerance of it."""

    COMPLETED = "completed"
    """All steps were taken."""

    STOPPED_EARLY = "stopped_early"
    """The validation loss did not fall below its least for as many steps as `patience`."""

    DIVERGED = "diverged"
    """The loss is not finite or grew too large; the kernel is the last finite one or, with validation, the best one."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Number of examples read before the first step; within a long step and after the last step, all of them."""

    done: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Properties of a fit that are computed before its first step; None if they are unknown or not defined.

    learning_rate: the one in use, with "auto" resolved. The eigenvalues are those of the Hessian of the loss, its
    largest and smallest curvature. rank: number of the `unknowns` that the examples determine.
    """

    learning_rate: float | None = None
    prediction: Prediction | None = None
    largest_stable_learning_rate: float | None = None
    largest_eigenvalue: float | None = None
    smallest_eigenvalue: float | None = None
    condition_number: float | None = None
    rank: int | None = None
    unknowns: int
    best_possible_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast(Diagnostics):
    """Diagnostics and a message that summarises them."""

    message: str


@dataclass(frozen=True, slots=True)
class Step:
    """One update: its number, from 1, the loss before it and, with validation, the validation loss before it."""

    number: int
    loss: float
    validation_loss: float | None = None


Progress: TypeAlias = Reading | Forecast | Step


# Without slots: a class can have only one base with them.
@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """Precision of the best kernel; None if it is not defined.

    For noise that is independent and of equal variance in all of a filter's target values (or of variance 1 / weight):
    standard_errors (like kernel) and bias_standard_errors (like bias) of the best kernel; confidence_intervals (2, *
    like kernel) and bias_confidence_intervals (2, O), which contain the true values with probability CONFIDENCE_LEVEL;
    residual_std (O), the noise's standard deviation; degrees_of_freedom (O), values minus unknowns (with a ridge, minus
    the effective number of unknowns). A ridge biases the kernel: standard errors do not include the bias, and there are
    no intervals. covariance, on request: that of a filter's unknowns (its entries row by row, then its bias), (size,
    size) for a kernel (h, w), (O, size, size) otherwise; its diagonal holds the squares of the standard errors. A ridge
    that was chosen from the examples is treated as a given one.
    """

    standard_errors: Tensor | None = None
    bias_standard_errors: Tensor | None = None
    confidence_intervals: Tensor | None = None
    bias_confidence_intervals: Tensor | None = None
    residual_std: Tensor | None = None
    degrees_of_freedom: Tensor | None = None
    covariance: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult(Diagnostics, Uncertainty):
    """A learned kernel and its properties; None if they are not defined or take too long to compute.

    kernel (h, w) if every input and target was one plane (H, W), (O, C/groups, h, w) otherwise; bias (O) or None;
    both float64, on the fit's device if that supports float64. loss_history[i] is the loss before update i + 1,
    final_loss the loss of the returned kernel; all of them include the ridge penalty. excess_loss is final_loss -
    best_possible_loss. r_squared is the fraction of the target's variance about its mean that the returned kernel
    explains. method: "normal equations" or "convolutions". values: number of target values of weight above 0.
    huber_delta: the delta of loss "huber".

    With validation, validation_history[i] is the validation loss before update i + 1 (None for solver exact),
    validation_loss that of the returned kernel, and best_step the number of updates that led to it (None for exact).

    With kernel_size "auto", kernel_sizes (n, 2) are the sizes compared, kernel_sizes_bic and kernel_sizes_loss (n)
    their Bayesian information criterion and smallest possible loss (without the ridge). kernel_offset: pixels (rows,
    columns) by which the kernel's windows begin after those of the size that the shapes or max_kernel_size give.

    ridge: the number in use; None if "auto" found none because squares overflow. On request, ridge_path (n) holds
    ridges of all sizes, ascending, and for each ridge_path_gcv (n), generalised cross-validation N RSS / (N - df)^2;
    ridge_path_degrees_of_freedom (n), effective unknowns df of all filters; ridge_path_losses (n), the sum or mean of
    squares without the penalty; ridge_path_kernels (n, * like kernel) and ridge_path_biases (n, O).
    """

    kernel: Tensor
    bias: Tensor | None
    loss_history: list[float]
    final_loss: float
    excess_loss: float | None
    steps: int
    status: Status
    message: str
    solver: str
    huber_delta: float | None
    method: str
    values: int
    r_squared: float | None
    device: str
    seed: int | None
    ridge: float | None
    ridge_path: Tensor | None = None
    ridge_path_gcv: Tensor | None = None
    ridge_path_degrees_of_freedom: Tensor | None = None
    ridge_path_losses: Tensor | None = None
    ridge_path_kernels: Tensor | None = None
    ridge_path_biases: Tensor | None = None
    validation_history: list[float] | None = None
    validation_loss: float | None = None
    best_step: int | None = None
    kernel_sizes: Tensor | None = None
    kernel_sizes_bic: Tensor | None = None
    kernel_sizes_loss: Tensor | None = None
    kernel_offset: tuple[int, int] | None = None
