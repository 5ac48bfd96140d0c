"""Statements in the messages of a fit, compared with least squares on the matrix of all windows."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core import FitResult, InvalidOption, Status, fit_kernel
from core.fit import strategy
from core.fit.gradient_descent.learning_rate import optimal_learning_rate
from core.fit.gradient_descent.optimizers import Momentum
from core.fit.interruption import finish
from core.fit.messages import describe_unstable_rate
from core.fit.options import Options
from tests.core.fit.d2l_example import make_d2l_pair
from tests.core.fit.equations.test_conditioning import fit_problems
from tests.core.fit.layers import FitCase, fit_cases
from tests.core.fit.least_squares import solve_least_squares
from tests.reference import Floats, correlate_valid_by_windows

NUMBER_REGEX = r"([-+0-9.e]+)"


@pytest.mark.parametrize("solver", ["sgd", "momentum", "nesterov"])
def test_converged_means_excess_loss_within_tolerance(solver: Any) -> None:
    rng = np.random.default_rng(0)
    image, target = rng.normal(size=(20, 20)), rng.normal(size=(18, 18))
    slow = fit_kernel(image, target, solver=solver, learning_rate=1e-6, tolerance=1e-3, steps=50, seed=0)
    assert slow.status is Status.COMPLETED
    assert slow.steps == 50
    fit = fit_kernel(image, target, solver=solver, learning_rate="auto", tolerance=1e-3, steps=1000, seed=0)
    assert fit.status is Status.CONVERGED
    assert fit.best_possible_loss is not None
    first = fit.loss_history[0] - fit.best_possible_loss
    assert fit.final_loss - fit.best_possible_loss <= 1e-3 * first * (1 + 1e-6)
    assert fit.loss_history[-1] - fit.best_possible_loss > 1e-3 * first * (1 - 1e-6)


def test_missed_target_is_not_reported_as_reached() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 65536, (30, 30)).astype(float)
    fit = fit_kernel(image, (image[1:-1, 1:-1] > 32768).astype(float), learning_rate=1e-14, seed=0)
    assert fit.best_possible_loss is not None
    assert fit.best_possible_loss > 10
    assert "it can become 0" not in fit.message
    assert f"the smallest possible is {fit.best_possible_loss:.6g}" in fit.message


@pytest.mark.slow
@given(
    fit_case=fit_cases(weighted=False), factor=st.sampled_from([1 - 1e-3, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1e-3, 0.3, 3])
)
def test_stable_rate_is_rounded_to_the_stated_side(fit_case: FitCase, factor: float) -> None:
    known = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, steps=1, seed=0)
    stable = known.largest_stable_learning_rate
    if stable is None:
        return
    fit = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, learning_rate=factor * stable, steps=1, seed=0)
    expected = None if factor == 1 else "converges" if factor < 1 else "diverges"
    assert fit.prediction == expected
    try:
        fit_kernel(
            pairs=fit_case.pairs,
            **fit_case.layer.options,
            learning_rate=factor * stable,
            steps=1,
            seed=0,
            refuse_divergence=True,
        )
    except InvalidOption as rejected:
        rate, limit = re.findall(rf"learning_rate {NUMBER_REGEX} is above {NUMBER_REGEX}, the largest", str(rejected))[
            0
        ]
        assert float(limit) <= stable
        assert float(rate) > float(limit)
        assert factor > 1
    else:
        assert factor <= 1


def test_more_steps_are_not_recommended_at_the_limit() -> None:
    pair = [[1, 1, 0, 0, 0, 0, 1, 1]], [[0, -1, 0, 0, 0, 1, 0]]
    fit = fit_kernel(*pair, learning_rate=0.2, steps=3, seed=0)
    assert fit.largest_stable_learning_rate == pytest.approx(0.2)
    assert fit.prediction is None
    assert fit.message.endswith('it can become 0: take a smaller learning_rate, or solver "exact"')
    # The error along the eigenvector of the largest eigenvalue only changes its sign in each step.
    late = fit_kernel(*pair, learning_rate=0.2, steps=2000, seed=0)
    assert late.final_loss > 0.01


@pytest.mark.parametrize("stable", [0.016091, 0.0333333333, 2 / 3, 1e-300, 1.23456789e-5, 0.1, 12345678.9])
@pytest.mark.parametrize("excess", [1e-9, 1e-5, 1e-2, 10])
def test_limit_is_rounded_down_and_differs_from_the_rate(stable: float, excess: float) -> None:
    options = Options("sgd", "sum", 1.0, 1, None, 0.0, None, None, None, refuse_divergence=False)
    sentence = describe_unstable_rate(options, stable * (1 + excess), stable, None)
    rate, limit = (
        float(text) for text in re.findall(rf"learning_rate {NUMBER_REGEX} is above {NUMBER_REGEX},", sentence)[0]
    )
    assert limit <= stable
    assert limit < stable * (1 + excess)
    assert limit == pytest.approx(stable, rel=1e-3)
    assert rate > limit


@pytest.mark.slow
@given(fit_case=fit_cases(weighted=False), factor=st.sampled_from([0.5, 1.1, 2, 4]), seed=st.integers(0, 9))
def test_batches_are_reported_as_converged_only_if_they_are(fit_case: FitCase, factor: float, seed: int) -> None:
    count = sum(len(x) for x, _, _ in fit_case.pairs)
    known = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, batch_size=1, steps=1, seed=0)
    stable = known.largest_stable_learning_rate
    if stable is None or count == 1:
        return
    options: dict[str, Any] = {"batch_size": 1, "learning_rate": factor * stable, "steps": 400, "seed": seed}
    fit = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **options)
    assert fit.prediction in (None, "converges")
    if fit.prediction == "converges":
        assert math.isfinite(fit.final_loss)
        assert fit.final_loss <= 100 * max(fit.loss_history[0], *(float(np.sum(y**2)) for _, y, _ in fit_case.pairs))


def test_batch_of_all_images_is_predicted_like_full_descent() -> None:
    image, edges = make_d2l_pair()
    for rate, prediction in ((0.03, "converges"), (0.05, "diverges")):
        fit = fit_kernel(image, edges, batch_size=1, learning_rate=rate, seed=0)
        assert fit.prediction == prediction


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 5.0, 50.0])
def test_adam_takes_all_steps_like_torch(rate: float) -> None:
    image, edges = make_d2l_pair()
    kernel = torch.tensor([[1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([kernel], lr=rate)
    x, y = image.double()[None, None], edges.double()[None, None]
    history = []
    for _ in range(300):
        loss = (torch.nn.functional.conv2d(x, kernel[None, None]) - y).square().sum()
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    fit = fit_kernel(image, edges, solver="adam", learning_rate=rate, steps=300, initial_kernel=[[1.0, -1.0]])
    assert fit.steps == 300
    # Later losses are nearly zero, and their gradients are rounding errors.
    assert fit.loss_history[:100] == pytest.approx(history[:100], rel=1e-6)


def test_diverging_descent_runs_while_numbers_are_finite() -> None:
    fit = fit_kernel(*make_d2l_pair(), learning_rate=0.1, steps=100, seed=0)
    assert fit.status is Status.DIVERGED
    assert fit.steps == 100
    assert fit.final_loss > 1e20


@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_conjugate_gradients_claim_no_smallest_loss(monkeypatch: pytest.MonkeyPatch, tolerance: float | None) -> None:
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", 3)
    rng = np.random.default_rng(2)
    image = 100 + rng.normal(size=(30, 30))
    target = rng.normal(size=(26, 26))
    fit = fit_kernel(image, target, solver="exact", tolerance=tolerance)
    assert fit.method == "convolutions"
    assert (fit.best_possible_loss, fit.excess_loss, fit.rank) == (None, None, None)
    assert "best kernel" not in fit.message
    assert all(loss >= 0 for loss in fit.loss_history)


@pytest.mark.slow
def test_more_than_4096_unknowns_are_solved_by_the_equations() -> None:
    rng = np.random.default_rng(3)
    image, kernel = rng.normal(size=(200, 200)), rng.normal(size=(65, 65))
    fit = fit_kernel(image, correlate_valid_by_windows(image, kernel), solver="exact")
    assert fit.method == "normal equations"
    assert fit.rank == 4225
    np.testing.assert_allclose(fit.kernel.numpy(), kernel, atol=1e-8)


def test_ridge_makes_the_solution_unique_and_is_reported() -> None:
    ones = np.ones((6, 8)), np.ones((6, 7))
    fit = fit_kernel(*ones, solver="exact", ridge=0.1)
    assert "the ridge makes the solution unique" in fit.message
    assert "least norm" not in fit.message
    assert "this is the solution of least norm" in fit_kernel(*ones, solver="exact").message


@pytest.mark.slow
@given(fit_problems())
def test_every_message_of_a_fit_is_true(drawn: tuple[FitCase, dict[str, Any]]) -> None:
    fit_case, options = drawn
    fit = fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **options)
    assert_message_true(fit, fit_case, options)


@pytest.mark.slow
@given(
    fit_cases(), st.sampled_from(["exact", "sgd", "momentum", "nesterov", "adam"]), st.sampled_from([1e-4, 0.01, 1.0])
)
def test_every_message_is_true_at_any_rate(fit_case: FitCase, solver: str, rate: float) -> None:
    options: dict[str, Any] = {"solver": solver, "loss": "sum", "learning_rate": rate, "steps": 10, "seed": 0}
    assert_message_true(fit_kernel(pairs=fit_case.pairs, **fit_case.layer.options, **options), fit_case, options)


def assert_message_true(fit: FitResult, fit_case: FitCase, options: dict[str, Any]) -> None:
    """Compare each statement of the message with the examples."""
    oracle = MessageOracle(fit, fit_case, options)
    for part in re.split("; (?!try)", fit.message):
        for pattern, check in CLAIMS.items():
            if found := re.match(pattern, part):
                check(oracle, found)
                break
        else:
            raise AssertionError(f"no check for the statement {part!r}; add one to CLAIMS")


class MessageOracle:
    """Checks of statements about a fit by least squares on the matrix of all windows."""

    def __init__(self, fit: FitResult, fit_case: FitCase, options: dict[str, Any]) -> None:
        scale = 1 if options["loss"] == "sum" else fit_case.weight
        self.fit, self.options = fit, options
        assert fit.ridge is not None
        self.best = solve_least_squares(fit_case, fit.ridge * scale)
        self.squares = sum(float(np.sum(y**2 * (1 if w is None else w))) for _, y, w in fit_case.pairs) / scale
        self.smallest = self.best.loss / scale + fit.ridge * float(np.sum(self.best.kernel**2))
        products = max(float(np.abs(x).max()) for x, _, _ in fit_case.pairs) * float(np.abs(self.best.kernel).sum())
        products += 0 if self.best.bias is None else float(np.abs(self.best.bias).max())
        # Both core and this class round the sums of products that they compare with the targets.
        self.rounding = (
            1e-18 * max(self.squares, fit.loss_history[0]) + fit_case.weight / scale * (1e-14 * products) ** 2
        )

    def smallest_loss(self, found: re.Match[str]) -> None:
        if self.best.has_decided_rank:
            assert float(found[1]) <= self.smallest * (1 + 1e-5) + self.rounding

    def zero(self, _: re.Match[str]) -> None:
        assert self.smallest <= 1e-12 * self.squares

    def losses(self, found: re.Match[str]) -> None:
        first, last, steps = found.groups()
        if "batch_size" not in self.options:
            assert float(first) == pytest.approx(self.fit.loss_history[0], rel=2e-5, abs=self.rounding)
        assert float(last) == pytest.approx(self.fit.final_loss, rel=2e-5, abs=self.rounding)
        assert int(steps) == self.fit.steps

    def rank(self, found: re.Match[str]) -> None:
        assert (int(found[1]), int(found[2])) == (self.fit.rank, self.fit.unknowns)
        assert int(found[1]) < self.fit.unknowns
        if self.best.has_decided_rank:
            assert self.fit.rank == self.best.rank

    def explained(self, found: re.Match[str]) -> None:
        if math.isfinite(self.best.r_squared):
            assert float(found[1]) >= self.best.r_squared - 0.01

    def least_norm(self, _: re.Match[str]) -> None:
        if self.best.has_decided_rank:
            assert np.linalg.norm(self.fit.kernel.numpy()) <= np.linalg.norm(self.best.kernel) * (1 + 1e-6)

    def other_solutions(self, _: re.Match[str]) -> None:
        assert self.fit.rank is not None
        assert self.fit.rank < self.fit.unknowns

    def ridge(self, _: re.Match[str]) -> None:
        assert self.fit.ridge

    def cross_validation(self, found: re.Match[str]) -> None:
        assert self.options["ridge"] == "auto"
        ridge = float(found[1]) if found.re.groups else 0.0
        assert ridge == pytest.approx(self.fit.ridge, rel=1e-3)

    def diverged(self, _: re.Match[str]) -> None:
        assert self.fit.status is Status.DIVERGED
        assert self.fit.final_loss > self.smallest
        course = re.search(
            rf"the loss (?:fell from|rose from) {NUMBER_REGEX}(?: to {NUMBER_REGEX}, then)?", self.fit.message
        )
        if course is not None and "batch_size" not in self.options:
            assert float(course[1]) == pytest.approx(self.fit.loss_history[0], rel=1e-5)
            least = course[2] if course[2] is not None else course[1]
            assert float(least) == pytest.approx(min(self.fit.loss_history), rel=1e-5)

    def nothing(self, _: re.Match[str]) -> None:
        """Check nothing: another test checks the statement."""


CLAIMS = {
    rf"the best kernel: loss {NUMBER_REGEX}(?:, R squared {NUMBER_REGEX})?$": MessageOracle.smallest_loss,
    rf"the smallest possible is {NUMBER_REGEX}(?:: take (?:more steps|a smaller)|$)": MessageOracle.smallest_loss,
    "it can become 0: take (?:more steps|a smaller)": MessageOracle.zero,
    rf"the loss (?:fell|rose) from {NUMBER_REGEX} to {NUMBER_REGEX} in (\d+) steps?$": MessageOracle.losses,
    r"rank (\d+) of (\d+): .*": MessageOracle.rank,
    rf"no kernel of this size explains more than {NUMBER_REGEX} of the target's variance": MessageOracle.explained,
    "this is the solution of least norm$": MessageOracle.least_norm,
    "other kernels have the same loss to within rounding errors$": MessageOracle.other_solutions,
    "the ridge makes the solution unique$": MessageOracle.ridge,
    rf"ridge {NUMBER_REGEX} minimises generalised cross-validation$": MessageOracle.cross_validation,
    rf"ridge {NUMBER_REGEX} is the largest that was tried: by generalised": MessageOracle.cross_validation,
    "generalised cross-validation does not distinguish ridges": MessageOracle.cross_validation,
    "diverged: ": MessageOracle.diverged,
    "with more steps it will diverge: ": MessageOracle.nothing,
    "the loss stayed at ": MessageOracle.nothing,
}


@pytest.mark.parametrize("seed", range(40))
def test_automatic_momentum_rate_is_the_best_of_thousands(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, steps = int(rng.integers(1, 26)), int(rng.choice([1, 3, 10, 30, 100]))
    optimizer = Momentum(float(rng.choice([0.5, 0.9, 0.99])), nesterov=bool(rng.integers(2)))
    curvatures, errors = np.exp(rng.normal(size=size) * rng.choice([0.3, 1, 3])), rng.normal(size=size)
    largest = optimizer.largest_stable_rate(curvatures.max())

    def losses(rates: Floats) -> Floats:
        left: Floats = np.square(optimizer.recurrence(rates[:, None] * curvatures).error_after(steps)) @ (
            curvatures * errors**2
        )
        return left

    ends = np.geomspace(1e-8, 1e-2, 2000)
    grid = largest * np.concatenate([ends, np.linspace(0.01, 1, 10_000, endpoint=False), 1 - ends])
    best = finish(optimal_learning_rate(optimizer, curvatures, errors, steps, largest))
    assert best is not None
    assert losses(np.array([best]))[0] <= 1.05 * losses(grid).min() + 1e-15 * losses(np.zeros(1))[0]
