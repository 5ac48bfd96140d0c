"""Options of a fit, checked before the examples are read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from core.errors import InvalidOption
from core.fit.constrained.constraints import UNCONSTRAINED, Constraints
from core.fit.gradient_descent.optimizers import Adam, GradientDescent, Momentum, Optimizer, Solver
from core.fit.losses import DEFAULT_HUBER_DELTA, LOSSES, Criterion, Loss, huber
from core.validation import format_value, is_real, require_one_of, require_positive

Auto = Literal["auto"]

MAX_STEPS = 1_000_000
"""Maximum steps of one fit; each adds a number to the loss history."""

DEFAULT_MOMENTUM = 0.9
DEFAULT_BETAS = (0.9, 0.999)

SOLVER_SPECIFIC_OPTIONS = {"momentum": ("momentum", "nesterov"), "betas": ("adam",), "batch_size": ("sgd",)}
"""Options that apply only to these solvers."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a fit: loss, solver, penalties, constraints and outputs."""

    solver: Solver
    loss: Loss
    learning_rate: float | Auto
    steps: int
    tolerance: float | None
    ridge: float | Auto
    momentum: float | None
    betas: Sequence[float] | None
    batch_size: int | None
    refuse_divergence: bool
    huber_delta: float | Auto | None = None
    constraints: Constraints = UNCONSTRAINED
    ridge_path: bool = False
    covariance: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidOption for invalid values and combinations."""
        require_one_of("solver", self.solver, Solver)
        require_one_of("loss", self.loss, Loss)
        require_positive("steps", self.steps, MAX_STEPS)
        for option, solvers in SOLVER_SPECIFIC_OPTIONS.items():
            if getattr(self, option) is not None and self.solver not in solvers:
                named = " or ".join(f'"{solver}"' for solver in solvers)
                raise InvalidOption(
                    f'{option} does not apply to solver "{self.solver}": leave it out, or use solver {named}',
                    field=option,
                    got=format_value(getattr(self, option)),
                    limit=f"solver {named}",
                )
        if self.batch_size is not None and self.tolerance is not None:
            raise InvalidOption(
                "tolerance cannot be combined with batch_size, as the gradient of a batch does not show convergence "
                "on all images: leave one of them out",
                field="tolerance",
                got=format_value(self.tolerance),
                limit="no batch_size",
            )
        self.constraints.require_compatible(self.solver, self.loss, self.ridge, ridge_path=self.ridge_path)
        self._require_rate()
        self._require_numbers()
        self._require_delta()
        if self.solver == "exact" and self.loss == "l1":
            raise InvalidOption(
                'solver "exact" does not minimise loss "l1": use loss "sum", "mean" or "huber" (with a small '
                "huber_delta it is close to l1), "
                f"or solver {', '.join(name for name in get_args(Solver) if name != 'exact')}",
                field="loss",
                got=self.loss,
                limit="sum, mean, huber",
            )

    def _require_numbers(self) -> None:
        if self.tolerance is not None:
            _require_within("tolerance", self.tolerance, above=0, below=1)
        self._require_ridge()
        if self.momentum is not None:
            _require_within("momentum", self.momentum, least=0, below=1)
        if self.betas is not None:
            if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
                raise _invalid_range("betas", self.betas, "each from 0 to below 1", expected="two numbers")
            for beta in self.betas:
                _require_within("betas", beta, least=0, below=1)
        if self.batch_size is not None:
            require_positive("batch_size", self.batch_size)

    def _require_ridge(self) -> None:
        if not (isinstance(self.ridge, str) and self.ridge == "auto"):
            if not is_real(self.ridge) or not 0 <= self.ridge < math.inf:
                raise _invalid_range("ridge", self.ridge, 'from 0 on, or "auto"')
        elif not self.criterion.is_quadratic:
            raise InvalidOption(
                f'ridge "auto" is chosen by cross-validation of least squares, and loss is "{self.loss}": give a '
                'number, or use loss "sum" or "mean"',
                field="ridge",
                got="auto",
                limit="a number from 0 on",
            )
        for field in ("ridge_path", "covariance"):
            if not isinstance(getattr(self, field), bool):
                raise _invalid_range(field, getattr(self, field), "true, false", expected="one of")
        if self.ridge_path and not self.criterion.is_quadratic:
            raise InvalidOption(
                f'ridge_path holds solutions of least squares, and loss is "{self.loss}": leave ridge_path out, or '
                'use loss "sum" or "mean"',
                field="ridge_path",
                got="true",
                limit="false",
            )

    @property
    def given_ridge(self) -> float | None:
        """The ridge as a number; None for "auto"."""
        return None if isinstance(self.ridge, str) else self.ridge

    @property
    def searches_ridges(self) -> bool:
        """True if ridges are compared: such a fit needs normal equations."""
        return self.given_ridge is None or self.ridge_path

    @property
    def criterion(self) -> Criterion:
        """The loss to minimise."""
        return LOSSES[self.loss] if self.loss != "huber" else huber(self.delta)

    @property
    def delta(self) -> float:
        """The delta of the Huber loss; the default while it is "auto"."""
        given = self.huber_delta
        return DEFAULT_HUBER_DELTA if given is None or given == "auto" else float(given)

    @property
    def reweighted(self) -> bool:
        """True if reweighted least squares minimises the Huber loss or chooses its delta."""
        return self.loss == "huber" and (self.solver == "exact" or self.huber_delta == "auto")

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer of the descent; None for solver "exact"."""
        momentum = DEFAULT_MOMENTUM if self.momentum is None else self.momentum
        match self.solver:
            case "sgd":
                return GradientDescent()
            case "momentum":
                return Momentum(momentum)
            case "nesterov":
                return Momentum(momentum, nesterov=True)
            case "adam":
                first, second = self.betas or DEFAULT_BETAS
                return Adam((first, second))
            case "exact":
                return None

    def _require_rate(self) -> None:
        if isinstance(self.learning_rate, str) and self.learning_rate == "auto":
            if self.solver == "adam" or not self.criterion.is_quadratic:
                raise InvalidOption(
                    'learning_rate "auto" needs loss "sum" or "mean" and solver exact, sgd, '
                    f'momentum or nesterov; solver "{self.solver}" with loss "{self.loss}" needs a number',
                    field="learning_rate",
                    got="auto",
                    limit="a number above 0",
                )
        elif not is_real(self.learning_rate) or not 0 < self.learning_rate < math.inf:
            raise _invalid_range("learning_rate", self.learning_rate, 'above 0, or "auto"')

    def _require_delta(self) -> None:
        if self.huber_delta is None:
            return
        if self.loss != "huber":
            raise InvalidOption(
                f'huber_delta does not apply to loss "{self.loss}": leave it out, or use loss "huber"',
                field="huber_delta",
                got=format_value(self.huber_delta),
                limit='loss "huber"',
            )
        if isinstance(self.huber_delta, str) and self.huber_delta == "auto":
            return
        if not is_real(self.huber_delta) or not 0 < self.huber_delta < math.inf:
            raise _invalid_range("huber_delta", self.huber_delta, 'above 0, or "auto"')


def _require_within(field: str, value: float, *, below: float, above: float | None = None, least: float = 0) -> None:
    enough = is_real(value) and (value > above if above is not None else value >= least)
    if not enough or not value < below:
        limit = f"above {above:g}" if above is not None else f"from {least:g}"
        raise _invalid_range(field, value, f"{limit} to below {below:g}")


def _invalid_range(field: str, value: object, limit: str, expected: str = "a number") -> InvalidOption:
    return InvalidOption(
        f"{field} {format_value(value)} is not {expected} {limit}", field=field, got=format_value(value), limit=limit
    )
