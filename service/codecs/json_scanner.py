"""Compiled scanner that finds and reads the arrays of a JSON text without a Python object per number or row.

One pass over the bytes finds every list of numbers, checks that it is rectangular, and writes its numbers as float64;
long strings (base64 of an array) are found as well. The rest of the text, a few dozen bytes, is left to a JSON parser.
The code is compiled by Numba and releases the GIL. simdjson is faster, but holds the GIL for the whole body, does not
report positions within an array, and rounds twice to float32: docs/performance.md has the figures.

Digits are read eight at a time (Lemire, "Quickly parsing eight digits", 2018) and rounded to the nearest float64, ties
to even, as in Lemire, "Number parsing at a gigabyte per second" (2021). A number of more than 19 digits that could lie
on either side of the middle between two float64s is compared with that middle in whole numbers of any length (Clinger,
"How to read floating point numbers accurately", 1990).

Numbers that are to become float32 must not be rounded twice, to float64 and then to float32: 16777217.0000000001 is
nearest to 16777218, but the nearest float64 is 16777217, which lies in the middle between two float32 and goes to the
even one, 16777216. Only a "coarse" float64, one with at most 25 significant bits, can lie in such a middle. The reader
notes whether an array has a coarse number that is not exactly what the text says; `round_to_odd` then moves each such
number to the next float64 on the side of the text, whose rounding to float32 (or float16) is right (Boldo and
Melquiond, "When double rounding is odd", 2005).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.codecs.numba_intrinsics import (
    bits_to_float,
    count_leading_zeros,
    count_trailing_zeros,
    float_to_bits,
    load_uint64,
    multiply_high,
    njit_cached,
    njit_inline,
)

MAX_DIMENSIONS: Final = 32

MAX_SHORT_LIST_LENGTH = 64
"""A flat list of up to this many numbers is left to the JSON parser: a stride, a padding, a bias of a few filters."""

MAX_SHORT_INVALID_BYTES = 4096
"""An invalid list of up to this many bytes is left to the JSON parser."""

MIN_DATA_STRING_BYTES = 128
"""A string of at least this many bytes is extracted as well, if it is the value of "data"."""

TOKENS_PER_SPAN = 4
"""Number of tokens that an extracted span counts as: its Python objects cost as much."""

# Results of a scan.
SCAN_DONE, SCAN_FULL, SCAN_MALFORMED = range(3)

# Kinds of spans.
KIND_ARRAY, KIND_STRING, KIND_INVALID = range(3)

# Reasons why a list is not a valid array of numbers.
INVALID_RAGGED, INVALID_NOT_A_NUMBER, INVALID_UNEXPECTED_LIST, INVALID_MISSING_LIST, INVALID_TOO_DEEP = range(5)

# Fields of a scanner's state.
(
    STATE_POSITION,
    STATE_NAME_COUNT,
    STATE_TOKEN_COUNT,
    STATE_SPAN_COUNT,
    STATE_VALUE_COUNT,
    STATE_PHASE,
    STATE_ARRAY_START,
    STATE_FIRST_VALUE,
    STATE_DEPTH,
    STATE_LEAF_DEPTH,
    STATE_HAS_COARSE,
) = range(11)
STATE_FIELD_COUNT = 11

# Phases of the scanner: outside of arrays; in an array, before a value; in an array, after a value.
PHASE_OUTSIDE_ARRAY, PHASE_BEFORE_VALUE, PHASE_AFTER_VALUE = range(3)

# Fields of a span; the last are an array's sides, or the index of an invalid part. CODE is the reason of an invalid
# list; of an array, 1 if it has coarse numbers that differ from the text.
SPAN_KIND, SPAN_BEGIN, SPAN_END, SPAN_OFFSET, SPAN_NDIM, SPAN_CODE, SPAN_GOT, SPAN_EXPECTED, SPAN_SHAPE = range(9)
SPAN_FIELD_COUNT = SPAN_SHAPE + MAX_DIMENSIONS + 1

U64 = np.uint64
U64_ONE = U64(1)
MAX_UINT64_DIGITS = 19
MAX_EXACT_DIGITS = 15
"""Maximum digits of a whole number that is certain to be a float64 number."""

MAX_EXACT_INTEGER = U64(2**53)
MIN_POWER_OF_TEN, MAX_POWER_OF_TEN = -342, 308

COARSE_MASK = U64(2**28 - 1)
"""The bits of a float64 that are zero if it has at most 25 significant bits."""

MAX_NEVER_COARSE_DECIMALS = 12
"""A number of at most 2^53 / 10^q with q decimals, up to 12, that is not a coarse float64 itself is never rounded to
one: relative to it, each differs by at least 1 / 2^53 or 1 / (2^25 5^q), which is more than half a unit."""

MAX_EXPONENT = 10**15
"""Larger exponents are read as this one: no text has so many digits that the difference matters."""

MAX_DECISIVE_DIGITS = 800
"""Digits that are compared exactly; of further ones, it only matters whether they are zeros.

