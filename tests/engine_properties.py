"""Properties of engines that decide which problems a test or a benchmark draws for them."""

from dataclasses import replace

from core import ENGINES, Problem

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


def _supports_like_plane(engine: str, problem: Problem) -> bool:
    """Return whether the engine supports the problem if it supports a plane, for which it may need Halide."""
    unsupported_reason = ENGINES[engine].unsupported_reason
    return unsupported_reason(problem) == unsupported_reason(PLANE)
