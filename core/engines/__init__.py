"""The table of engines.

An engine is a module with the members of `Engine`. To add one, write its file and its line in ENGINES.
"""

from collections.abc import Mapping
from typing import Protocol

from core.arrays import ConvolveFn
from core.engines import (
    block_fft,
    column_fft,
    padded_stencil,
    separable,
    stencil,
    torch_conv,
    torch_fft,
)
from core.engines.layers import implicit_gemm, packed_gemm, winograd
from core.machine import Machine
from core.problem import Problem, SliceUnits


class Engine(Protocol):
    """One algorithm for 2-D cross-correlation."""

    METHOD: str
    """The family of algorithms: direct, winograd, fft or separable."""

    def unsupported_reason(self, problem: Problem, /) -> str | None:
        """Return the reason why the engine cannot compute the problem, or None."""

    def seconds(self, problem: Problem, machine: Machine, /) -> float:
        """Return the predicted time, in seconds."""

    def operations(self, problem: Problem, machine: Machine, /) -> float:
        """Return the number of multiplications and additions."""

    def temporary_bytes(self, problem: Problem, machine: Machine, /) -> int:
        """Return the largest memory in addition to input, weight and output, for any values."""

    def slice_units(self, problem: Problem, machine: Machine, /) -> SliceUnits:
        """Return the axes along which slices of the problem take no longer together than the whole."""

    def plan(self, problem: Problem, machine: Machine, /) -> ConvolveFn:
        """Return a function that computes the problem. It is cached and called by several threads at a time."""

    def warm_up(self) -> None:
        """Compile what most first runs need, so that a service does it before its first request."""


ENGINES: Mapping[str, Engine] = {
    "stencil": stencil,
    "padded_stencil": padded_stencil,
    "implicit_gemm": implicit_gemm,
    "packed_gemm": packed_gemm,
    "winograd": winograd,
    "torch": torch_conv,
    "separable": separable,
    "column_fft": column_fft,
    "block_fft": block_fft,
    "torch_fft": torch_fft,
}

ALL_ENGINES = tuple(ENGINES)

WEIGHT_PREPARING_ENGINES = frozenset({"packed_gemm", "winograd"})
"""Engines that also accept a PreparedWeight, and keep a form of it there."""

CALLING_THREAD_ENGINES = frozenset(ENGINES) - {"torch", "torch_fft"}
"""Engines that compute a small problem in the calling thread; torch's wait for the threads of a pool."""