The middle between two float64s has at most 767 digits.
"""

BIGINT_WORDS = 48
"""64-bit words that a whole number of MAX_DECISIVE_DIGITS needs, and a middle scaled to the same power of ten."""


def _compute_powers_of_five() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the 128 leading bits of 5^q, in two halves, as the algorithm needs them.

    Rounded down for q >= 0 and up for -27 <= q < 0, where a product may lie exactly between two float64s.
    """
    high, low = [], []
    for power in range(MIN_POWER_OF_TEN, MAX_POWER_OF_TEN + 1):
        five = 5 ** abs(power)
        bits = five.bit_length()
        if power >= 0:
            leading = five << 128 - bits if bits <= 128 else five >> bits - 128
        elif power >= -27:
            leading = (1 << bits + 127) // five + 1
        else:
            leading = (1 << 2 * bits + 128) // five + 1
            leading >>= leading.bit_length() - 128
        high.append(leading >> 64)
        low.append(leading & 2**64 - 1)
    return np.array(high, np.uint64), np.array(low, np.uint64)


POWERS_OF_FIVE_HIGH, POWERS_OF_FIVE_LOW = _compute_powers_of_five()
FLOAT_POWERS_OF_TEN = np.array([10.0**power for power in range(23)])
INTEGER_POWERS_OF_TEN = np.array([10**power for power in range(MAX_UINT64_DIGITS + 1)], np.uint64)
INTEGER_POWERS_OF_FIVE = np.array([5**power for power in range(28)], np.uint64)

ASCII_ZEROS = U64(0x3030303030303030)
PAST_ASCII_NINE = U64(0x4646464646464646)
BYTE_HIGH_BITS = U64(0x8080808080808080)
BYTE_LOW_BITS = U64(0x0101010101010101)
ASCII_QUOTES = U64(0x2222222222222222)
ASCII_BACKSLASHES = U64(0x5C5C5C5C5C5C5C5C)
ASCII_SPACES = U64(0x2020202020202020)


