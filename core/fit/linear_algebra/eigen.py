"""Eigenvalues and eigenvectors of symmetric matrices.

Small matrices are decomposed into eigenvalues and eigenvectors. For larger ones that takes up to minutes, in calls that
cannot be interrupted: the Lanczos method takes a fraction of the time.
"""

from collections.abc import Iterator

import numpy as np

from core.fit.interruption import YIELD_INTERVAL_OPERATIONS, Interruptible
from core.fit.linear_algebra.dense import Floats, estimate_noise_floor, multiply_blocks
from core.fit.linear_algebra.lanczos import lanczos
from core.fit.parameters import Unknowns

MAX_EIGH_SIZE = 512
"""Maximum rows of a matrix for which eigenvectors are computed, which takes less than 0.1 seconds of one thread."""

EIGH_OPERATIONS_PER_CUBE = 25
EIGH_OVERHEAD_OPERATIONS = 5e5
"""Operations of a matrix product that takes as long as computing eigenvectors: per cube of the size, and per matrix."""

MAX_LANCZOS_STEPS = 100
MIN_LANCZOS_STEPS = 40
LANCZOS_TOLERANCE = 1e-7
"""Limits of the steps of the Lanczos method, and its tolerance for the largest eigenvalue, whose error is about the
square of the tolerance."""

QUADRATURE_NODES = 64
"""Number of nodes that represent the distribution of an error over the curvatures of a large matrix."""


def eigen_components(matrices: Floats, unknowns: Unknowns) -> Interruptible[tuple[Floats, Floats]]:
    """Return eigenvalues, 0 for those below rounding errors, and the length of the unknowns along each eigenvector.

    For large matrices they are the QUADRATURE_NODES nodes and weights of a Gauss quadrature: it is exact for
    unknowns' p(matrix) unknowns with all polynomials p of a degree below twice the number of nodes.
    """
    size = matrices.shape[1]
    if size <= MAX_EIGH_SIZE:
        values, vectors = yield from decompose_scaled(matrices)
        lengths = np.sqrt(np.square(vectors.swapaxes(1, 2) @ unknowns).sum(2))
    else:
        found = yield from lanczos(lambda vector: multiply_blocks(matrices, vector), unknowns, QUADRATURE_NODES, -1.0)
        values, lengths = found.values[None], np.sqrt(found.weights)[None]
    above = values > estimate_noise_floor(values[:, -1:] if values.size else values, size)
    return np.where(above, values, 0).ravel(), lengths.ravel()


def find_largest_matrix_eigenvalue(matrices: Floats) -> Interruptible[float]:
    """Find the largest eigenvalue of all matrices (blocks, size, size) by the Lanczos method."""
    found = yield from lanczos(
        lambda vector: multiply_blocks(matrices, vector),
        draw_direction(matrices),
        MAX_LANCZOS_STEPS,
        LANCZOS_TOLERANCE,
        MIN_LANCZOS_STEPS,
    )
    return found.largest


def draw_direction(matrices: Floats) -> Unknowns:
    """Return a random direction, which has a component along every eigenvector."""
    return np.random.default_rng(0).standard_normal((*matrices.shape[:2], 1))


def split_blocks(matrices: Floats) -> Iterator[slice]:
    """Yield slices of blocks whose decompositions take as long as about YIELD_INTERVAL_OPERATIONS."""
    blocks, size = matrices.shape[:2]
    together = max(1, int(YIELD_INTERVAL_OPERATIONS / (EIGH_OPERATIONS_PER_CUBE * size**3 + EIGH_OVERHEAD_OPERATIONS)))
    for first in range(0, blocks, together):
        yield slice(first, first + together)


def decompose_scaled(matrices: Floats, scale: Floats | None = None) -> Interruptible[tuple[Floats, Floats]]:
    """Return eigenvalues (blocks, size), ascending, and eigenvectors, in columns, of scale * matrices * scale'."""
    values, vectors = np.empty(matrices.shape[:2]), np.empty_like(matrices)
    for some in split_blocks(matrices):
        part = matrices[some]
        if scale is not None:
            part = part * scale[some] * scale[some].swapaxes(1, 2)
        values[some], vectors[some] = np.linalg.eigh(part)
        yield
    return values, vectors
