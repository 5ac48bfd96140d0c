"""Pivoted Cholesky factorizations and the Lanczos method, compared with numpy's eigenvalues and inverses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core.fit import cost_model
from core.fit.interruption import finish
from core.fit.linear_algebra import cholesky, dense, eigen, inverse, spectrum
from core.fit.linear_algebra.lanczos import lanczos
from tests.core.fit.equations.test_exact import assert_close, fit_exact
from tests.core.fit.layers import FitCase, fit_cases
from tests.core.fit.least_squares import solve_least_squares
from tests.reference import Floats


def draw_gram(seed: int, size: int, rank: int, blocks: int = 1) -> Floats:
    """Draw symmetric matrices (blocks, size, size) of this rank, with rows of very different norms."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(blocks, size, rank)) * np.exp(2 * rng.normal(size=(1, size, 1)))
    return rows @ rows.swapaxes(1, 2)


@pytest.mark.parametrize("rank", [0, 1, 63, 64, 65, 130, 257, 300])
def test_factor_reproduces_the_matrix_and_its_rank(rank: int) -> None:
    rows = np.random.default_rng(0).normal(size=(300, rank if rank < 300 else 400))
    matrix = rows @ rows.T
    factor = finish(cholesky.factorize_pivoted(matrix.copy(), 1e-9))
    assert factor.rank == rank
    assert sorted(factor.order) == list(range(300))
    product = factor.lower @ factor.lower.T
    np.testing.assert_allclose(product, matrix[factor.order][:, factor.order], atol=1e-9 * (1 + matrix.max()))


def test_factor_solves_and_gives_the_inverse_diagonal() -> None:
    (matrix,) = draw_gram(1, 600, 700)
    scale = 1 / np.sqrt(matrix.diagonal())
    matrix = matrix * scale * scale[:, None]
    factor = finish(cholesky.factorize_pivoted(matrix.copy(), 1e-12))
    right = np.random.default_rng(2).normal(size=(600, 5))
    solution = np.empty_like(right)
    solution[factor.order] = factor.backward(factor.forward(right[factor.order]))
    np.testing.assert_allclose(matrix @ solution, right, atol=1e-9)
    np.testing.assert_allclose(finish(factor.inverse_diagonal()), np.linalg.inv(matrix).diagonal(), rtol=1e-8)


def test_no_factorization_step_dominates() -> None:
    matrix = draw_gram(3, 640, 700)[0]
    assert sum(1 for _ in cholesky.factorize_pivoted(matrix, 0.0)) == 640 // cholesky.PANEL_COLUMNS


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3))
def test_large_matrices_are_inverted_like_small_ones(
    seed: int, size: int, blocks: int, missing: int, wide: int
) -> None:
    rank = max(0, size - missing)
    matrices = draw_gram(seed, size, rank, blocks)
    unknowns = np.random.default_rng(seed).normal(size=(blocks, size, wide))
    found: list[Any] = []
    for largest in (size, 0):
        with pytest.MonkeyPatch.context() as patch:
            for module in (inverse, spectrum):
                patch.setattr(module, "MAX_EIGH_SIZE", largest)
            inverted = finish(inverse.invert(matrices))
            extremes = finish(spectrum.extreme_eigenvalues(matrices, inverted))
            found.append((inverted, finish(inverted.solve(matrices @ unknowns)), extremes))
    (one, solution, ends), (other, solution_too, ends_too) = found
    scale = 1 / np.sqrt(np.maximum(np.diagonal(matrices, axis1=1, axis2=2), 1e-300))
    values = np.linalg.eigvalsh(matrices * scale[:, :, None] * scale[:, None, :])
    # Otherwise rounding errors determine the rank.
    assume(rank == 0 or values[:, size - rank].min() > 1e-6)
    assert one.ranks.tolist() == other.ranks.tolist() == blocks * [rank]
    np.testing.assert_allclose(solution_too, solution, atol=1e-6 * (1 + np.abs(solution).max()))
    assert ends_too == (pytest.approx(ends[0], rel=1e-9), pytest.approx(ends[1], rel=1e-5))
    if rank == size:
        np.testing.assert_allclose(finish(other.diagonals()), finish(one.diagonals()), rtol=1e-6)


def test_few_curvatures_approximate_all() -> None:
    matrices, unknowns = draw_gram(4, 200, 250), np.random.default_rng(5).normal(size=(1, 200, 3))
    matrices /= np.linalg.eigvalsh(matrices).max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eigen, "MAX_EIGH_SIZE", 0)
        values, lengths = finish(eigen.eigen_components(matrices, unknowns))
    assert len(values) == eigen.QUADRATURE_NODES
    image = unknowns
    for power in range(2 * eigen.QUADRATURE_NODES - 1):
        assert float(lengths**2 @ values**power) == pytest.approx(float(np.vdot(unknowns, image)), rel=1e-6)
        image = matrices @ image


def test_lanczos_of_a_zero_matrix_finds_nothing() -> None:
    found = finish(
        lanczos(lambda vector: dense.multiply_blocks(draw_gram(0, 4, 4), vector), np.zeros((1, 4, 1)), 10, 0.0)
    )
    assert found.largest == 0


@pytest.mark.parametrize(("blocks", "columns"), [(1, 1), (3, 2), (1, 50), (7, 50)])
def test_product_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, blocks: int, columns: int) -> None:
    monkeypatch.setattr(dense, "YIELD_INTERVAL_OPERATIONS", 2 * 20**2 * 8)
    matrices, unknowns = draw_gram(6, 20, 20, blocks), np.random.default_rng(7).normal(size=(blocks, 20, columns))
    np.testing.assert_allclose(finish(dense.multiply_blocks(matrices, unknowns)), matrices @ unknowns, rtol=1e-12)
    assert sum(1 for _ in dense.multiply_blocks(matrices, unknowns)) >= blocks * columns // 8


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [0.0, 0.5])
@given(fit_case=fit_cases(noises=(0.0, 0.1, 1.0)))
def test_large_kernel_matches_lstsq(ridge: float, fit_case: FitCase) -> None:
    best = solve_least_squares(fit_case, ridge)
    assume(best.has_clear_rank)
    with pytest.MonkeyPatch.context() as patch:
        for module in (eigen, inverse, spectrum, cost_model):
            patch.setattr(module, "MAX_EIGH_SIZE", 0)
        fit = fit_exact(fit_case, ridge=ridge)
    assert_close(fit.kernel, best.kernel, 1e-7)
    assert_close(fit.bias, best.bias, 1e-7)
    assert fit.rank == best.rank
    if fit.rank == fit.unknowns and not ridge:
        values = np.concatenate(best.singular_values)
        assert fit.largest_eigenvalue == pytest.approx(2 * values.max() ** 2, rel=1e-9)
        assert fit.smallest_eigenvalue == pytest.approx(2 * values.min() ** 2, rel=1e-5)
        if np.isfinite(best.kernel_errors).all():
            assert_close(fit.standard_errors, best.kernel_errors, 1e-6)