@njit_cached
def _round_decimal(digits, power):
    """Return the float64 nearest to digits * 10^power (Lemire 2021, sections 5 to 8)."""
    if digits == 0 or power < MIN_POWER_OF_TEN:
        return 0.0
    if power > MAX_POWER_OF_TEN:
        return np.inf
    shift = count_leading_zeros(digits)
    digits <<= shift
    high = multiply_high(digits, POWERS_OF_FIVE_HIGH[power - MIN_POWER_OF_TEN])
    low = digits * POWERS_OF_FIVE_HIGH[power - MIN_POWER_OF_TEN]
    if high & U64(0x1FF) == U64(0x1FF):
        more = multiply_high(digits, POWERS_OF_FIVE_LOW[power - MIN_POWER_OF_TEN])
        low += more
        if low < more:
            high += U64_ONE
    top = high >> U64(63)
    dropped = top + U64(9)
    mantissa = high >> dropped
    # 217706 / 2^16 is log2(10): the power of two below 10^power.
    exponent = (217706 * power >> 16) + 63 + np.int64(top) - np.int64(shift) + 1023
    if exponent <= 0:
        # Subnormal: as many bits fewer.
        if exponent < -62:
            return 0.0
        mantissa >>= U64(1 - exponent)
        mantissa = (mantissa + (mantissa & U64_ONE)) >> U64_ONE
        return bits_to_float(mantissa)
    # Exactly between two float64s: to the even one. Only these powers can be.
    if low <= U64_ONE and -4 <= power <= 23 and mantissa & U64(3) == U64_ONE and mantissa << dropped == high:
        mantissa &= ~U64_ONE
    mantissa = (mantissa + (mantissa & U64_ONE)) >> U64_ONE
    if mantissa >= U64(2**53):
        mantissa >>= U64_ONE
        exponent += 1
    if exponent >= 2047:
        return np.inf
    return bits_to_float((mantissa & U64(2**52 - 1)) | (U64(exponent) << U64(52)))


@njit_cached
def _parse_many_digits(text, at, power):
    """Return the float64 nearest to the number whose first digit is at `at`, of more digits than a word holds.

    The second value is 1 if it is coarse and may differ from the number.
    """
    start = at
    digits = U64(0)
    taken = dropped = 0
    more = False
    while text[at] == 46 or 48 <= text[at] <= 57:
        if text[at] != 46:
            if taken < MAX_UINT64_DIGITS:
                digits = digits * U64(10) + U64(text[at] - 48)
                taken += np.int64(digits > 0)
            else:
                dropped += 1
                more |= text[at] != 48
        at += 1
    lower = _round_decimal(digits, power + dropped)
    if not more:
        return lower, _is_inexact_coarse(digits, power + dropped, lower)
    upper = _round_decimal(digits + U64_ONE, power + dropped)
    nearest = lower
    if lower != upper:
        above = _compare_to_midpoint(text, start, power, float_to_bits(lower))
        if above > 0 or (above == 0 and float_to_bits(lower) & U64_ONE):
            nearest = upper
    return nearest, np.int64(nearest != 0 and float_to_bits(nearest) & COARSE_MASK == 0)


@njit_inline
def _is_inexact_coarse(digits, power, value):
    """Return 1 if value, the float64 nearest to digits * 10^power, is coarse and differs from it, else 0."""
    if float_to_bits(value) & COARSE_MASK != 0:
        return 0
    return _differs(digits, power, float_to_bits(value))


@njit_cached
def _differs(digits, power, bits):
    """Return 1 if digits * 10^power differs from the coarse float64 with these bits, else 0.

    Both are compared as an odd whole number times a power of two. Zero counts as equal: no float32 is nearer.
    """
    if bits == 0:
        return 0
    mantissa, exponent = _split_float(bits)
    shift = count_trailing_zeros(mantissa)
    mantissa >>= shift
    exponent += np.int64(shift)
    shift = count_trailing_zeros(digits)
    digits >>= shift
    if exponent != power + np.int64(shift) or abs(power) >= len(INTEGER_POWERS_OF_FIVE):
        return 1
    if power < 0:
        mantissa, digits = digits, mantissa
    five = INTEGER_POWERS_OF_FIVE[abs(power)]
    return np.int64(multiply_high(digits, five) != 0 or digits * five != mantissa)


@njit_inline
def _split_float(bits):
    """Return the mantissa of a positive float64 as a whole number, and the power of two that it is multiplied by."""
    field = np.int64(bits >> U64(52))
    mantissa = bits & U64(2**52 - 1)
    if field > 0:
        mantissa |= U64(2**52)
    return mantissa, max(field, 1) - 1075


