"""Every combination of options is fitted or rejected, and its result is complete."""

import itertools
from typing import Any

import numpy as np
import pytest

from core import CoreError, FitResult, correlate, fit_kernel

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
INPUT = RNG.normal(size=(20, 22))
TARGET = correlate(INPUT, RNG.normal(size=(3, 3)), dtype="float64").output.numpy() + 0.1 * RNG.normal(size=(18, 20))
VALIDATION = [(RNG.normal(size=(12, 12)), RNG.normal(size=(10, 10)))]

CHOICES: dict[str, list[dict[str, Any]]] = {
    "solver": [{"solver": "exact"}, {"solver": "sgd"}, {"solver": "adam"}],
    "loss": [{}, {"loss": "mean"}, {"loss": "huber"}, {"loss": "huber", "huber_delta": "auto"}, {"loss": "l1"}],
    "ridge": [{}, {"ridge": 0.5}, {"ridge": "auto"}],
    "size": [{}, {"kernel_size": "auto"}],
    "validation": [{}, {"validation": VALIDATION}],
    "analysis": [{}, {"covariance": True}, {"ridge_path": True}],
    "constraint": [
        {},
        {"nonnegative": True},
        {"symmetric": "both", "sum_to": 1.0},
        {"separable": 1},
        {"smoothness": 0.1},
    ],
}
SQUARED_LOSSES = ("sum", "mean")


def is_allowed(options: dict[str, Any]) -> bool:
    """Return whether the documentation allows these options together."""
    loss, exact = options.get("loss", "sum"), options["solver"] == "exact"
    squares = loss in SQUARED_LOSSES
    constrained = any(name in options for name in ("nonnegative", "symmetric", "separable", "smoothness"))
    searches = options.get("ridge") == "auto" or "ridge_path" in options
    return not (
        (exact and loss == "l1")
        or (searches and (not squares or constrained))
        or ("kernel_size" in options and not squares)
        or (constrained and not (exact and squares))
    )


def list_combinations() -> list[dict[str, Any]]:
    """Return all allowed combinations, and a tenth of the others."""
    chosen = [dict(itertools.chain(*map(dict.items, parts))) for parts in itertools.product(*CHOICES.values())]
    allowed = [options for options in chosen if is_allowed(options)]
    rejected = [options for options in chosen if not is_allowed(options)]
    return [*allowed, *rejected[::10]]


def format_name(options: dict[str, Any]) -> str:
    """Return the test id of a combination."""
    return "-".join(name if name == "validation" else f"{name}={value}" for name, value in options.items())


def run_fit(options: dict[str, Any]) -> FitResult:
    """Fit with a bias and a few small steps."""
    return fit_kernel(INPUT, TARGET, bias=True, learning_rate=1e-4, steps=4, seed=0, **options)


@pytest.mark.parametrize("options", list_combinations(), ids=format_name)
def test_every_combination_is_fitted_or_rejected(options: dict[str, Any]) -> None:
    if not is_allowed(options):
        with pytest.raises(CoreError):
            run_fit(options)
        return
    found = run_fit(options)
    assert np.isfinite(found.kernel.numpy()).all()
    assert np.isfinite(found.final_loss)
    assert (found.validation_loss is None) == ("validation" not in options)
    assert (found.validation_history is None) == ("validation" not in options or options["solver"] == "exact")
    assert (found.kernel_sizes is None) == ("kernel_size" not in options)
    assert (found.ridge_path is None) == ("ridge_path" not in options)
    assert (found.huber_delta is None) == (options.get("loss") != "huber")
    assert found.ridge == options.get("ridge", 0.0) or options.get("ridge") == "auto"
    if "covariance" in options and found.standard_errors is not None:
        assert found.covariance is not None
        assert found.bias_standard_errors is not None
        errors = np.append(found.standard_errors.numpy().ravel(), found.bias_standard_errors.numpy())
        np.testing.assert_allclose(np.sqrt(np.diag(found.covariance.numpy())), errors, rtol=1e-9)
    else:
        assert found.covariance is None
