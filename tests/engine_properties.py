"""Properties of engines that decide which problems a test or a benchmark draws for them."""

from dataclasses import replace

from core import ENGINES, Dtype, Problem

PLANE = Problem(batch=1, channels=1, height=64, width=64, filters=1, kernel_height=3, kernel_width=3, rank=1)

AVAILABLE_ENGINES = tuple(name for name, engine in ENGINES.items() if engine.unsupported_reason(PLANE) is None)
"""The engines that this platform supports: without Halide, not those that it compiles."""

AVAILABLE_FFT_ENGINES = tuple(name for name in AVAILABLE_ENGINES if ENGINES[name].METHOD == "fft")


def supports_layers(engine: str) -> bool:
    """Return whether the engine supports several channels and filters."""
    return _supports_like_plane(engine, replace(PLANE, channels=2, filters=2))


def supports_steps(engine: str) -> bool:
    """Return whether the engine supports stride and dilation."""
    return _supports_like_plane(engine, replace(PLANE, stride=(2, 2))) and _supports_like_plane(
        engine, replace(PLANE, dilation=(2, 2))
    )


def supports_kernel_sizes(engine: str) -> bool:
    """Return whether the engine supports kernels of other sizes than 3 x 3."""
    return _supports_like_plane(engine, replace(PLANE, kernel_height=4, kernel_width=5))


def supports_groups(engine: str) -> bool:
    """Return whether the engine supports groups, if it supports layers."""
    return _supports_like_plane(engine, replace(PLANE, channels=2, filters=2, groups=2))


def supports_dtype(engine: str, dtype: Dtype) -> bool:
    """Return whether the engine supports the dtype."""
    return _supports_like_plane(engine, replace(PLANE, dtype=dtype))


def _supports_like_plane(engine: str, problem: Problem) -> bool:
    """Return whether the engine supports the problem if it supports a plane, for which it may need Halide."""
    unsupported_reason = ENGINES[engine].unsupported_reason
    return unsupported_reason(problem) == unsupported_reason(PLANE)
