"""Properties of engines that decide which problems a test or a benchmark draws for them."""

from dataclasses import replace
from typing import Any

from core import ENGINES, Boundary, Dtype, Problem
from core.engines import halide_jit

PLANE = Problem(batch=1, channels=1, height=64, width=64, filters=1, kernel_height=3, kernel_width=3, rank=1)

LAYER = replace(PLANE, channels=16, filters=16, rank=None)

AVAILABLE_ENGINES = tuple(name for name, engine in ENGINES.items() if engine.unsupported_reason(PLANE) is None)
"""The engines for single planes that this platform supports: without Halide, not those that it compiles."""

AVAILABLE_FFT_ENGINES = tuple(name for name in AVAILABLE_ENGINES if ENGINES[name].METHOD == "fft")


def supports_planes(engine: str) -> bool:
    """Return whether the engine supports single planes, if Halide is available."""
    return ENGINES[engine].unsupported_reason(PLANE) in (None, halide_jit.platform_unsupported_reason())


PLANE_ENGINES = tuple(name for name in ENGINES if supports_planes(name))


def supports_layers(engine: str) -> bool:
    """Return whether the engine supports several channels and filters."""
    return not supports_planes(engine) or _supports_like(engine, PLANE, channels=2, filters=2)


def supports_steps(engine: str) -> bool:
    """Return whether the engine supports stride and dilation."""
    return _supports_variant(engine, stride=(2, 2)) and _supports_variant(engine, dilation=(2, 2))


def supports_kernel_sizes(engine: str) -> bool:
    """Return whether the engine supports kernels of other sizes than 3 x 3."""
    return _supports_variant(engine, kernel_height=4, kernel_width=5)


def supports_boundary(engine: str, boundary: Boundary) -> bool:
    """Return whether the engine supports a border with these values."""
    return _supports_variant(engine, padding=(1, 1, 1, 1), boundary=boundary)


def supports_groups(engine: str) -> bool:
    """Return whether the engine supports groups, if it supports layers."""
    return _supports_like(engine, LAYER, groups=2)


def supports_dtype(engine: str, dtype: Dtype) -> bool:
    """Return whether the engine supports the dtype."""
    return _supports_variant(engine, dtype=dtype)


def _supports_variant(engine: str, **changes: Any) -> bool:
    return _supports_like(engine, PLANE if supports_planes(engine) else LAYER, **changes)


def _supports_like(engine: str, problem: Problem, **changes: Any) -> bool:
    """Return whether the engine supports the changed problem if it supports the problem itself."""
    unsupported_reason = ENGINES[engine].unsupported_reason
    return unsupported_reason(replace(problem, **changes)) == unsupported_reason(problem)
