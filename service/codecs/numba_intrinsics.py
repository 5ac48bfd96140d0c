"""Decorators for functions compiled by Numba, and 64-bit instructions that Python does not provide."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def njit_cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is first called, to run without the GIL; cache it on disk if possible.

    The cache is invalidated only by changes in the function's own file: after a change in this module, remove
    service/codecs/__pycache__.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # a read-only installation: compilation takes seconds at every start
        return njit(nogil=True)(function)


njit_inline = njit(nogil=True, forceinline=True)
"""Decorator for small functions that compiled ones call for every number: a call would take as long as they do."""


@intrinsic
def load_uint64(context: Any, text: Any, at: Any) -> Any:
    """Return text[at : at + 8] as a little-endian integer."""

    def load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(text)(context, builder, value=arguments[0]).data  # type: ignore[no-untyped-call]
        pointer = builder.gep(data, [arguments[1]])
        word = builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(text, types.int64), load


@intrinsic
def multiply_high(context: Any, first: Any, second: Any) -> Any:
    """Return the high 64 bits of the product."""

    def multiply(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(factor, wide) for factor in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), multiply


@intrinsic
def count_leading_zeros(context: Any, word: Any) -> Any:
    """Return the number of leading zero bits of a nonzero word."""

    def count(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), count


@intrinsic
def count_trailing_zeros(context: Any, word: Any) -> Any:
    """Return the number of trailing zero bits of a nonzero word."""

    def count(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), count


@intrinsic
def bits_to_float(context: Any, bits: Any) -> Any:
    """Return the float64 with these bits."""

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.uint64), cast


@intrinsic
def float_to_bits(context: Any, number: Any) -> Any:
    """Return the bits of a float64."""

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), cast
