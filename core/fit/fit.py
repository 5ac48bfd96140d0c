"""plan_fit_kernel, fit_kernel and fit_kernel_steps: arguments checked, examples loaded, a strategy chosen."""

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from core.arrays import ArrayLike
from core.device import CPU_DEVICE, resolve_device
from core.errors import Cost, InvalidArgument, InvalidOption
from core.fit.constrained.constraints import Constraints, Symmetry, parse_rank
from core.fit.cost_model import count_result_megabytes
from core.fit.examples import Examples, Layer, RawExample, load_examples
from core.fit.fit_run import FitRun
from core.fit.fit_spec import FitSpec
from core.fit.fit_steps import generate_fit_steps
from core.fit.gradient_descent.initialization import resolve_initialization, resolve_seed
from core.fit.gradient_descent.optimizers import Solver
from core.fit.gradient_descent.validation_set import load_validation, make_validation_problem, require_patience
from core.fit.interruption import ignore_overflow, suppress_overflow_warnings
from core.fit.losses import Loss
from core.fit.options import Auto, Options
from core.fit.result import FitResult, Progress
from core.fit.selection.size_range import SizeRange, find_size_range, require_size_selection
from core.fit.selection.size_selection import SizeSelection
from core.fit.strategy import FitMethod
from core.limits import Limits
from core.machine import Machine, this_machine
from core.problem import PaddingMode, Problem
from core.validation import format_value, require_one_of, require_positive

Arguments = ParamSpec("Arguments")
Function = TypeVar("Function", bound=Callable[..., Any])

ExamplePair = tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike | None]
"""An input, its target and, perhaps, the weights of the target's values."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """Planned fit that the caller runs: checked arguments, loaded examples and a predicted `cost`.

    It holds the FitRun of a kernel of a given size, or the SizeSelection that selects the size first. Nothing is
    computed before steps() or run().
    """

    cost: Cost
    method: FitMethod
    _run: FitRun | SizeSelection

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Return a generator that computes the fit.

        It yields Readings of the examples, a Forecast, and a Step for each update; in long phases also Readings, so
        that it can be ended about every tenth of a second. It returns the FitResult.
        """
        return suppress_overflow_warnings(self._generate_steps())

    def run(self, on_progress: Callable[[Progress], object] | None = None) -> FitResult:
        """Compute the fit, calling `on_progress` with everything that `steps` yields; its exceptions end the fit.

        `on_progress` runs without numpy's warnings of overflow and invalid values, as the fit does.
        """
        with ignore_overflow():
            return run_to_end(self._generate_steps(), on_progress)

    def _generate_steps(self) -> Generator[Progress, None, FitResult]:
        return generate_fit_steps(self._run) if isinstance(self._run, FitRun) else self._run.generate_steps()