@njit_cached
def _compare_to_midpoint(text, at, power, lower):
    """Return 1 if the number at `at` is above the middle of a float64 and the next one, -1 if it is below, else 0.

    `lower`: the bits of the float64.
    """
    mantissa, exponent = _split_float(lower)
    return _compare_to_binary(text, at, power, U64(2) * mantissa + U64_ONE, exponent - 1)


@njit_cached
def _compare_to_binary(text, at, power, mantissa, exponent):
    """Return 1 if the number at `at` is above mantissa * 2^exponent, -1 if it is below, 0 if they are equal.

    Both sides are multiplied by the same powers of five and of two, which makes them whole numbers.
    """
    number, other = np.zeros((2, BIGINT_WORDS), np.uint64)
    digits = U64(0)
    taken = count = size = 0
    more = False
    while text[at] == 46 or 48 <= text[at] <= 57:
        if text[at] != 46:
            if taken == MAX_DECISIVE_DIGITS:
                power += 1
                more |= text[at] != 48
            else:
                digits = digits * U64(10) + U64(text[at] - 48)
                if taken > 0 or digits > 0:
                    taken += 1
                    count += 1
                if count == MAX_UINT64_DIGITS:
                    size = _multiply_add(number, size, INTEGER_POWERS_OF_TEN[count], digits)
                    digits = U64(0)
                    count = 0
        at += 1
    size = _multiply_add(number, size, INTEGER_POWERS_OF_TEN[count], digits)
    length = _multiply_add(other, 0, U64_ONE, mantissa)
    if power >= 0:
        size = _multiply_by_power_of_five(number, size, power)
    else:
        length = _multiply_by_power_of_five(other, length, -power)
    if exponent >= power:
        length = _shift_left(other, length, exponent - power)
    else:
        size = _shift_left(number, size, power - exponent)
    if size != length:
        return 1 if size > length else -1
    for index in range(size - 1, -1, -1):
        if number[index] != other[index]:
            return 1 if number[index] > other[index] else -1
    return np.int64(more)


@njit_cached
def _multiply_add(number, size, factor, summand):
    """Multiply a whole number of `size` words, the lowest first, in place and add to it; return its new size."""
    for index in range(size):
        low = number[index] * factor
        high = multiply_high(number[index], factor)
        low += summand
        summand = high + U64(low < summand)
        number[index] = low
    if summand > 0:
        number[size] = summand
        size += 1
    return size


@njit_cached
def _multiply_by_power_of_five(number, size, power):
    while power > 0:
        step = min(power, len(INTEGER_POWERS_OF_FIVE) - 1)
        size = _multiply_add(number, size, INTEGER_POWERS_OF_FIVE[step], U64(0))
        power -= step
    return size


@njit_cached
def _shift_left(number, size, bits):
    """Multiply a whole number of `size` words by 2^bits in place; return its new size."""
    words = bits >> 6
    size = _multiply_add(number, size, U64_ONE << U64(bits & 63), U64(0))
    for index in range(size - 1, -1, -1):
        number[index + words] = number[index]
    number[:words] = 0
    return size + words


@njit_inline
def _parse_eight_digits(word):
    """Return the number whose eight digits, 0 to 9, are the bytes of a word, the first digit in the lowest byte."""
    word = word * U64(10) + (word >> U64(8))
    low = (word & U64(0x000000FF000000FF)) * U64(0x000F424000000064)
    high = (word >> U64(16) & U64(0x000000FF000000FF)) * U64(0x0000271000000001)
    return low + high >> U64(32)


@njit_inline
def _parse_digits(text, at, value):
    """Return the end of the digits at `at`, and `value` with them appended."""
    while at + 8 <= len(text):
        characters = load_uint64(text, at)
        word = characters - ASCII_ZEROS
        other = (characters + PAST_ASCII_NINE | word) & BYTE_HIGH_BITS
        if other == 0:
            value = value * U64(100_000_000) + _parse_eight_digits(word)
            at += 8
        else:
            bits = count_trailing_zeros(other) & U64(56)
            if bits > 0:
                count = np.int64(bits >> U64(3))
                value = value * INTEGER_POWERS_OF_TEN[count] + _parse_eight_digits(word << (U64(64) - bits))
                at += count
            return at, value
    while 48 <= text[at] <= 57:
        value = value * U64(10) + U64(text[at] - 48)
        at += 1
    return at, value


