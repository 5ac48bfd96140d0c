"""Covariance matrices of the unknowns, compared with an explicit inverse."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings

from core import fit_kernel
from tests.core.fit.hat_matrices import build_systems, fit_with_ridge
from tests.core.fit.layers import FitCase, fit_cases
from tests.core.fit.least_squares import solve_least_squares


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("ridge", [0.0, 0.3, "auto"])
@settings(max_examples=40)
@given(fit_case=fit_cases())
def test_covariance_matches_an_inverse(fit_case: FitCase, ridge: Any, loss: str) -> None:
    scale = 1 if loss == "sum" else fit_case.weight
    assume(sum(len(matrix) for matrix, _ in build_systems(fit_case)) > 1)
    fit = fit_with_ridge(fit_case, ridge=ridge, loss=loss, covariance=True)
    assert (fit.covariance is None) == (fit.standard_errors is None)
    assert fit.ridge is not None
    best = solve_least_squares(fit_case, fit.ridge * scale)
    assume(best.has_clear_rank and min(best.freedom) > 1e-3)
    if fit.covariance is None:
        return
    taps = best.kernel[0].size
    for number, (matrix, _) in enumerate(build_systems(fit_case)):
        gram = matrix.T @ matrix
        penalty = fit.ridge * scale * np.eye(len(gram)) * (np.arange(len(gram)) < taps)
        assume(np.linalg.cond(gram + penalty) < 1e9)
        inverse = np.linalg.inv(gram + penalty)
        expected = best.residual_std[number] ** 2 * inverse @ gram @ inverse
        found = fit.covariance[number].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(found, found.T)
        assert fit.standard_errors is not None
        errors = fit.standard_errors[number].numpy().ravel()
        if fit.bias_standard_errors is not None:
            errors = np.append(errors, fit.bias_standard_errors[number])
        np.testing.assert_allclose(np.diag(found), errors**2, rtol=1e-9, atol=1e-12 * np.abs(found).max())


def test_covariance_of_planes_is_a_matrix() -> None:
    rng = np.random.default_rng(5)
    pair = rng.normal(size=(8, 9)), rng.normal(size=(7, 7))
    planes = fit_kernel(*pair, solver="exact", bias=True, covariance=True)
    images = fit_kernel(pair[0][None], pair[1][None], solver="exact", bias=True, covariance=True)
    assert planes.covariance is not None
    assert planes.covariance.shape == (7, 7)
    assert images.covariance is not None
    assert images.covariance.shape == (1, 7, 7)
    np.testing.assert_array_equal(planes.covariance, images.covariance[0])
    assert fit_kernel(*pair, solver="exact").covariance is None
    # The covariance is None if the standard errors are.
    without: list[dict[str, Any]] = [{"loss": "huber"}, {"kernel_size": 8, "padding": [0, 6, 0, 5]}]
    for options in without:
        fit = fit_kernel(*pair, covariance=True, seed=0, **options)
        assert (fit.standard_errors, fit.covariance) == (None, None)
