"""Learning a kernel from examples of its input and output, by full-batch gradient descent."""

import functools
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from typing import Literal, ParamSpec

import torch

from core.arrays import ArrayLike
from core.device import resolve_device
from core.errors import InvalidArgument, InvalidOption
from core.fit.descent import Descent, Loss, descend
from core.fit.problem import Examples, Layer, Pairing, load_examples
from core.fit.result import FitResult, Status, Step
from core.fit.start import Start, settled_seed, starting_point
from core.limits import Limits
from core.shapes import is_real, one_of, positive, shown

Solver = Literal["sgd"]

Arguments = ParamSpec("Arguments")

MAX_STEPS = 1_000_000
"""Steps that one fit may take; each leaves a number in the loss history."""

PASSES_PER_STEP = 3
"""A step convolves forward once and, for the gradient, does about twice that work backward."""


def fit_kernel_steps(
    input: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    pairs: Sequence[tuple[ArrayLike, ArrayLike]] | None = None,
    kernel_size: int | Sequence[int] | None = None,
    bias: bool = False,
    initial_kernel: ArrayLike | None = None,
    initial_bias: ArrayLike | None = None,
    solver: Solver = "sgd",
    learning_rate: float = 0.03,
    steps: int = 10,
    loss: Loss = "sum",
    seed: int | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    device: str = "auto",
    limits: Limits | None = None,
) -> Generator[Step, None, FitResult]:
    """Find the kernel (and bias) that brings conv2d(input; kernel, bias) nearest to target, in the sum of squares.

    input and target are (H, W), (C, H, W) or (N, C, H, W); `pairs` takes several of different sizes instead. The
    kernel's size follows from the shapes where stride is 1 and padding 0. Everything is computed in float64 where the
    device has it. `loss` "mean" divides by the number of target values, and so the gradient too.

    Raises InvalidArgument and its kind, DeviceUnavailable and, where `limits` are given, TooLarge. A descent that
    diverges is no error: its status says so, and its kernel is the last finite one.

    This form checks the arguments at once, then yields a Step for each update and returns the FitResult; close the
    generator to stop early. `fit_kernel` runs it to its end.
    """
    one_of("solver", solver, Solver)
    one_of("loss", loss, Loss)
    positive("steps", steps, MAX_STEPS)
    if not is_real(learning_rate) or not 0 < learning_rate < math.inf:
        raise InvalidOption(
            f"learning_rate {shown(learning_rate)} is not a number above 0",
            field="learning_rate",
            got=shown(learning_rate),
            limit="above 0",
        )
    torch_device = resolve_device(device)
    dtype = torch.float32 if torch_device.type == "mps" else torch.float64
    layer = Layer(stride, padding, dilation, groups)
    examples = load_examples(_pairings(input, target, pairs), dtype, torch_device)
    start = starting_point(
        examples,
        layer,
        kernel_size=kernel_size,
        initial_kernel=initial_kernel,
        bias=bias,
        initial_bias=initial_bias,
    )
    kernel_name = "kernel_size" if initial_kernel is None else "initial_kernel"
    problems = [layer.problem(pair.images, start.kernel_shape, kernel_name=kernel_name) for pair in examples.pairs]
    for pair, problem in zip(examples.pairs, problems, strict=True):
        pair.require_reachable(problem)
    if limits is not None:
        limits.check(*problems, passes=PASSES_PER_STEP * steps, engines=("tensor",))
    seed = settled_seed(seed)
    kernel, offsets = start.weights(seed)
    descent = descend(
        examples,
        problems,
        kernel,
        offsets,
        learning_rate=learning_rate,
        steps=steps,
        loss=loss,
    )
    reported_seed = None if start.complete else seed
    return _reported(descent, examples, start, solver, learning_rate, reported_seed)


def run_to_end(
    steps: Callable[Arguments, Generator[Step, None, FitResult]],
) -> Callable[Arguments, FitResult]:
    """The same function without the steps between: it returns what the generator returns."""

    @functools.wraps(steps)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> FitResult:
        return exhaust(steps(*args, **kwargs))

    # What help() shows; without it that is the signature of the function inside.
    run.__signature__ = inspect.signature(steps).replace(return_annotation=FitResult)  # type: ignore[attr-defined]
    return run


def exhaust(steps: Generator[Step, None, FitResult], each: Callable[[Step], object] | None = None) -> FitResult:
    """Run a fit to its end, calling `each` with every Step; what that raises ends the fit."""
    while True:
        try:
            step = next(steps)
            if each is not None:
                each(step)
        except StopIteration as finished:
            result: FitResult = finished.value
            return result


fit_kernel = run_to_end(fit_kernel_steps)


def _pairings(
    input: ArrayLike | None, target: ArrayLike | None, pairs: Sequence[tuple[ArrayLike, ArrayLike]] | None
) -> list[Pairing]:
    if pairs is not None and input is None and target is None:
        return [
            Pairing(one, other, f"pairs[{index}].input", f"pairs[{index}].target")
            for index, (one, other) in enumerate(pairs)
        ]
    if pairs is None and input is not None and target is not None:
        return [Pairing(input, target)]
    raise InvalidArgument(
        "give either input and target, or pairs",
        field="pairs" if pairs is not None else "target" if input is not None else "input",
    )


def _reported(
    steps: Generator[Step, None, Descent],
    examples: Examples,
    start: Start,
    solver: Solver,
    learning_rate: float,
    seed: int | None,
) -> Generator[Step, None, FitResult]:
    descent = yield from steps
    return FitResult(
        kernel=descent.kernel[0, 0] if examples.single_planes else descent.kernel,
        bias=descent.bias,
        loss_history=descent.loss_history,
        final_loss=descent.final_loss,
        steps=len(descent.loss_history),
        status=descent.status,
        message=_message(descent, learning_rate),
        learning_rate=learning_rate,
        unknowns=start.unknowns,
        solver=solver,
        device=str(descent.kernel.device),
        seed=seed,
    )


def _message(descent: Descent, learning_rate: float) -> str:
    """One sentence on what happened and, where it went wrong, what to change."""
    first, last, steps = descent.loss_history[0], descent.final_loss, len(descent.loss_history)
    times = f"{steps} step{'' if steps == 1 else 's'}"
    if not math.isfinite(first):
        return "diverged: the loss is not finite from the start, the values are too large to square: scale them down"
    if descent.status is Status.COMPLETED and last == first:
        return f"the loss stayed at {first:.6g} for {times}: its gradient is zero here, or the rate too small to see"
    if descent.status is Status.COMPLETED:
        return f"the loss fell from {first:.6g} to {last:.6g} in {times}"
    least = min(descent.loss_history)
    reached = "past every finite number" if descent.overflowed else f"to {last:.6g}"
    stable = descent.largest_stable_rate
    remedy = (
        "try a much smaller one"
        if stable is None
        else f"the largest that converges is about {stable:.3g}; try {0.8 * stable:.2g}"
    )
    return f"diverged: learning_rate {learning_rate:g} took the loss from {least:.6g} {reached} in {times}; {remedy}"