@njit_cached
def _count_leading_zero_digits(text, at):
    """Return the number of zeros before the first other digit of the number at `at`."""
    count = 0
    while text[at] == 48 or text[at] == 46:
        count += np.int64(text[at] == 48)
        at += 1
    return count


@njit_inline
def _skip_space(text, at):
    """Return the end of the whitespace at `at`."""
    while text[at] <= 32 and (text[at] == 32 or text[at] == 10 or text[at] == 13 or text[at] == 9):
        at += 1
    return at


@njit_inline
def _parse_number(text, at):
    """Return the end of the number at `at` (-1 if there is none), its value, if that is coarse, and a power of ten.

    The third is 1 if the value is coarse and may differ from the number, else 0. The number is its digits, taken as a
    whole number, times the power.
    """
    negative = text[at] == 45
    at += np.int64(negative)
    first = at
    digits = U64(0)
    if text[at] == 48:
        at += 1
    else:
        at, digits = _parse_digits(text, at, digits)
        if at == first:
            return -1, 0.0, 0, 0
    power = 0
    count = at - first
    if text[at] == 46:
        point = at + 1
        at, digits = _parse_digits(text, point, digits)
        if at == point:
            return -1, 0.0, 0, 0
        power = point - at
        count -= power
    elif count <= MAX_EXACT_DIGITS and text[at] != 101 and text[at] != 69:
        value = np.float64(digits)
        return at, -value if negative else value, 0, 0
    if text[at] == 101 or text[at] == 69:
        at += 1
        downwards = text[at] == 45
        if text[at] == 45 or text[at] == 43:
            at += 1
        begin = at
        exponent = 0
        while 48 <= text[at] <= 57:
            exponent = min(exponent * 10 + np.int64(text[at]) - 48, MAX_EXPONENT)
            at += 1
        if at == begin:
            return -1, 0.0, 0, 0
        power += -exponent if downwards else exponent
    coarse = 0
    if count > MAX_UINT64_DIGITS and count - _count_leading_zero_digits(text, first) > MAX_UINT64_DIGITS:
        value, coarse = _parse_many_digits(text, first, power)
    elif digits <= MAX_EXACT_INTEGER and -MAX_NEVER_COARSE_DECIMALS <= power <= 0:
        value = np.float64(digits)
        if power < 0:
            value /= FLOAT_POWERS_OF_TEN[-power]
    elif digits <= MAX_EXACT_INTEGER and -22 <= power <= 22:
        value = (
            np.float64(digits) / FLOAT_POWERS_OF_TEN[-power]
            if power < 0
            else np.float64(digits) * FLOAT_POWERS_OF_TEN[power]
        )
        coarse = _is_inexact_coarse(digits, power, value)
    else:
        value = _round_decimal(digits, power)
        coarse = _is_inexact_coarse(digits, power, value)
    return at, -value if negative else value, coarse, power


@njit_cached
def round_to_odd(text, values):
    """Replace each coarse number that differs from its text by the next float64 on the side of the text.

    text: uint8 (n), valid JSON that does not end in a digit. values: float64, the first numbers in it, which are
    written to. Returns how many of all the numbers are coarse and may differ.
    """
    at = index = count = 0
    while at < len(text):
        character = text[at]
        if character == 34:
            at, _ = _find_string_end(text, at + 1)
            if at < 0:
                break
        elif character == 45 or 48 <= character <= 57:
            first = at + np.int64(character == 45)
            at, value, coarse, power = _parse_number(text, at)
            if at < 0:
                break
            count += coarse
            if coarse and index < len(values):
                bits = float_to_bits(abs(value))
                mantissa, exponent = _split_float(bits)
                # Adding 2^64 - 1 subtracts 1.
                bits += U64(_compare_to_binary(text, first, power, mantissa, exponent))
                values[index] = -bits_to_float(bits) if value < 0 else bits_to_float(bits)
            index += 1
        at += 1
    return count


