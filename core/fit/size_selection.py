"""Selection of the kernel's size by the Bayesian information criterion (BIC).

All candidates are centred in the largest kernel and are compared on the same target values, so that the equations (or
the triangular factor) of the largest kernel contain those of all others.
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
from core.fit.constraints import UNCONSTRAINED
from core.fit.diagnostics import Analysis
from core.fit.eigen import FactorSpectrum
from core.fit.examples import Example, Examples, Layer
from core.fit.fit_run import FitRun
from core.fit.fit_spec import FitSpec
from core.fit.interruption import Interruptible, suppress_overflow_warnings
from core.fit.messages import OVERFLOW_MESSAGE
from core.fit.objective import FactoredQuadraticTerm
from core.fit.options import Options
from core.fit.parameters import ParameterLayout
from core.fit.result import FitResult, Progress, Reading
from core.fit.scaling import choose_scaling
from core.fit.strategy import CHOLESKY_S_PER_CUBE, DECOMPOSITION_OVERHEAD_S, Strategy, predict_equations_cost
from core.fit.target_statistics import TargetStatistics
from core.fit.tsqr import MAX_FACTORED_UNKNOWNS
from core.problem import Problem
from core.shapes import Pair
from core.validation import format_shape, parse_conv2d_padding, require_positive_pair

DEFAULT_MAX_KERNEL_SIZE = 13
"""Rows and columns of the largest candidate if neither the shapes nor max_kernel_size determine them."""

MIN_VALUES_PER_UNKNOWN = 2
"""Minimum target values of a filter for each unknown: with fewer, a kernel fits noise and the BIC is invalid."""

RESIDUAL_ROUNDING_RATIO = 1e3 * float(np.finfo(np.float64).eps)
"""Norm of residuals, relative to the numbers they are summed from, up to which they are rounding errors."""

ENTRY_UPDATE_S = 2e-9
"""Measured seconds to move and sum one entry of the equations."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Range of the candidates' sizes.

    outer: size of a kernel that maps the uncropped inputs to the targets. largest: the largest candidate, centred in
    it. open: a larger candidate could be requested.
    """

    outer: Pair
    largest: Pair
    open: bool

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the candidates: those that can be centred in the largest."""
        rows, columns = (list(range(2 - side % 2, side + 1, 2)) for side in self.largest)
        return rows, columns


def require_size_selection(options: Options, *, initial_kernel: bool) -> None:
    """Raise InvalidOption for options that cannot be combined with kernel_size "auto"."""
    if not options.criterion.is_quadratic:
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


def find_size_range(
    examples: Examples, layer: Layer, max_kernel_size: int | Sequence[int] | None, *, depth: int, bias: bool
) -> SizeRange:
    """Return the range of the candidates' sizes. Raises InvalidShape and InvalidOption if no size fits."""
    requested = None if max_kernel_size is None else require_positive_pair("max_kernel_size", max_kernel_size)
    if layer.padding == "same":
        for example in examples.pairs:
            _require_same_size(example, layer)
        outer = requested or _choose_default_size(examples, depth)
        size_range = SizeRange(outer, outer, open=True)
    else:
        low, high = _find_possible_sizes(examples, layer)
        rows, columns = (
            _choose_outer_side(low[axis], high[axis], requested[axis] if requested else None) for axis in (0, 1)
        )
        outer = largest = rows, columns
        if requested is not None:
            largest = (
                _choose_largest_side("rows", outer[0], requested, 0, high),
                _choose_largest_side("columns", outer[1], requested, 1, high),
            )
        size_range = SizeRange(outer, largest, open=largest != outer)
    _require_few_unknowns(size_range, depth, bias=bias, given=requested is not None)
    _require_values(size_range, sum(example.targets[:, 0].numel() for example in examples.pairs), depth, bias=bias)
    return size_range


