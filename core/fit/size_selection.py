"""Choice of a kernel's size by the Bayesian information criterion (BIC).

All candidates lie centred in one largest kernel and are compared on the same target values, so that the equations (or
the triangular factor) of the largest one hold those of all others.
Source: Schwarz, Estimating the Dimension of a Model, Annals of Statistics 6, 1978.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from core.errors import InvalidNumbers, InvalidOption, InvalidShape
from core.fit.analysis import Analysis
from core.fit.constraints import UNCONSTRAINED
from core.fit.fitting import Fitting
from core.fit.layout import Layout
from core.fit.objective import FactoredQuadratic
from core.fit.options import Options
from core.fit.problem import Example, Examples, Layer
from core.fit.result import FitResult, Progress, Reading
from core.fit.sentences import TOO_LARGE_TO_SQUARE
from core.fit.setup import Setup
from core.fit.spectrum import FactorSpectrum
from core.fit.steps import Steps, quietly
from core.fit.targets import Targets
from core.fit.tsqr import MAX_FACTORED_SIZE
from core.fit.units import choose_units
from core.fit.way import CALL, CHOLESKY, Way, cost_of_equations
from core.shapes import Pair, Problem, conv2d_padding, positive_pair, sized

DEFAULT_LARGEST_SIZE = 13
"""Rows and columns of the largest kernel that is compared, if neither the shapes nor the request say it."""

MIN_VALUES_PER_UNKNOWN = 2
"""Target values of a filter for each of its unknowns: with fewer, a kernel fits noise and the BIC does not hold."""

ROUNDING = 1e3 * float(np.finfo(np.float64).eps)
"""Residual norm, relative to that of the numbers that are summed up, up to which a kernel explains the target."""

ENTRY = 2e-9
"""Seconds to move an entry of the equations and to sum it up; measured."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Frame:
    """Sizes that candidates lie in.

    outer: a kernel of that size makes the targets out of the inputs as they are. largest: the largest candidate, which
    lies centred in it. open: a larger candidate could be requested.
    """

    outer: Pair
    largest: Pair
    open: bool

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the candidates: those that lie centred in the largest."""
        rows, columns = (list(range(2 - side % 2, side + 1, 2)) for side in self.largest)
        return rows, columns


def require_selectable(options: Options, *, initial_kernel: bool) -> None:
    """Raise InvalidOption for options with which sizes cannot be compared."""
    if not options.criterion.square:
        raise InvalidOption(
            f'kernel_size "auto" compares sums of squares, loss "{options.loss}" is not one: use loss "sum" or "mean", '
            "or give the size",
            field="loss",
            got=options.loss,
            limit="sum, mean",
        )
    if initial_kernel:
        raise InvalidOption(
            'initial_kernel has a size, kernel_size "auto" chooses one: leave out one of them',
            field="initial_kernel",
            limit='null with kernel_size "auto"',
        )


def find_frame(
    examples: Examples, layer: Layer, max_kernel_size: int | Sequence[int] | None, *, depth: int, bias: bool
) -> Frame:
    """Find the sizes that candidates lie in. Raises InvalidShape and InvalidOption if no size fits."""
    wanted = None if max_kernel_size is None else positive_pair("max_kernel_size", max_kernel_size)
    if layer.padding == "same":
        for example in examples.pairs:
            _require_same_size(example, layer)
        outer = wanted or _default_size(examples, depth)
        frame = Frame(outer, outer, open=True)
    else:
        low, high = _possible_sizes(examples, layer)
        rows, columns = (_outer(low[axis], high[axis], wanted[axis] if wanted else None) for axis in (0, 1))
        outer = largest = rows, columns
        if wanted is not None:
            largest = _within("rows", outer[0], wanted, 0, high), _within("columns", outer[1], wanted, 1, high)
        frame = Frame(outer, largest, open=largest != outer)
    _require_few_unknowns(frame, depth, bias=bias, given=wanted is not None)
    _require_values(frame, sum(example.targets[:, 0].numel() for example in examples.pairs), depth, bias=bias)
    return frame


def _default_size(examples: Examples, depth: int) -> Pair:
    """Return the default largest size: odd, not larger than the images, and with few enough unknowns."""
    rows, columns = (
        min(DEFAULT_LARGEST_SIZE, *((side - 1) // 2 * 2 + 1 for side in sides))
        for sides in ([example.images.shape[axis] for example in examples.pairs] for axis in (2, 3))
    )
    while depth * rows * columns >= MAX_FACTORED_SIZE and max(rows, columns) > 1:
        rows, columns = max(rows - 2, 1), max(columns - 2, 1)
    return rows, columns


def _require_same_size(example: Example, layer: Layer) -> None:
    """Raise InvalidShape unless padding "same" makes the target's size out of the input."""
    steps = positive_pair("stride", layer.stride)
    expected = tuple(-(-side // step) for side, step in zip(example.images.shape[2:], steps, strict=True))
    if tuple(example.targets.shape[2:]) != expected:
        raise InvalidShape(
            f"{example.pairing.name('target')} is {sized(example.targets.shape[2:])} in rows and columns: padding "
            f'"same" makes {sized(expected)} out of {example.pairing.name("input")} {sized(example.images.shape[2:])}',
            field=example.pairing.name("target"),
            got=sized(example.targets.shape[2:]),
            limit=sized(expected),
        )


def _possible_sizes(examples: Examples, layer: Layer) -> tuple[Pair, Pair]:
    """Return the smallest and the largest kernel size that makes every target out of its input."""
    stride, dilation = positive_pair("stride", layer.stride), positive_pair("dilation", layer.dilation)
    low, high = [1, 1], [0, 0]
    for index, example in enumerate(examples.pairs):
        size = example.images.shape[2], example.images.shape[3]
        sides = conv2d_padding(layer.padding, size, (1, 1), stride, dilation)
        for axis in (0, 1):
            padded, outputs = size[axis] + sum(sides[2 * axis : 2 * axis + 2]), example.targets.shape[2 + axis]
            # Both follow from the number of outputs: one more than the steps that fit beside the dilated kernel.
            most = (padded - 1 - (outputs - 1) * stride[axis]) // dilation[axis] + 1
            least = -((outputs * stride[axis] - padded) // dilation[axis]) + 1
            low[axis] = max(low[axis], least)
            high[axis] = min(high[axis], most) if index else most
        if low[0] > high[0] or low[1] > high[1]:
            target, others = example.targets.shape[2:], " and the other targets" if index else ""
            raise InvalidShape(
                f"no kernel makes {example.pairing.name('target')} {sized(target)}{others} out of "
                f"{example.pairing.name('input')} {sized(size)} with this stride, padding and dilation: "
                "change padding, or crop the target",
                field=example.pairing.name("target"),
                got=sized(target),
                limit=f"at most {sized(size)} without padding",
            )
    return (low[0], low[1]), (high[0], high[1])


def _outer(low: int, high: int, wanted: int | None) -> int:
    """Return the size, of those that make the targets, in which candidates lie centred."""
    if wanted is None:
        return high if high % 2 or high == low else high - 1
    if wanted >= low:
        return min(wanted, high)
    return low if (low - wanted) % 2 == 0 or low == high else low + 1


def _within(name: str, outer: int, wanted: Pair, axis: int, high: Pair) -> int:
    """Return the largest candidate up to the wanted size. Raises InvalidOption if that is not possible."""
    if wanted[axis] > high[axis]:
        raise InvalidOption(
            f"max_kernel_size {sized(wanted)} has more {name} than any kernel that makes these targets, {high[axis]}: "
            "give a smaller one, or change padding",
            field="max_kernel_size",
            got=sized(wanted),
            limit=f"at most {sized(high)}",
        )
    side = wanted[axis] - (outer - wanted[axis]) % 2
    if side < 1:
        raise InvalidOption(
            f"max_kernel_size {sized(wanted)}: these targets take an even number of {name}, at least 2",
            field="max_kernel_size",
            got=sized(wanted),
            limit=f"at least 2 {name}",
        )
    return side


def _require_few_unknowns(frame: Frame, depth: int, *, bias: bool, given: bool) -> None:
    unknowns = depth * math.prod(frame.largest) + bias
    if unknowns > MAX_FACTORED_SIZE:
        raise InvalidOption(
            f"sizes up to {sized(frame.largest)} have up to {unknowns} unknowns a filter; at most {MAX_FACTORED_SIZE} "
            f"are compared: give a smaller max_kernel_size, or the kernel_size",
            field="max_kernel_size" if given else "kernel_size",
            got=sized(frame.largest),
            limit=f"{MAX_FACTORED_SIZE} unknowns a filter",
        )


def _require_values(frame: Frame, values: int, depth: int, *, bias: bool) -> None:
    """Raise InvalidShape unless the smallest candidate has enough values for its unknowns."""
    rows, columns = frame.sizes
    unknowns = depth * rows[0] * columns[0] + bias
    if values < MIN_VALUES_PER_UNKNOWN * unknowns:
        raise InvalidShape(
            f'kernel_size "auto" needs at least {MIN_VALUES_PER_UNKNOWN} target values of weight above 0 for each '
            f"unknown: {values} values a filter for {unknowns} unknowns of size {sized((rows[0], columns[0]))}; "
            "give more examples, or the kernel_size",
            field="kernel_size",
            got=f"{values} values",
            limit=f"at least {MIN_VALUES_PER_UNKNOWN * unknowns} values",
        )


def inner_problem(problem: Problem, size: Pair) -> Problem:
    """Return the convolution by a smaller kernel that makes the same target positions, centred in the larger one.

    Its padding is less by the kernel's offset; below 0 it crops the images.
    """
    down, across = offset_of(problem, size)
    top, bottom, left, right = problem.padding
    padding = top - down, bottom - down, left - across, right - across
    return replace(problem, kernel_height=size[0], kernel_width=size[1], padding=padding)


def offset_of(problem: Problem, size: Pair) -> Pair:
    """Return by how many pixels a centred kernel's windows begin after those of the problem's kernel."""
    rows, columns = (problem.kernel_height - size[0]) // 2, (problem.kernel_width - size[1]) // 2
    return rows * problem.dilation[0], columns * problem.dilation[1]


@dataclass(frozen=True, slots=True)
class SizeTable:
    """Candidates: sizes (n, 2), smallest residual sums of squares (n) and BIC (n)."""

    sizes: NDArray[np.int64]
    squares: NDArray[np.float64]
    criteria: NDArray[np.float64]

    @property
    def best(self) -> Pair:
        """The size of the smallest BIC."""
        rows, columns = self.sizes[int(self.criteria.argmin())].tolist()
        return rows, columns


def compare_sizes(
    analysis: Analysis, targets: Targets, layout: Layout, sizes: tuple[Sequence[int], Sequence[int]]
) -> Steps[SizeTable]:
    """Compute the BIC of kernels of these rows and columns, centred in the analysed one.

    BIC = N ln(RSS / N) + k ln N for N target values of weight above 0 and k unknowns of all filters. Residual sums of
    squares below rounding errors count as equal, so that of sizes that explain the target the smallest is the best.
    Sizes with fewer than MIN_VALUES_PER_UNKNOWN values for an unknown are left out. Raises InvalidShape if all are.
    """
    squares, rounding = yield from _residual_squares(analysis, layout, sizes)
    table = np.array([(rows, columns) for rows in sizes[0] for columns in sizes[1]])
    depth = layout.kernel_shape[1]
    unknowns = depth * table[:, 0] * table[:, 1] + layout.bias
    counted = targets.counted[targets.counted > 0]
    enough = MIN_VALUES_PER_UNKNOWN * unknowns <= counted.min()
    if not enough.any():
        _require_values(
            Frame((1, 1), (sizes[0][0], sizes[1][0]), open=False), int(counted.min()), depth, bias=layout.bias
        )
    table, squares, unknowns = table[enough], squares.ravel()[enough], unknowns[enough]
    floor = max(ROUNDING**2 * max(rounding, targets.squares), float(np.finfo(np.float64).tiny))
    values = float(counted.sum())
    fitted_to = values * np.log(np.maximum(squares, floor) / values)
    return SizeTable(table, squares, fitted_to + layout.kernel_shape[0] * unknowns * np.log(values))


def _residual_squares(
    analysis: Analysis, layout: Layout, sizes: tuple[Sequence[int], Sequence[int]]
) -> Steps[tuple[NDArray[np.float64], float]]:
    """Return the smallest sum of squares of each size (rows, columns), and the square of the numbers summed up."""
    (term,), spectrum = analysis.objective.terms, analysis.spectrum
    at = analysis.minimum.at
    threshold = float(np.max(spectrum.threshold)) if isinstance(spectrum, FactorSpectrum) else 0.0
    squares, rounding = np.zeros((len(sizes[0]), len(sizes[1]))), 0.0
    if isinstance(term, FactoredQuadratic):
        squares += float(term.rest.sum())
        rounding = float(np.square(np.abs(term.factor) @ np.abs(at)).sum())
        right = term.factor @ at - term.residual
        deficient = bool((spectrum.ranks < layout.size).any())
    else:
        squares += analysis.minimum.loss
        deficient = False
    for block in range(layout.blocks):
        for row, height in enumerate(sizes[0]):
            order, ends = _nested(layout, height, sizes[1])
            if not isinstance(term, FactoredQuadratic):
                root = np.linalg.cholesky(analysis.gram[block][np.ix_(order, order)]).T
                # What a smaller kernel leaves in addition, from the unknowns that it lacks.
                left = root @ at[block][order]
                if not row:
                    rounding += float(np.square(np.abs(root) @ np.abs(at[block][order])).sum())
            elif deficient:
                for column, end in enumerate(ends):
                    squares[row, column] += _deficient(term.factor[block][:, order[:end]], right[block], threshold)
                    yield
                continue
            else:
                left = _turned(term.factor[block][:, order], right[block])
            after = np.append(np.cumsum(np.square(left).sum(1)[::-1])[::-1], 0.0)
            squares[row] += after[ends]
            yield
    return squares, rounding


def _nested(layout: Layout, height: int, widths: Sequence[int]) -> tuple[NDArray[np.intp], list[int]]:
    """Order unknowns so that those of each width, of kernels of that height, come before those of larger ones.

    Returns the order, and how many unknowns each width has.
    """
    _, depth, rows, columns = layout.kernel_shape
    rank = np.full((depth, rows, columns), len(widths))
    top = (rows - height) // 2
    for index in range(len(widths) - 1, -1, -1):
        first = (columns - widths[index]) // 2
        rank[:, top : top + height, first : first + widths[index]] = index
    ranks = np.append(rank.ravel(), [-1] * layout.bias)
    return np.argsort(ranks, kind="stable"), [depth * height * width + layout.bias for width in widths]


def _turned(factor: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Q'right for the QR factorization of a factor."""
    reflectors, scales = torch.geqrf(torch.from_numpy(factor))
    turned: NDArray[np.float64] = torch.ormqr(reflectors, scales, torch.from_numpy(right), transpose=True).numpy()
    return turned


def _deficient(factor: NDArray[np.float64], right: NDArray[np.float64], threshold: float) -> float:
    """Return the squares that combinations of linearly dependent columns leave of the right side.

    threshold: pivots up to it, relative to the largest, count as zero.
    """
    norms = np.linalg.norm(factor, axis=0)
    scaled = factor[:, norms > 0] / norms[norms > 0]
    if not scaled.shape[1]:
        return float(np.square(right).sum())
    basis, triangle, _ = scipy.linalg.qr(scaled, mode="full", pivoting=True)
    diagonal = np.abs(np.diag(triangle))
    rank = int((diagonal > threshold * diagonal[0]).sum())
    return float(np.square((basis.T @ right)[rank:]).sum())


@dataclass(frozen=True, slots=True)
class SizeSelection:
    """A fit whose kernel size is chosen first; `problems` and `held_out_problems` are those of the outer size."""

    setup: Setup
    frame: Frame
    problems: Sequence[Problem]
    held_out_problems: Sequence[Problem]

    def plan(self) -> Way:
        """Predict the cost: reading and comparison, and a fit of the largest size."""
        fitting, largest = self._fit(self.frame.largest)
        options = _least_squares(self.setup.options)
        compared = self._largest()
        reading = cost_of_equations(compared.passages, fitting.layout, options, self.setup.machine)
        cube = fitting.layout.blocks * len(self.frame.sizes[0]) * fitting.layout.size**3
        square = cube / fitting.layout.size
        seconds = CHOLESKY * cube + 4 * ENTRY * square + CALL * len(self.frame.sizes[0]) * fitting.layout.blocks
        copies = 8e-6 * 4 * fitting.layout.size**2
        return Way(
            largest.method,
            largest.seconds + reading.seconds + seconds,
            largest.gflop + reading.gflop + (cube / 3 + 4 * square) / 1e9,
            max(largest.megabytes, reading.megabytes + copies),
        )

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples for the largest size, choose one, and fit it."""
        return quietly(self._steps())

    def _steps(self) -> Generator[Progress, None, FitResult]:
        compared = self._largest()
        images = len(self.setup.examples.pairs)
        count = images if self.setup.options.batch_size is None else sum(map(_images, self.setup.examples.pairs))
        total = images + count
        table, scale = yield from _moved(self._choose(compared), 0, total)
        size = table.best
        fitting, _ = self._fit(size)
        result = yield from _moved(fitting.steps(), images, total)
        squares = scale * table.squares if self.setup.options.criterion.mean else table.squares
        offset = offset_of(self.problems[0], size)
        return replace(
            result,
            message=f"{result.message}; {self._sentence(table, size, offset)}",
            kernel_sizes=torch.from_numpy(table.sizes).to(fitting.device),
            kernel_sizes_bic=torch.from_numpy(table.criteria).to(fitting.device),
            kernel_sizes_loss=torch.from_numpy(squares).to(fitting.device),
            kernel_offset=offset,
        )

    def _setup(self, size: Pair) -> Setup:
        start = self.setup.start
        return replace(self.setup, start=replace(start, kernel_shape=(*start.kernel_shape[:2], *size)))

    def _fit(self, size: Pair) -> tuple[Fitting, Way]:
        setup = self._setup(size)
        inner = [inner_problem(problem, size) for problem in self.problems]
        return setup.fit(inner, [inner_problem(problem, size) for problem in self.held_out_problems])

    def _largest(self) -> Fitting:
        """Return the least squares fit of the largest size, by normal equations of all examples together."""
        options = _least_squares(self.setup.options)
        setup = replace(self._setup(self.frame.largest), options=options, held_out=None)
        inner = [inner_problem(problem, self.frame.largest) for problem in self.problems]
        fitting, _ = setup.fit(inner, [])
        return replace(fitting, method="normal equations")

    def _choose(self, compared: Fitting) -> Generator[Progress, None, tuple[SizeTable, float]]:
        """Compare the sizes; return also 1 divided by the sum of the weights."""
        choice = choose_units([passage.example for passage in compared.passages])
        units = yield from _with_readings(choice, 0, len(compared.passages))
        analysis, targets = yield from replace(compared, units=units).analyse()
        if analysis is None:
            raise InvalidNumbers(TOO_LARGE_TO_SQUARE, field="target", limit="values whose squares are finite")
        comparison = compare_sizes(analysis, targets, compared.layout, self.frame.sizes)
        table = yield from _with_readings(comparison, len(compared.passages), len(compared.passages))
        shift = 2 * units.target * math.log(2) * float(targets.counted.sum())
        squares = np.ldexp(table.squares, 2 * units.target)
        return SizeTable(table.sizes, squares, table.criteria + shift), 1 / targets.weight

    def _sentence(self, table: SizeTable, size: Pair, offset: Pair) -> str:
        rows, columns = table.sizes.max(0).tolist()
        count = len(table.sizes)
        said = f"kernel_size {sized(size)} has the smallest BIC of {count} size{'' if count == 1 else 's'} up to "
        said += sized((rows, columns))
        if not any(self.problems[0].padding) and any(offset):
            cropped = f"{offset[0]} row{'' if offset[0] == 1 else 's'} and {offset[1]} column"
            said += f", the input was cropped by {cropped}{'' if offset[1] == 1 else 's'} on each side"
        if self.frame.open and (size[0] == rows or size[1] == columns):
            said += "; larger ones may be better (max_kernel_size)"
        return said


def _least_squares(options: Options) -> Options:
    return replace(
        options,
        solver="exact",
        loss="sum",
        learning_rate=0.03,
        tolerance=None,
        ridge=0.0,
        momentum=None,
        betas=None,
        batch_size=None,
        refuse_divergence=False,
        constraints=UNCONSTRAINED,
        ridge_path=False,
        covariance=False,
    )


def _images(example: Example) -> int:
    return len(example.images)


def _moved(steps: Generator[Progress, None, Value], done_before: int, total: int) -> Generator[Progress, None, Value]:
    """Count readings on from those before, of a total of both phases."""
    while True:
        try:
            event = next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
        yield Reading(done_before + event.done, total) if isinstance(event, Reading) else event


def _with_readings(steps: Steps[Value], done: int, count: int) -> Generator[Progress, None, Value]:
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
        yield Reading(done, count)