@njit_cached
def _find_string_end(text, at):
    """Return the offset of the quote that closes the string with contents at `at`, -1 if there is none.

    Also return whether it has escapes other than line breaks, which base64 may have.
    """
    escapes = False
    while at < len(text):
        while at + 8 <= len(text):
            word = load_uint64(text, at)
            quote, backslash = word ^ ASCII_QUOTES, word ^ ASCII_BACKSLASHES
            special = (
                (quote - BYTE_LOW_BITS & ~quote)
                | (backslash - BYTE_LOW_BITS & ~backslash)
                | (word - ASCII_SPACES & ~word)
            )
            if special & BYTE_HIGH_BITS != 0:
                break
            at += 8
        character = text[at]
        if character == 34:
            return at, escapes
        if character < 32:
            return -1, escapes
        if character == 92:
            at += 1
            if at >= len(text) or (text[at] != 110 and text[at] != 114):
                escapes = True
        at += 1
    return -1, escapes


@njit_cached
def _is_data_value(text, at):
    """Return whether the string at `at` is the value of "data"."""
    at = _skip_space_backward(text, at)
    if at < 0 or text[at] != 58:
        return False
    at = _skip_space_backward(text, at)
    # A longer name that ends like that has a backslash before this quote.
    return (
        at > 5
        and text[at - 5] == 34
        and text[at - 4] == 100
        and text[at - 3] == 97
        and text[at - 2] == 116
        and text[at - 1] == 97
        and text[at] == 34
        and text[at - 6] != 92
    )


@njit_cached
def _skip_space_backward(text, at):
    """Return the offset of the last character before `at` that is not whitespace, -1 if there is none."""
    at -= 1
    while at >= 0 and (text[at] == 32 or text[at] == 10 or text[at] == 13 or text[at] == 9):
        at -= 1
    return at


@njit_cached
def count_trailing_space(text):
    """Return the number of bytes of whitespace at the end of a text."""
    return len(text) - 1 - _skip_space_backward(text, len(text))


@njit_cached
def count_structural_characters(text):
    """Return the number of opening brackets, colons and quotes: a bound on the values that a parser creates."""
    count = 0
    for character in text:
        count += np.int64((character == 34) | (character == 58) | (character == 91) | (character == 123))
    return count


@njit_cached
def _find_list_end(text, at):
    """Return the end of the list that opens at `at` (-1: it is not closed), and its numbers of names and tokens."""
    depth = names = parts = 0
    while at < len(text):
        character = text[at]
        if character == 34:
            at, _ = _find_string_end(text, at + 1)
            if at < 0:
                return -1, names, parts
        elif character == 44:
            parts += 1
        elif character == 58:
            names += 1
            parts += 1
        elif character == 91 or character == 123:
            depth += 1
            parts += 1
        elif character == 93 or character == 125:
            depth -= 1
            if depth == 0:
                return at + 1, names, parts
        at += 1
    return -1, names, parts


@njit_cached
def _is_non_number_value(text, at):
    """Return whether a string, an object, true, false or null is at `at`: a JSON value that is not a number."""
    first = text[at]
    if first == 34 or first == 123:
        return True
    # Two letters distinguish null from nan, which is not valid JSON; later misspellings are rejected by the parser. The
    # text ends with a brace, which is not one of the first letters, so a second one exists.
    return (
        (first == 116 and text[at + 1] == 114)
        or (first == 102 and text[at + 1] == 97)
        or (first == 110 and text[at + 1] == 117)
    )


