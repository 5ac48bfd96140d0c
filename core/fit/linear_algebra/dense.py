"""Products, norms, orthonormal bases and small least squares problems of dense matrices."""

import math

import numpy as np
import scipy
from numpy.typing import NDArray

from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, Interruptible
from core.fit.parameters import Unknowns

Floats = NDArray[np.float64]
"""Array of float64 numbers of any shape."""

EIGENVALUE_ROUNDING_RATIO = 100 * np.finfo(np.float64).eps
"""Eigenvalue of normal equations, relative to the largest, up to which it may be a rounding error."""

UNDERFLOW_THRESHOLD = 1e-290
"""Threshold up to which numbers count as zero: they may have lost digits to underflow."""

DEPENDENT_PIVOT_RATIO = 1e-10
"""Ratio of the smallest to the largest pivot of a QR factorization up to which it is repeated with column pivoting."""

ORTHOGONALIZATION_COLUMNS = 64
"""Number of columns that are orthogonalized together."""


def estimate_noise_floor(largest: Floats, size: int) -> Floats:
    """Return the eigenvalue up to which it may be a rounding error, in matrices of this size and largest eigenvalue."""
    return np.maximum(
        largest * max(EIGENVALUE_ROUNDING_RATIO, size * float(np.finfo(np.float64).eps)), UNDERFLOW_THRESHOLD
    )


def multiply_blocks(matrices: Floats, unknowns: Unknowns) -> Interruptible[Floats]:
    """Multiply matrices (blocks, size, size) by unknowns (blocks, size, columns)."""
    blocks, size, columns = unknowns.shape
    together = int(YIELD_INTERVAL_OPERATIONS / (2 * size**2))
    if blocks * columns <= together:
        product: Floats = matrices @ unknowns
        return product
    product = np.empty_like(unknowns)
    wide, high = max(1, together), max(1, together // columns)
    for block in range(0, blocks, high):
        for column in range(0, columns, wide):
            some = slice(block, block + high), slice(None), slice(column, column + wide)
            product[some] = matrices[some[0]] @ unknowns[some]
            yield
    return product


def compute_column_norms(matrix: Floats) -> Floats:
    """Return the norms of columns whose squares may overflow or underflow float64."""
    peaks = np.maximum(np.abs(matrix).max(0), np.finfo(np.float64).tiny)
    norms: Floats = peaks * np.linalg.norm(matrix / peaks, axis=0)
    return norms


def choose_column_scale(matrix: Floats) -> Floats:
    """Return for each column the power of two that scales its norm to about 1; 1 for columns that vanish."""
    norms = compute_column_norms(matrix)
    exponents = np.log2(norms, out=np.zeros_like(norms), where=norms > np.finfo(np.float64).tiny)
    scale: Floats = np.exp2(-np.round(exponents))
    return scale


def orthonormal_range(columns: Floats) -> Floats:
    """Return an orthonormal basis of columns of similar norm, with pivoting if they are nearly dependent."""
    basis: Floats
    basis, triangle = np.linalg.qr(columns)
    pivots = np.abs(triangle.diagonal())
    if not len(pivots) or pivots.min() > DEPENDENT_PIVOT_RATIO * pivots.max():
        return basis
    basis, triangle, _ = scipy.linalg.qr(columns, mode="economic", pivoting=True, check_finite=False)
    pivots = np.abs(triangle.diagonal())
    return basis[:, pivots > np.finfo(np.float64).eps * max(columns.shape) * pivots.max()]


def solve_least_squares(columns: Floats, right: Floats) -> Floats:
    """Return x (n) that minimises |columns x - right|, with pivoting if the columns (m, n) are nearly dependent."""
    count = columns.shape[1]
    if not count:
        return np.zeros(0)
    triangle: Floats = np.asarray(np.linalg.qr(np.column_stack([columns, right]), mode="r"))[:count]
    pivots = np.abs(triangle.diagonal())
    if len(triangle) == count and pivots.min() > DEPENDENT_PIVOT_RATIO * pivots.max():
        solution: Floats = scipy.linalg.solve_triangular(triangle[:, :-1], triangle[:, -1], check_finite=False)
        return solution
    threshold = np.finfo(np.float64).eps * max(columns.shape)
    found = scipy.linalg.lstsq(columns, right, cond=threshold, lapack_driver="gelsy", check_finite=False)
    return np.asarray(found[0], np.float64)


def orthonormalize(columns: Floats) -> Interruptible[Floats]:
    """Return an orthonormal basis of the columns' span; each block is orthogonalized twice against the previous ones.

    Source: Giraud, Langou and Rozloznik, The loss of orthogonality in the Gram-Schmidt orthogonalization process, 2005.
    """
    # Normalize first: short columns would be lost to the rounding errors of long ones.
    basis: Floats = columns / np.maximum(np.linalg.norm(columns, axis=0), UNDERFLOW_THRESHOLD)
    for first in range(0, basis.shape[1], ORTHOGONALIZATION_COLUMNS):
        before, block = basis[:, :first], basis[:, first : first + ORTHOGONALIZATION_COLUMNS]
        for _ in range(2):
            block -= before @ (before.T @ block)
            block[:] = np.linalg.qr(block)[0]
        yield
    return basis


def compute_reflector(sums: Floats) -> tuple[Floats, int]:
    """Return v and i such that the reflection 1 - v v' maps `sums`, which are not all 0, to a multiple of axis i.

    Source: Householder, Unitary triangularization of a nonsymmetric matrix, J. ACM 5, 1958.
    """
    vector = sums / np.linalg.norm(sums)
    pivot = int(np.abs(vector).argmax())
    vector[pivot] += math.copysign(1.0, vector[pivot])
    return vector * math.sqrt(2 / float(vector @ vector)), pivot


def null_space(sums: Floats) -> Floats:
    """Return an orthonormal basis (size, size - 1) of all x with sums @ x = 0, for sums that are not all 0."""
    vector, pivot = compute_reflector(sums)
    basis: Floats = np.delete(np.eye(len(sums)) - np.outer(vector, vector), pivot, axis=1)
    return basis