def _choose_default_size(examples: Examples, depth: int) -> Pair:
    """Return the default largest size: odd, within the images, and with at most MAX_FACTORED_UNKNOWNS unknowns."""
    rows, columns = (
        min(DEFAULT_MAX_KERNEL_SIZE, *((side - 1) // 2 * 2 + 1 for side in sides))
        for sides in ([example.images.shape[axis] for example in examples.pairs] for axis in (2, 3))
    )
    while depth * rows * columns >= MAX_FACTORED_UNKNOWNS and max(rows, columns) > 1:
        rows, columns = max(rows - 2, 1), max(columns - 2, 1)
    return rows, columns


def _require_same_size(example: Example, layer: Layer) -> None:
    """Raise InvalidShape unless the target has the output size of padding "same"."""
    steps = require_positive_pair("stride", layer.stride)
    expected = tuple(-(-side // step) for side, step in zip(example.images.shape[2:], steps, strict=True))
    if tuple(example.targets.shape[2:]) != expected:
        raise InvalidShape(
            f"{example.raw.name('target')} is {format_shape(example.targets.shape[2:])} in rows and columns: padding "
            f'"same" makes {format_shape(expected)} out of {example.raw.name("input")} '
            f"{format_shape(example.images.shape[2:])}",
            field=example.raw.name("target"),
            got=format_shape(example.targets.shape[2:]),
            limit=format_shape(expected),
        )


def _find_possible_sizes(examples: Examples, layer: Layer) -> tuple[Pair, Pair]:
    """Return the smallest and the largest kernel size that maps every input's size to that of its target."""
    stride, dilation = require_positive_pair("stride", layer.stride), require_positive_pair("dilation", layer.dilation)
    low, high = [1, 1], [0, 0]
    for index, example in enumerate(examples.pairs):
        size = example.images.shape[2], example.images.shape[3]
        sides = parse_conv2d_padding(layer.padding, size, (1, 1), stride, dilation)
        for axis in (0, 1):
            padded, outputs = size[axis] + sum(sides[2 * axis : 2 * axis + 2]), example.targets.shape[2 + axis]
            # The number of outputs is one more than the number of strides that fit in addition to the dilated kernel.
            most = (padded - 1 - (outputs - 1) * stride[axis]) // dilation[axis] + 1
            least = -((outputs * stride[axis] - padded) // dilation[axis]) + 1
            low[axis] = max(low[axis], least)
            high[axis] = min(high[axis], most) if index else most
        if low[0] > high[0] or low[1] > high[1]:
            target, others = example.targets.shape[2:], " and the other targets" if index else ""
            raise InvalidShape(
                f"no kernel makes {example.raw.name('target')} {format_shape(target)}{others} out of "
                f"{example.raw.name('input')} {format_shape(size)} with this stride, padding and dilation: "
                "change padding, or crop the target",
                field=example.raw.name("target"),
                got=format_shape(target),
                limit=f"at most {format_shape(size)} without padding",
            )
    return (low[0], low[1]), (high[0], high[1])


def _choose_outer_side(low: int, high: int, requested: int | None) -> int:
    """Return the side, from low to high, of the kernel in which the candidates are centred."""
    if requested is None:
        return high if high % 2 or high == low else high - 1
    if requested >= low:
        return min(requested, high)
    return low if (low - requested) % 2 == 0 or low == high else low + 1


def _choose_largest_side(name: str, outer: int, requested: Pair, axis: int, high: Pair) -> int:
    """Return the side of the largest candidate, at most the requested one. Raises InvalidOption if there is none."""
    if requested[axis] > high[axis]:
        raise InvalidOption(
            f"max_kernel_size {format_shape(requested)} has more {name} than any kernel that makes these targets, "
            f"{high[axis]}: give a smaller one, or change padding",
            field="max_kernel_size",
            got=format_shape(requested),
            limit=f"at most {format_shape(high)}",
        )
    side = requested[axis] - (outer - requested[axis]) % 2
    if side < 1:
        raise InvalidOption(
            f"max_kernel_size {format_shape(requested)}: these targets need an even number of {name}, at least 2",
            field="max_kernel_size",
            got=format_shape(requested),
            limit=f"at least 2 {name}",
        )
    return side


def _require_few_unknowns(size_range: SizeRange, depth: int, *, bias: bool, given: bool) -> None:
    unknowns = depth * math.prod(size_range.largest) + bias
    if unknowns > MAX_FACTORED_UNKNOWNS:
        raise InvalidOption(
            f"sizes up to {format_shape(size_range.largest)} have up to {unknowns} unknowns a filter; at most "
            f"{MAX_FACTORED_UNKNOWNS} are compared: give a smaller max_kernel_size, or the kernel_size",
            field="max_kernel_size" if given else "kernel_size",
            got=format_shape(size_range.largest),
            limit=f"{MAX_FACTORED_UNKNOWNS} unknowns a filter",
        )


def _require_values(size_range: SizeRange, values: int, depth: int, *, bias: bool) -> None:
    """Raise InvalidShape unless the smallest candidate has enough values for its unknowns."""
    rows, columns = size_range.sizes
    unknowns = depth * rows[0] * columns[0] + bias
    if values < MIN_VALUES_PER_UNKNOWN * unknowns:
        raise InvalidShape(
            f'kernel_size "auto" needs at least {MIN_VALUES_PER_UNKNOWN} target values of weight above 0 for each '
            f"unknown: {values} values a filter for {unknowns} unknowns of size {format_shape((rows[0], columns[0]))}; "
            "give more examples, or the kernel_size",
            field="kernel_size",
            got=f"{values} values",
            limit=f"at least {MIN_VALUES_PER_UNKNOWN * unknowns} values",
        )


def shrink_kernel(problem: Problem, size: Pair) -> Problem:
    """Return the convolution by a smaller kernel, centred in the problem's, with the same output positions.

    The kernel's offset is subtracted from the padding; negative padding crops the images.
    """
    down, across = compute_kernel_offset(problem, size)
    top, bottom, left, right = problem.padding
    padding = top - down, bottom - down, left - across, right - across
    return replace(problem, kernel_height=size[0], kernel_width=size[1], padding=padding)


def compute_kernel_offset(problem: Problem, size: Pair) -> Pair:
    """Return the pixels by which the windows of a centred kernel begin after those of the problem's kernel."""
    rows, columns = (problem.kernel_height - size[0]) // 2, (problem.kernel_width - size[1]) // 2
    return rows * problem.dilation[0], columns * problem.dilation[1]


@dataclass(frozen=True, slots=True)
class SizeTable:
    """Candidates: sizes (n, 2), smallest residual sums of squares (n) and BIC (n)."""

    sizes: NDArray[np.int64]
    squares: NDArray[np.float64]
    bic: NDArray[np.float64]

    @property
    def best(self) -> Pair:
        """The size with the smallest BIC."""
        rows, columns = self.sizes[int(self.bic.argmin())].tolist()
        return rows, columns


def compare_sizes(
    analysis: Analysis, targets: TargetStatistics, layout: ParameterLayout, sizes: tuple[Sequence[int], Sequence[int]]
) -> Interruptible[SizeTable]:
    """Compute the BIC of kernels of these rows and columns, centred in the analysed one.

    BIC = N ln(RSS / N) + k ln N for N target values of weight above 0 and k unknowns of all filters. Residual sums of
    squares below rounding errors count as equal, so that the smallest size that explains the target is the best. Sizes
    with fewer than MIN_VALUES_PER_UNKNOWN values for each unknown are excluded. Raises InvalidShape if all are.
    """
    squares, rounding = yield from _compute_residual_squares(analysis, layout, sizes)
    table = np.array([(rows, columns) for rows in sizes[0] for columns in sizes[1]])
    depth = layout.kernel_shape[1]
    unknowns = depth * table[:, 0] * table[:, 1] + layout.bias
    value_counts = targets.value_counts[targets.value_counts > 0]
    enough = MIN_VALUES_PER_UNKNOWN * unknowns <= value_counts.min()
    if not enough.any():
        _require_values(
            SizeRange((1, 1), (sizes[0][0], sizes[1][0]), open=False), int(value_counts.min()), depth, bias=layout.bias
        )
    table, squares, unknowns = table[enough], squares.ravel()[enough], unknowns[enough]
    floor = max(RESIDUAL_ROUNDING_RATIO**2 * max(rounding, targets.squares), float(np.finfo(np.float64).tiny))
    values = float(value_counts.sum())
    fitted_to = values * np.log(np.maximum(squares, floor) / values)
    return SizeTable(table, squares, fitted_to + layout.kernel_shape[0] * unknowns * np.log(values))


def _compute_residual_squares(
    analysis: Analysis, layout: ParameterLayout, sizes: tuple[Sequence[int], Sequence[int]]
) -> Interruptible[tuple[NDArray[np.float64], float]]:
    """Return the smallest residual sum of squares of each size (rows, columns), and that of the summed numbers."""
    (term,), spectrum = analysis.objective.terms, analysis.spectrum
    at = analysis.minimum.at
    threshold = float(np.max(spectrum.threshold)) if isinstance(spectrum, FactorSpectrum) else 0.0
    squares, rounding = np.zeros((len(sizes[0]), len(sizes[1]))), 0.0
    if isinstance(term, FactoredQuadraticTerm):
        squares += float(term.rest.sum())
        rounding = float(np.square(np.abs(term.factor) @ np.abs(at)).sum())
        right = term.factor @ at - term.residual
        deficient = bool((spectrum.ranks < layout.size).any())
    else:
        squares += analysis.minimum.loss
        deficient = False
    for block in range(layout.blocks):
        for row, height in enumerate(sizes[0]):
            order, ends = _order_unknowns_by_width(layout, height, sizes[1])
            if not isinstance(term, FactoredQuadraticTerm):
                root = np.linalg.cholesky(analysis.gram[block][np.ix_(order, order)]).T
                # Additional residuals of a smaller kernel, from the unknowns that it does not have.
                left = root @ at[block][order]
                if not row:
                    rounding += float(np.square(np.abs(root) @ np.abs(at[block][order])).sum())
            elif deficient:
                for column, end in enumerate(ends):
                    squares[row, column] += _compute_deficient_residual(
                        term.factor[block][:, order[:end]], right[block], threshold
                    )
                    yield
                continue
            else:
                left = _multiply_by_q_transpose(term.factor[block][:, order], right[block])
            after = np.append(np.cumsum(np.square(left).sum(1)[::-1])[::-1], 0.0)
            squares[row] += after[ends]
            yield
    return squares, rounding


def _order_unknowns_by_width(
    layout: ParameterLayout, height: int, widths: Sequence[int]
) -> tuple[NDArray[np.intp], list[int]]:
    """Order unknowns so that those of each width, for kernels of that height, precede those of larger widths.

    Returns the order, and the number of unknowns of each width.
    """
    _, depth, rows, columns = layout.kernel_shape
    rank = np.full((depth, rows, columns), len(widths))
    top = (rows - height) // 2
    for index in range(len(widths) - 1, -1, -1):
        first = (columns - widths[index]) // 2
        rank[:, top : top + height, first : first + widths[index]] = index
    ranks = np.append(rank.ravel(), [-1] * layout.bias)
    return np.argsort(ranks, kind="stable"), [depth * height * width + layout.bias for width in widths]


def _multiply_by_q_transpose(factor: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Q'right for the QR factorization of a factor."""
    reflectors, scales = torch.geqrf(torch.from_numpy(factor))
    rotated: NDArray[np.float64] = torch.ormqr(reflectors, scales, torch.from_numpy(right), transpose=True).numpy()
    return rotated


def _compute_deficient_residual(factor: NDArray[np.float64], right: NDArray[np.float64], threshold: float) -> float:
    """Return the residual sum of squares of the right side after a fit of linearly dependent columns.

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
    """A fit whose kernel size is selected first; problems and held_out_problems are those of the outer size."""

    fit_spec: FitSpec
    size_range: SizeRange
    problems: Sequence[Problem]
    held_out_problems: Sequence[Problem]

    def plan(self) -> Strategy:
        """Predict the cost of reading, of the comparison, and of a fit of the largest size."""
        fit_run, largest = self._plan_size(self.size_range.largest)
        options = _make_least_squares_options(self.fit_spec.options)
        comparison_run = self._plan_comparison()
        reading = predict_equations_cost(comparison_run.tiled_examples, fit_run.layout, options, self.fit_spec.machine)
        cube = fit_run.layout.blocks * len(self.size_range.sizes[0]) * fit_run.layout.size**3
        square = cube / fit_run.layout.size
        seconds = (
            CHOLESKY_S_PER_CUBE * cube
            + 4 * ENTRY_UPDATE_S * square
            + DECOMPOSITION_OVERHEAD_S * len(self.size_range.sizes[0]) * fit_run.layout.blocks
        )
        copies = 8e-6 * 4 * fit_run.layout.size**2
        return Strategy(
            largest.method,
            largest.seconds + reading.seconds + seconds,
            largest.gflop + reading.gflop + (cube / 3 + 4 * square) / 1e9,
            max(largest.megabytes, reading.megabytes + copies),
        )

    def steps(self) -> Generator[Progress, None, FitResult]:
        """Read the examples for the largest size, choose one, and fit it."""
        return suppress_overflow_warnings(self._steps())

    def _steps(self) -> Generator[Progress, None, FitResult]:
        comparison_run = self._plan_comparison()
        images = len(self.fit_spec.examples.pairs)
        count = (
            images
            if self.fit_spec.options.batch_size is None
            else sum(map(_count_images, self.fit_spec.examples.pairs))
        )
        total = images + count
        table, scale = yield from _shift_readings(self._choose(comparison_run), 0, total)
        size = table.best
        fit_run, _ = self._plan_size(size)
        result = yield from _shift_readings(fit_run.steps(), images, total)
        squares = scale * table.squares if self.fit_spec.options.criterion.mean else table.squares
        offset = compute_kernel_offset(self.problems[0], size)
        return replace(
            result,
            message=f"{result.message}; {self._describe_choice(table, size, offset)}",
            kernel_sizes=torch.from_numpy(table.sizes).to(fit_run.device),
            kernel_sizes_bic=torch.from_numpy(table.bic).to(fit_run.device),
            kernel_sizes_loss=torch.from_numpy(squares).to(fit_run.device),
            kernel_offset=offset,
        )

    def _spec_of_size(self, size: Pair) -> FitSpec:
        initialization = self.fit_spec.initialization
        return replace(
            self.fit_spec,
            initialization=replace(initialization, kernel_shape=(*initialization.kernel_shape[:2], *size)),
        )

    def _plan_size(self, size: Pair) -> tuple[FitRun, Strategy]:
        fit_spec = self._spec_of_size(size)
        inner = [shrink_kernel(problem, size) for problem in self.problems]
        return fit_spec.fit(inner, [shrink_kernel(problem, size) for problem in self.held_out_problems])

    def _plan_comparison(self) -> FitRun:
        """Return the least squares fit of the largest size, by normal equations of all examples."""
        options = _make_least_squares_options(self.fit_spec.options)
        fit_spec = replace(self._spec_of_size(self.size_range.largest), options=options, held_out=None)
        inner = [shrink_kernel(problem, self.size_range.largest) for problem in self.problems]
        fit_run, _ = fit_spec.fit(inner, [])
        return replace(fit_run, method="normal equations")

    def _choose(self, comparison_run: FitRun) -> Generator[Progress, None, tuple[SizeTable, float]]:
        """Compare the sizes; return also 1 divided by the sum of the weights."""
        choice = choose_scaling([tiled_example.example for tiled_example in comparison_run.tiled_examples])
        scaling = yield from _report_readings(choice, 0, len(comparison_run.tiled_examples))
        analysis, targets = yield from replace(comparison_run, scaling=scaling).analyse_least_squares()
        if analysis is None:
            raise InvalidNumbers(OVERFLOW_MESSAGE, field="target", limit="values whose squares are finite")
        comparison = compare_sizes(analysis, targets, comparison_run.layout, self.size_range.sizes)
        table = yield from _report_readings(
            comparison, len(comparison_run.tiled_examples), len(comparison_run.tiled_examples)
        )
        shift = 2 * scaling.target * math.log(2) * float(targets.value_counts.sum())
        squares = np.ldexp(table.squares, 2 * scaling.target)
        return SizeTable(table.sizes, squares, table.bic + shift), 1 / targets.weight

    def _describe_choice(self, table: SizeTable, size: Pair, offset: Pair) -> str:
        rows, columns = table.sizes.max(0).tolist()
        count = len(table.sizes)
        summary = (
            f"kernel_size {format_shape(size)} has the smallest BIC of {count} size{'' if count == 1 else 's'} up to "
        )
        summary += format_shape((rows, columns))
        if not any(self.problems[0].padding) and any(offset):
            cropped = f"{offset[0]} row{'' if offset[0] == 1 else 's'} and {offset[1]} column"
            summary += f", the input was cropped by {cropped}{'' if offset[1] == 1 else 's'} on each side"
        if self.size_range.open and (size[0] == rows or size[1] == columns):
            summary += "; larger ones may be better (max_kernel_size)"
        return summary


def _make_least_squares_options(options: Options) -> Options:
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


def _count_images(example: Example) -> int:
    return len(example.images)


def _shift_readings(
    steps: Generator[Progress, None, Value], done_before: int, total: int
) -> Generator[Progress, None, Value]:
    """Add the readings of earlier phases to those of these steps; total: readings of all phases."""
    while True:
        try:
            event = next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
        yield Reading(done_before + event.done, total) if isinstance(event, Reading) else event


def _report_readings(steps: Interruptible[Value], done: int, count: int) -> Generator[Progress, None, Value]:
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
        yield Reading(done, count)