@njit_cached
def _scan_array(text, state, values, counts, sides):
    """Continue to read the list of numbers that `state` is in.

    Returns SCAN_DONE after its end, SCAN_MALFORMED at invalid JSON, and -1 - INVALID_... if it is not a valid array.
    """
    at, phase, depth, leaf, filled = (
        state[STATE_POSITION],
        state[STATE_PHASE],
        state[STATE_DEPTH],
        state[STATE_LEAF_DEPTH],
        state[STATE_VALUE_COUNT],
    )
    outcome = np.int64(SCAN_MALFORMED)
    while True:
        at = _skip_space(text, at)
        character = text[at]
        if phase == PHASE_BEFORE_VALUE:
            if character == 91:
                if depth == leaf:
                    outcome = -1 - INVALID_UNEXPECTED_LIST
                    break
                if depth + 1 == MAX_DIMENSIONS:
                    outcome = -1 - INVALID_TOO_DEEP
                    break
                depth += 1
                counts[depth] = 0
                at += 1
                continue
            if character == 93 and counts[depth] == 0:
                outcome = -1 - INVALID_RAGGED
                break
            if character == 45 or 48 <= character <= 57:
                if leaf < 0:
                    leaf = depth
                if depth != leaf:
                    outcome = -1 - INVALID_MISSING_LIST
                    break
                end, value, coarse, _ = _parse_number(text, at)
                if end < 0 or np.isinf(value):
                    break
                if coarse:
                    state[STATE_HAS_COARSE] = 1
                values[filled] = value
                filled += 1
                counts[depth] += 1
                at = end
                phase = PHASE_AFTER_VALUE
                continue
            if _is_non_number_value(text, at):
                outcome = -1 - (INVALID_NOT_A_NUMBER if leaf < 0 or depth == leaf else INVALID_MISSING_LIST)
            break
        if character == 44:
            at += 1
            phase = PHASE_BEFORE_VALUE
        elif character == 93:
            if sides[depth] < 0:
                sides[depth] = counts[depth]
            if sides[depth] != counts[depth]:
                outcome = -1 - INVALID_RAGGED
                break
            at += 1
            depth -= 1
            if depth < 0:
                outcome = SCAN_DONE
                break
            counts[depth] += 1
        else:
            break
    state[STATE_POSITION], state[STATE_PHASE], state[STATE_DEPTH], state[STATE_LEAF_DEPTH], state[STATE_VALUE_COUNT] = (
        at,
        phase,
        depth,
        leaf,
        filled,
    )
    return outcome


