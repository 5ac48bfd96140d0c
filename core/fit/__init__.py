"""Learning a kernel from examples of its input and output: linear least squares, solved or descended."""

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from core.arrays import ArrayLike
from core.device import CPU, resolve_device
from core.errors import Cost, InvalidArgument, InvalidOption
from core.fit.cross_validation import require_equations, require_searchable
from core.fit.fitting import Fitting
from core.fit.layout import Layout
from core.fit.losses import Loss
from core.fit.options import Auto, Options
from core.fit.problem import Layer, Pairing, load_examples
from core.fit.result import FitResult, Progress
from core.fit.rules import Solver
from core.fit.start import settled_seed, starting_point
from core.fit.way import Method, choose_way, extra_megabytes, passage
from core.limits import Limits
from core.machine import Machine, this_machine
from core.shapes import PaddingMode, one_of

Arguments = ParamSpec("Arguments")
Function = TypeVar("Function", bound=Callable[..., Any])

ExamplePair = tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike | None]
"""An input, its target and, perhaps, the weights of the target's values."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """A fit whose arguments are checked and whose examples are loaded; nothing is computed yet. `cost` is predicted."""

    cost: Cost
    method: Method
    _fitting: Fitting

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Return a generator that computes the fit.

        It yields Readings of the examples, a Forecast, and a Step for each update; in long phases also Readings, so
        that it can be ended about every tenth of a second. It returns the FitResult.
        """
        return self._fitting.steps()


