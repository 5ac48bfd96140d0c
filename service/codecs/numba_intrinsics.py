"""Functions compiled by Numba, and what processors do with 64-bit words that Python has no name for."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def njit_cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled when first called, without Python's lock; kept for the next process where that can be.

    What is kept is known by its own file: after a change here, remove service/codecs/__pycache__.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # a read-only installation: three seconds at every start
        return njit(nogil=True)(function)


njit_inline = njit(nogil=True, forceinline=True)
"""For the small functions that a compiled one calls for every number: a call would take as long as they do."""


@intrinsic
def load_uint64(context: Any, text: Any, at: Any) -> Any:
    """text[at : at + 8] as a little-endian integer."""

    def load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(text)(context, builder, value=arguments[0]).data  # type: ignore[no-untyped-call]
        place = builder.gep(data, [arguments[1]])
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(text, types.int64), load


@intrinsic
def multiply_high(context: Any, first: Any, second: Any) -> Any:
    """The high 64 bits of the product."""

    def multiply(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(factor, wide) for factor in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), multiply


@intrinsic
def count_leading_zeros(context: Any, word: Any) -> Any:
    """How many bits of a word that is not 0 are 0 from the top."""

    def count(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), count


@intrinsic
def count_trailing_zeros(context: Any, word: Any) -> Any:
    """How many bits of a word that is not 0 are 0 from the bottom."""

    def count(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), count


@intrinsic
def bits_to_float(context: Any, bits: Any) -> Any:
    """The float64 of these bits."""

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.uint64), cast


@intrinsic
def float_to_bits(context: Any, number: Any) -> Any:
    """The bits of this float64."""

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), cast