@njit_cached
def scan(text, state, values, counts, sides, spans):
    """Find the arrays and long strings of a JSON text and read the arrays' numbers.

    text: uint8 (n), the whole text; it must end with a brace, which ends every value. state: int64 (STATE_FIELD_COUNT),
    zeros at first. values: float64, space for n / 2 + 1 numbers. counts, sides: int64 (MAX_DIMENSIONS). spans: int64
    (any, SPAN_FIELD_COUNT), filled up to state[STATE_SPAN_COUNT] with the spans found.

    Returns SCAN_DONE, SCAN_FULL (set state[STATE_SPAN_COUNT] to 0 and call again) or SCAN_MALFORMED: the text is not
    valid JSON at state[STATE_POSITION], or ends there. state[STATE_TOKEN_COUNT] is the work left to a JSON parser: the
    lists, objects, names and commas outside of arrays, and TOKENS_PER_SPAN for each span.
    """
    while True:
        if state[STATE_SPAN_COUNT] == len(spans):
            return SCAN_FULL
        if state[STATE_PHASE] == PHASE_OUTSIDE_ARRAY:
            at = state[STATE_POSITION]
            while at < len(text):
                character = text[at]
                if character == 34:
                    end, escapes = _find_string_end(text, at + 1)
                    if end < 0:
                        state[STATE_POSITION] = at
                        return SCAN_MALFORMED
                    if end - at > MIN_DATA_STRING_BYTES and not escapes and _is_data_value(text, at):
                        _add_span(spans, state, KIND_STRING, at, end + 1)
                    at = end
                elif character == 44 or character == 123:
                    state[STATE_TOKEN_COUNT] += 1
                elif character == 58:
                    state[STATE_NAME_COUNT] += 1
                    state[STATE_TOKEN_COUNT] += 1
                elif character == 91:
                    inside = _skip_space(text, at + 1)
                    if text[inside] != 123:
                        break
                    state[STATE_TOKEN_COUNT] += 1
                at += 1
                if state[STATE_SPAN_COUNT] == len(spans):
                    state[STATE_POSITION] = at
                    return SCAN_FULL
            if at >= len(text):
                state[STATE_POSITION] = at
                return SCAN_DONE
            state[STATE_ARRAY_START], state[STATE_POSITION], state[STATE_PHASE], state[STATE_FIRST_VALUE] = (
                at,
                at + 1,
                PHASE_BEFORE_VALUE,
                state[STATE_VALUE_COUNT],
            )
            state[STATE_DEPTH], state[STATE_LEAF_DEPTH], state[STATE_HAS_COARSE], counts[0] = 0, -1, 0, 0
            for depth in range(MAX_DIMENSIONS):
                sides[depth] = -1
        outcome = _scan_array(text, state, values, counts, sides)
        if outcome > SCAN_DONE:
            return outcome
        flat_and_short = outcome == SCAN_DONE and state[STATE_LEAF_DEPTH] == 0 and sides[0] <= MAX_SHORT_LIST_LENGTH
        if flat_and_short:
            state[STATE_TOKEN_COUNT] += 1
        if outcome == SCAN_DONE and not flat_and_short:
            span = _add_span(spans, state, KIND_ARRAY, state[STATE_ARRAY_START], state[STATE_POSITION])
            spans[span, SPAN_OFFSET], spans[span, SPAN_CODE] = state[STATE_FIRST_VALUE], state[STATE_HAS_COARSE]
            _set_shape(spans, span, sides, state[STATE_LEAF_DEPTH] + 1)
        else:
            state[STATE_VALUE_COUNT] = state[STATE_FIRST_VALUE]
        if outcome < SCAN_DONE:
            end, names, parts = _find_list_end(text, state[STATE_ARRAY_START])
            if end < 0:
                state[STATE_POSITION] = len(text)
                return SCAN_MALFORMED
            if end - state[STATE_ARRAY_START] > MAX_SHORT_INVALID_BYTES or outcome == -1 - INVALID_TOO_DEEP:
                _add_invalid_span(spans, state, -1 - outcome, counts, sides, end)
            else:
                state[STATE_NAME_COUNT] += names
                state[STATE_TOKEN_COUNT] += parts
            state[STATE_POSITION] = end
        state[STATE_PHASE] = PHASE_OUTSIDE_ARRAY


@njit_cached
def _add_span(spans, state, kind, begin, end):
    span = state[STATE_SPAN_COUNT]
    state[STATE_SPAN_COUNT] += 1
    state[STATE_TOKEN_COUNT] += TOKENS_PER_SPAN
    spans[span, SPAN_KIND], spans[span, SPAN_BEGIN], spans[span, SPAN_END] = kind, begin, end
    return span


@njit_cached
def _set_shape(spans, span, sides, count):
    spans[span, SPAN_NDIM] = count
    for side in range(count):
        spans[span, SPAN_SHAPE + side] = sides[side]


@njit_cached
def _add_invalid_span(spans, state, code, counts, sides, end):
    depth = state[STATE_DEPTH]
    span = _add_span(spans, state, KIND_INVALID, state[STATE_ARRAY_START], end)
    spans[span, SPAN_OFFSET], spans[span, SPAN_CODE] = state[STATE_POSITION], code
    spans[span, SPAN_GOT] = counts[depth]
    spans[span, SPAN_EXPECTED] = sides[depth + 1] if code == INVALID_MISSING_LIST else sides[depth]
    # A ragged row is invalid as a whole; otherwise the entry in it is.
    _set_shape(spans, span, counts, depth if code == INVALID_RAGGED else depth + 1)
