"""Minimum of the Huber loss by reweighted least squares, and the choice of its delta."""

from collections.abc import Generator
from dataclasses import dataclass, fields, replace

import numpy as np

from core.fit.diagnostics import Analysis
from core.fit.equations.target_statistics import TargetStatistics, compute_target_statistics
from core.fit.example_analysis import analyse_examples
from core.fit.examples import require_finite
from core.fit.fit_run import FitRun
from core.fit.gradient_descent.validation_set import ValidationResult
from core.fit.interruption import Interruptible
from core.fit.losses import LOSSES, huber
from core.fit.messages import describe_analysis_rank, describe_robust
from core.fit.objective import Objective
from core.fit.options import Options
from core.fit.parameters import Unknowns, repack
from core.fit.result import FitResult, Forecast, Progress, Uncertainty
from core.fit.result_builder import build_result, make_uncertainty
from core.fit.robust.irls import ResidualStatistics, ReweightedLeastSquares
from core.fit.scaling import choose_scaling


@dataclass(frozen=True, slots=True)
class RobustStart:
    """Least squares fit of the examples, from which reweighted least squares start.

    run: the fit of all examples at once, scaled. analysis: that of the least squares, None if squares are too large for
    float64. initialization: the unknowns of `problem` at which it starts.
    """

    run: FitRun
    targets: TargetStatistics
    analysis: Analysis | None
    problem: ReweightedLeastSquares
    initialization: Unknowns


def solve_least_squares_first(run: FitRun) -> Generator[Progress, None, RobustStart]:
    """Scale and analyse the examples, and minimise the sum of squares."""
    count, examples = run.term_count, run.examples
    scaling = yield from run.with_progress(choose_scaling(examples), 0)
    whole = replace(
        run,
        options=replace(run.options, batch_size=None),
        tiled_examples=[tiled_example.merged for tiled_example in run.tiled_examples],
        scaling=scaling,
    )
    targets = yield from run.with_progress(compute_target_statistics(examples, run.device, scaling), 0)
    ridge = whole.resolve_scaled_ridge(None)
    squares = replace(whole.build_terms(targets)[0], criterion=LOSSES["mean"])
    initialization = run.layout.zeros
    # Half a mean of squares plus the ridge penalty has the same minimum as the mean plus twice the penalty.
    objective = Objective([squares], run.layout, mean=True, ridge=2 * ridge)
    analysis = yield from analyse_examples(whole, objective, [squares])
    if analysis is None:
        yield from run.with_progress(require_finite(examples), count)
    else:
        initialization = analysis.minimum.at
    problem = yield from run.with_progress(ReweightedLeastSquares.of(squares, ridge, analysis), count)
    return RobustStart(whole, targets, analysis, problem, repack(initialization, run.layout, problem.layout))


def choose_huber_delta(run: FitRun, start: RobustStart) -> Generator[Progress, None, tuple[RobustStart, float, str]]:
    """Choose huber_delta; return also the start with the kernel found for it, and the choice's kind."""
    chosen = yield from run.with_progress(start.problem.choose_delta(start.initialization), run.term_count)
    delta = float(np.ldexp(chosen.value, start.run.scaling.target))
    if chosen.kind == "no target":
        delta = chosen.value
    return replace(start, initialization=chosen.at), delta, chosen.kind


def minimise_huber(start: RobustStart, options: Options) -> Generator[Progress, None, FitResult]:
    """Minimise the Huber loss by reweighted least squares."""
    run, problem, analysis = (
        replace(start.run, options=replace(options, batch_size=None)),
        start.problem,
        start.analysis,
    )
    options, scaling, count = run.options, run.scaling, run.term_count
    rank_note = describe_analysis_rank(analysis, run.layout.unknowns)
    forecast = Forecast(
        rank=None if analysis is None else analysis.rank,
        unknowns=run.layout.unknowns,
        message="; ".join(filter(None, ["the Huber loss is minimised by reweighted least squares", rank_note])),
    )
    yield forecast
    delta = float(np.ldexp(options.delta, -scaling.target))
    found = yield from run.with_progress(problem.minimize(start.initialization, delta, options.tolerance), count)
    residual_statistics = yield from run.with_progress(
        problem.residual_statistics(found.descent.unknowns, delta), count
    )
    at = repack(found.descent.unknowns, problem.layout, run.layout)
    descent, terms = replace(found.descent, unknowns=at), run.build_terms(start.targets)
    scaled = replace(terms[0], criterion=huber(delta))
    curve = yield from run.with_progress(run.make_validation_curve(scaled, None), count)
    if curve is not None:
        loss = yield from run.with_progress(curve.add(at), count)
        descent = replace(descent, validation_result=ValidationResult(None, loss, None, descent.final_loss))
    result = yield from build_result(run, descent, start.targets, terms, None, forecast, None)
    uncertainty = Uncertainty()
    if analysis is not None and found.best and not options.ridge:
        uncertainty = yield from run.with_progress(
            _estimate_robust_uncertainty(run, at, residual_statistics, analysis), count
        )
    descent = replace(descent, final_loss=result.final_loss)
    outlier_fraction = 1 - float(residual_statistics.inside.sum() / residual_statistics.value_counts.sum())
    notes = _collect_notes(rank_note, forecast, result)
    message = describe_robust(descent, options.delta, outlier_fraction, result.r_squared, notes, best=found.best)
    return replace(
        result,
        **{field.name: getattr(uncertainty, field.name) for field in fields(Uncertainty)},
        best_possible_loss=result.final_loss if found.best else None,
        excess_loss=0.0 if found.best else None,
        message=message,
    )


def _collect_notes(rank_note: str | None, forecast: Forecast, result: FitResult) -> list[str]:
    notes = [] if rank_note is None else [rank_note]
    if rank_note is not None and forecast.rank:
        notes.append("this solution has no component along them")
    if result.validation_loss is not None:
        notes.append(f"validation loss {result.validation_loss:.6g}")
    return notes


def _estimate_robust_uncertainty(
    run: FitRun, at: Unknowns, residual_statistics: ResidualStatistics, analysis: Analysis
) -> Interruptible[Uncertainty]:
    """Return standard errors and intervals of the kernel with the least Huber loss."""
    layout = run.layout
    variances = residual_statistics.variances(layout.size)
    if variances is None or analysis.spectrum.ranks.min() != layout.size:
        return Uncertainty()
    scale, variances = 2 * analysis.objective.scale, variances.reshape(layout.blocks, layout.columns)
    diagonals = np.maximum(scale * (yield from analysis.spectrum.diagonals()), 0)
    covariances = None
    if run.options.covariance:
        inverses = scale * (yield from analysis.spectrum.inverses())
        covariances = variances[:, :, None, None] * inverses[:, None]
    errors = np.sqrt(diagonals[:, :, None] * variances[:, None, :])
    degrees_of_freedom = (residual_statistics.value_counts - layout.size).reshape(layout.blocks, layout.columns)
    return make_uncertainty(run, at, errors, degrees_of_freedom, covariances, is_biased=False)