def plan_fit_kernel(
    input: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    pairs: Sequence[ExamplePair] | None = None,
    kernel_size: int | Sequence[int] | None = None,
    bias: bool = False,
    initial_kernel: ArrayLike | None = None,
    initial_bias: ArrayLike | None = None,
    solver: Solver = "sgd",
    learning_rate: float | Auto = 0.03,
    steps: int = 10,
    loss: Loss = "sum",
    tolerance: float | None = None,
    ridge: float | Auto = 0.0,
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
    """Find the kernel (and bias) that brings conv2d(input; kernel, bias) nearest to target.

    input and target are (H, W), (C, H, W) or (N, C, H, W); `pairs` takes several of different sizes instead. The
    kernel's size follows from the shapes where stride is 1 and padding 0. `weights` (like target, or one plane for all)
    say what each of the target's values counts; 0 leaves it out.

    `loss` is the sum of the squared differences, their mean, or the mean of what torch.nn.HuberLoss or L1Loss makes of
    them; `ridge` times the sum of the kernel's squares is added to it. `solver` "exact" gives the best kernel itself
    (of least norm where several are best); the others descend as torch.optim defines them: "sgd" (all examples at
    once, or `batch_size` images at a time in an order drawn from the seed), "momentum" and "nesterov" (`momentum`
    0.9), "adam" (`betas` 0.9, 0.999). `learning_rate` "auto" is the rate that leaves the smallest loss after these
    steps. `tolerance` ends the descent where the gradient is shorter than that share of its first length, or a step
    lowers the loss by less than that share of it.

    `ridge` "auto" is the one that minimises generalised cross-validation (Golub, Heath and Wahba, Technometrics 21,
    1979), for a sum or mean of squares. `ridge_path` adds the kernels of ridges of all sizes to the result,
    `covariance` that of each filter's unknowns.

    Everything is computed in float64 (on the CPU where the device is mps, which has none). A descent that diverges is
    no error: its forecast and its status say so, and its kernel is the last finite one; `refuse_divergence` makes an
    InvalidOption of the forecast.

    Raises InvalidArgument and its kind, DeviceUnavailable and, where `limits` are given, TooLarge.

    This form checks the arguments and loads the examples; the plan's steps() compute. `fit_kernel_steps` does both,
    `fit_kernel` runs them to their end.
    Source: for the whole idea, Golub and Van Loan, Matrix Computations, 5.3; for the descents, torch.optim.
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
        ridge_path,
        covariance,
    )
    one_of("padding_mode", padding_mode, PaddingMode)
    wanted = resolve_device(device)
    torch_device = CPU if wanted.type == "mps" else wanted
    machine = machine or this_machine()
    layer = Layer(stride, padding, dilation, groups, padding_mode)
    examples = load_examples(_pairings(input, target, weights, pairs))
    start = starting_point(
        examples,
        layer,
        kernel_size=kernel_size,
        initial_kernel=initial_kernel,
        bias=bias,
        initial_bias=initial_bias,
    )
    if batch_size is not None:
        count = sum(len(example.images) for example in examples.pairs)
        if batch_size > count:
            raise InvalidOption(
                f"batch_size {batch_size} is above the number of images, {count}",
                field="batch_size",
                got=batch_size,
                limit=count,
            )
    kernel_name = "kernel_size" if initial_kernel is None else "initial_kernel"
    passages = []
    for example in examples.pairs:
        problem = layer.problem(example.images, start.kernel_shape, device=torch_device.type, kernel_name=kernel_name)
        example.require_reachable(problem)
        if batch_size is not None:
            problem = replace(problem, batch=1)
        passages.append(passage(example, problem, machine, apart=batch_size is not None))
    layout = Layout(start.kernel_shape, layer.groups, bias, examples.filters_weighted_apart)
    require_searchable(options, layout, lambda: sum(example.values for example in examples.pairs))
    way = choose_way(passages, layout, options, machine, limits)
    require_equations(options, way.method)
    cost = Cost(way.megabytes, way.gflop, way.seconds, extra_megabytes(layout, options))
    if limits is not None:
        limits.require(cost)
    fitting = Fitting(
        options=options,
        passages=passages,
        layout=layout,
        start=start,
        seed=settled_seed(seed),
        single_planes=examples.single_planes,
        method=way.method,
        device=torch_device,
        machine=machine,
    )
    return FitPlan(cost, way.method, fitting)


def steps_of(plan: Callable[Arguments, FitPlan]) -> Callable[Arguments, Generator[Progress, None, FitResult]]:
    """The same function, returning the steps of its plan: the arguments are checked at once."""

    @functools.wraps(plan)
    def steps(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Generator[Progress, None, FitResult]:
        return plan(*args, **kwargs).steps()

    return _named(steps, plan, "fit_kernel_steps", Generator[Progress, None, FitResult])


def run_to_end(plan: Callable[Arguments, FitPlan]) -> Callable[Arguments, FitResult]:
    """The same function without the steps between: it returns what they return."""

    @functools.wraps(plan)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> FitResult:
        return exhaust(plan(*args, **kwargs).steps())

    return _named(run, plan, "fit_kernel", FitResult)


def _named(function: Function, plan: Callable[..., object], name: str, returned: object) -> Function:
    """The function with a name, and the signature of the plan but for what it returns: what help() shows."""
    function.__name__ = function.__qualname__ = name
    function.__signature__ = inspect.signature(plan).replace(return_annotation=returned)  # type: ignore[attr-defined]
    return function


def exhaust(steps: Generator[Progress, None, FitResult], each: Callable[[Progress], object] | None = None) -> FitResult:
    """Run a fit to its end, calling `each` with all that it yields; what that raises ends the fit."""
    while True:
        try:
            progress = next(steps)
            if each is not None:
                each(progress)
        except StopIteration as finished:
            result: FitResult = finished.value
            return result


fit_kernel_steps = steps_of(plan_fit_kernel)
fit_kernel = run_to_end(plan_fit_kernel)


def _pairings(
    input: ArrayLike | None,
    target: ArrayLike | None,
    weights: ArrayLike | None,
    pairs: Sequence[ExamplePair] | None,
) -> list[Pairing]:
    if pairs is not None and input is None and target is None and weights is None:
        for index, pair in enumerate(pairs):
            if not 2 <= len(pair) <= 3:
                raise InvalidArgument(
                    f"pairs[{index}] has {len(pair)} arrays: an input, its target and, perhaps, weights",
                    field=f"pairs[{index}]",
                    got=len(pair),
                    limit="2 or 3",
                )
        return [
            Pairing(pair[0], pair[1], pair[2] if len(pair) > 2 else None, f"pairs[{index}].")
            for index, pair in enumerate(pairs)
        ]
    if pairs is None and input is not None and target is not None:
        return [Pairing(input, target, weights)]
    raise InvalidArgument(
        "give either input and target (and weights), or pairs of them",
        field="pairs" if pairs is not None else "target" if input is not None else "input",
    )