def plan_fit_kernel(
    input: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    pairs: Sequence[ExamplePair] | None = None,
    validation: Sequence[ExamplePair] | None = None,
    patience: int | None = None,
    kernel_size: int | Sequence[int] | Auto | None = None,
    max_kernel_size: int | Sequence[int] | None = None,
    bias: bool = False,
    initial_kernel: ArrayLike | None = None,
    initial_bias: ArrayLike | None = None,
    solver: Solver = "sgd",
    learning_rate: float | Auto = 0.03,
    steps: int = 10,
    loss: Loss = "sum",
    huber_delta: float | Auto | None = None,
    tolerance: float | None = None,
    ridge: float | Auto = 0.0,
    nonnegative: bool = False,
    sum_to: float | None = None,
    symmetric: Symmetry | None = None,
    separable: int | bool | None = None,
    smoothness: float = 0.0,
    momentum: float | None = None,
    betas: Sequence[float] | None = None,
    batch_size: int | None = None,
    refuse_divergence: bool = False,
    ridge_path: bool = False,
    covariance: bool = False,
    seed: int | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    device: str = "auto",
    limits: Limits | None = None,
    machine: Machine | None = None,
) -> FitPlan:
    """Check the arguments of a fit, load its examples and return its plan.

    The fit finds the kernel, and with `bias` a bias, that minimise the loss between conv2d(input, kernel, bias) and
    target. The plan's steps() or run() compute it; `fit_kernel_steps` plans a fit and returns its steps, `fit_kernel`
    plans and runs it.

    Examples: input and target have the shape (H, W), (C, H, W) or (N, C, H, W); `pairs` takes several of them, whose
    sizes may differ. If stride is 1 and padding 0, `kernel_size` defaults to the size that the shapes determine.
    `weights`, shaped like target or one plane for all, are the weights of the target values in the loss; values of
    weight 0 are ignored.

    Losses: `loss` "sum" is the sum of the squared residuals, "mean" their mean, "huber" and "l1" the means that
    torch.nn.HuberLoss and L1Loss compute. `huber_delta` is the delta of HuberLoss, 1.0 by default; "auto" is 1.345
    robust standard deviations of the residuals. `ridge` times the sum of the squared kernel entries is added to the
    loss; for losses "sum" and "mean", "auto" is the ridge that minimises generalised cross-validation (Golub, Heath and
    Wahba, Technometrics 21, 1979).

    Solvers: "exact" computes the best kernel (of several, that of least norm), for loss "huber" by iteratively
    reweighted least squares. The other solvers are the optimizers of torch.optim: "sgd" (all examples in each step, or
    `batch_size` images in a random order from the seed), "momentum" and "nesterov" (`momentum` is 0.9 by default),
    "adam" (`betas` are 0.9 and 0.999 by default). `learning_rate` "auto" is the rate with the smallest loss after these
    steps. `tolerance` ends the descent when the excess loss (the loss minus the smallest possible one) or, if that is
    unknown, the length of the gradient is at most that fraction of its initial value. For solver "exact", `tolerance`
    applies to loss "huber" and to conjugate gradients.

    Constraints: solver "exact" supports constraints on the kernel of each filter: `nonnegative` (no entry below 0),
    `sum_to` (the sum of the entries), `symmetric` (equal entries: "horizontal", K[i, j] = K[i, w-1-j]; "vertical",
    K[i, j] = K[h-1-i, j]; "both"; "rotation", K[i, j] = K[h-1-i, w-1-j]; "transpose", K = K'; "full", all eight
    symmetries of the square) and `separable` (the maximum rank of each plane; True is 1). `smoothness` times the sum of
    the squared differences of neighbouring entries is added to the loss. All but `separable` can be combined with each
    other.

    Size selection: `kernel_size` "auto" compares all sizes up to `max_kernel_size` that have the same centre as the
    largest, on the same target values, and fits a kernel of the size with the smallest Bayesian information criterion
    (Schwarz, Annals of Statistics 6, 1978).

    Validation: `validation` takes pairs, like `pairs`, that the kernel is not fitted to. Their loss, without the ridge,
    is computed before each update, and the kernel with the smallest one is returned. `patience` ends the descent after
    that many steps without a new minimum of the validation loss.

    Result: `ridge_path` adds the kernels for 50 ridges over their useful range, `covariance` the covariance of the
    unknowns of each filter. If a descent diverges, its forecast and its status report it, and its kernel is the last
    finite one; with `refuse_divergence`, the steps raise InvalidOption if the forecast predicts divergence. The fit is
    computed in float64, on the CPU if the device is mps, which does not support float64.

    Raises InvalidArgument or one of its subclasses, DeviceUnavailable and, if `limits` are given, TooLarge.
    Source: for least squares, Golub and Van Loan, Matrix Computations, 5.3; for the descents, torch.optim.
    """
    options = Options(
        solver,
        loss,
        learning_rate,
        steps,
        tolerance,
        ridge,
        momentum,
        betas,
        batch_size,
        refuse_divergence,
        huber_delta,
        Constraints(nonnegative, sum_to, symmetric, parse_rank(separable), smoothness),
        ridge_path,
        covariance,
    )
    require_one_of("padding_mode", padding_mode, PaddingMode)
    requested_device = resolve_device(device)
    torch_device = CPU_DEVICE if requested_device.type == "mps" else requested_device
    machine = machine or this_machine()
    layer = Layer(stride, padding, dilation, groups, padding_mode)
    examples = load_examples(_collect_examples(input, target, weights, pairs))
    require_patience(patience, options, validated=validation is not None)
    held_out = None if validation is None else load_validation(_name_examples("validation", validation), examples)
    size_range = None
    if kernel_size == "auto":
        require_size_selection(options, initial_kernel=initial_kernel is not None)
        depth = max(examples.channels // require_positive("groups", layer.groups), 1)
        size_range = find_size_range(examples, layer, max_kernel_size, depth=depth, bias=bias)
        given_size: int | Sequence[int] | None = size_range.outer
    else:
        given_size = _require_given_size(kernel_size, max_kernel_size)
    initialization = resolve_initialization(
        examples,
        layer,
        kernel_size=given_size,
        initial_kernel=initial_kernel,
        bias=bias,
        initial_bias=initial_bias,
    )
    _require_batch_size(batch_size, examples)
    kernel_name = "kernel_size" if initial_kernel is None else "initial_kernel"
    problems, held_out_problems = _make_problems(
        examples, held_out, layer, initialization.kernel_shape, device=torch_device.type, kernel_name=kernel_name
    )
    fit_spec = FitSpec(
        options=options,
        examples=examples,
        held_out=held_out,
        patience=patience,
        initialization=initialization,
        groups=layer.groups,
        seed=resolve_seed(seed),
        device=torch_device,
        machine=machine,
        limits=limits,
    )
    return _plan(fit_spec, size_range, problems, held_out_problems)


def _plan(
    fit_spec: FitSpec, size_range: SizeRange | None, problems: Sequence[Problem], held_out_problems: Sequence[Problem]
) -> FitPlan:
    """Choose the strategy. Raises TooLarge if its cost exceeds the limits."""
    fit_run: FitRun | SizeSelection
    if size_range is None:
        fit_run, strategy = fit_spec.make_run(problems, held_out_problems)
    else:
        fit_run = SizeSelection(fit_spec, size_range, problems, held_out_problems)
        strategy = fit_run.plan()
    result_megabytes = count_result_megabytes(fit_spec.layout, fit_spec.options)
    cost = Cost(strategy.megabytes, strategy.gflop, strategy.seconds, result_megabytes)
    if fit_spec.limits is not None:
        fit_spec.limits.check(cost)
    return FitPlan(cost, strategy.method, fit_run)


def _require_given_size(
    kernel_size: int | Sequence[int] | str | None, max_kernel_size: int | Sequence[int] | None
) -> int | Sequence[int] | None:
    """Return a kernel_size that is not "auto". Raises InvalidArgument for other strings, and for max_kernel_size."""
    if isinstance(kernel_size, str):
        raise InvalidArgument(
            f'kernel_size {format_value(kernel_size)} is neither an integer, nor [rows, columns], nor "auto"',
            field="kernel_size",
            got=format_value(kernel_size),
            limit='an integer, [rows, columns], "auto"',
        )
    if max_kernel_size is not None:
        raise InvalidOption(
            'max_kernel_size is given, but kernel_size is not "auto": set kernel_size to "auto", or leave it out',
            field="max_kernel_size",
            got=format_value(max_kernel_size),
            limit='null unless kernel_size is "auto"',
        )
    return kernel_size


def _require_batch_size(batch_size: int | None, examples: Examples) -> None:
    """Raise InvalidOption for a batch_size above the number of images."""
    if batch_size is None:
        return
    count = sum(len(example.images) for example in examples.pairs)
    if batch_size > count:
        raise InvalidOption(
            f"batch_size {batch_size} is above the number of images, {count}",
            field="batch_size",
            got=batch_size,
            limit=count,
        )


def _make_problems(
    examples: Examples,
    held_out: Examples | None,
    layer: Layer,
    kernel_shape: tuple[int, int, int, int],
    *,
    device: str,
    kernel_name: str,
) -> tuple[list[Problem], list[Problem]]:
    """Return the convolutions of the examples and of the validation pairs. Raises InvalidShape if sizes differ."""
    problems = []
    for example in examples.pairs:
        problem = layer.problem(example.images, kernel_shape, device=device, kernel_name=kernel_name)
        example.require_output_size(problem)
        problems.append(problem)
    held_out_problems = [
        make_validation_problem(pair, layer, kernel_shape, device=device, kernel_name=kernel_name)
        for pair in (held_out.pairs if held_out else ())
    ]
    return problems, held_out_problems


def make_steps_function(
    plan: Callable[Arguments, FitPlan],
) -> Callable[Arguments, Generator[Progress, None, FitResult]]:
    """Return a function that checks the arguments at once and returns the steps of the plan."""

    @functools.wraps(plan)
    def steps(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Generator[Progress, None, FitResult]:
        return plan(*args, **kwargs).steps()

    return _copy_signature(steps, plan, "fit_kernel_steps", Generator[Progress, None, FitResult])


def make_fit_function(plan: Callable[Arguments, FitPlan]) -> Callable[Arguments, FitResult]:
    """Return a function that runs the plan to its end."""

    @functools.wraps(plan)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> FitResult:
        return plan(*args, **kwargs).run()

    return _copy_signature(run, plan, "fit_kernel", FitResult)


def _copy_signature(function: Function, plan: Callable[..., object], name: str, returned: object) -> Function:
    """Name a function and give it the signature of the plan with another return type, as help() shows it."""
    function.__name__ = function.__qualname__ = name
    function.__signature__ = inspect.signature(plan).replace(return_annotation=returned)  # type: ignore[attr-defined]
    return function


def run_to_end(
    steps: Generator[Progress, None, FitResult], on_progress: Callable[[Progress], object] | None = None
) -> FitResult:
    """Run a fit to its end, calling `on_progress` with everything that it yields; its exceptions end the fit."""
    while True:
        try:
            progress = next(steps)
            if on_progress is not None:
                on_progress(progress)
        except StopIteration as finished:
            result: FitResult = finished.value
            return result


fit_kernel_steps = make_steps_function(plan_fit_kernel)
fit_kernel = make_fit_function(plan_fit_kernel)


def _collect_examples(
    input: ArrayLike | None,
    target: ArrayLike | None,
    weights: ArrayLike | None,
    pairs: Sequence[ExamplePair] | None,
) -> list[RawExample]:
    if pairs is not None and input is None and target is None and weights is None:
        return _name_examples("pairs", pairs)
    if pairs is None and input is not None and target is not None:
        return [RawExample(input, target, weights)]
    raise InvalidArgument(
        "give either input and target (and weights), or pairs of them",
        field="pairs" if pairs is not None else "target" if input is not None else "input",
    )


def _name_examples(field: str, pairs: Sequence[ExamplePair]) -> list[RawExample]:
    """Return pairs with their names for messages."""
    for index, pair in enumerate(pairs):
        if not 2 <= len(pair) <= 3:
            raise InvalidArgument(
                f"{field}[{index}] has {len(pair)} arrays: an input, its target and, perhaps, weights",
                field=f"{field}[{index}]",
                got=len(pair),
                limit="2 or 3",
            )
    return [
        RawExample(pair[0], pair[1], pair[2] if len(pair) > 2 else None, f"{field}[{index}].")
        for index, pair in enumerate(pairs)
    ]
