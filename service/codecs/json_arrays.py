"""The arrays in a JSON text, found and read by compiled code: no Python object is made for a number or a row.

One pass over the bytes finds every list of numbers, checks that it is rectangular, and writes its numbers as float64;
long strings (base64 of an array) are found as well. The rest of the text, a few dozen bytes, is left to a JSON parser.
Compiled by Numba, so that other threads run meanwhile; twice as fast as simdjson, which neither checks rows nor lets
go of Python's lock.

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

from service.codecs.words import (
    bits_of,
    compiled,
    compiled_in_place,
    eight_bytes,
    float_of,
    high_half,
    leading_zeros,
    trailing_zeros,
)

MAX_DIMENSIONS: Final = 32

SHORT_LIST = 64
"""A flat list of up to this many numbers is left to the JSON parser: a stride, a padding, a bias of a few filters."""

SHORT_FAULT = 4096
"""A faulty list of up to this many bytes is left to the JSON parser."""

LONG_STRING = 128
"""A string of at least this many bytes is cut out as well, where it is the value of "data"."""

PARTS_OF_A_SPAN = 4
"""What is cut out counts as so many parts of the rest: that is what its Python objects cost."""

# What a scan returns.
DONE, FULL, MALFORMED = range(3)

# What a span is.
ARRAY, STRING, FAULT = range(3)

# What is wrong with a list that was to be an array of numbers.
RAGGED, NOT_A_NUMBER, A_LIST, NOT_A_LIST, TOO_DEEP = range(5)

# The fields of a scanner's state.
AT, NAMES, PARTS, SPANS, VALUES, PHASE, START, FIRST, DEPTH, LEAF, COARSE = range(11)
STATE_FIELDS = 11

# Where in the text it is: outside of arrays; in one, before a value; in one, behind a value.
OUTSIDE, BEFORE, BEHIND = range(3)

# The fields of a span; the last are an array's sides, or the place of a fault. CODE is that of a fault; of an array, 1
# if it has coarse numbers that differ from the text.
KIND, BEGIN, END, OFFSET, SIDES, CODE, GOT, EXPECTED, FIRST_SIDE = range(9)
SPAN_FIELDS = FIRST_SIDE + MAX_DIMENSIONS + 1

U64 = np.uint64
ONE = U64(1)
SIGNIFICANT_DIGITS = 19
EXACT_DIGITS = 15
"""A whole number of so many digits is a float64 number."""

EXACT = U64(2**53)
SMALLEST_POWER, LARGEST_POWER = -342, 308

COARSE_BITS = U64(2**28 - 1)
"""The bits of a float64 that are zero if it has at most 25 significant bits."""

COARSE_DECIMALS = 12
"""A number of at most 2^53 / 10^q with q decimals, up to 12, that is not a coarse float64 itself is never rounded to
one: relative to it, each differs by at least 1 / 2^53 or 1 / (2^25 5^q), which is more than half a unit."""

LONGEST_EXPONENT = 10**15
"""No text has so many digits that an exponent beyond makes a difference."""

DECISIVE_DIGITS = 800
"""The middle between two float64s has at most 767 digits: of those behind, only whether they are zeros matters."""

WORDS = 48
"""Words of 64 bits that a whole number of so many digits needs, and a middle brought to the same power of ten."""


def _powers_of_five() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The 128 leading bits of 5^q, in two halves, as the algorithm needs them.

    Rounded down for q >= 0 and up for -27 <= q < 0, where a product may lie exactly between two float64s.
    """
    high, low = [], []
    for power in range(SMALLEST_POWER, LARGEST_POWER + 1):
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


HIGH, LOW = _powers_of_five()
TENS = np.array([10.0**power for power in range(23)])
WHOLE_TENS = np.array([10**power for power in range(SIGNIFICANT_DIGITS + 1)], np.uint64)
FIVES = np.array([5**power for power in range(28)], np.uint64)

ZEROS = U64(0x3030303030303030)
PAST_NINE = U64(0x4646464646464646)
TOP_BITS = U64(0x8080808080808080)
LOW_BITS = U64(0x0101010101010101)
QUOTES = U64(0x2222222222222222)
BACKSLASHES = U64(0x5C5C5C5C5C5C5C5C)
SPACES = U64(0x2020202020202020)


@compiled
def _rounded(digits, power):
    """The float64 nearest to digits * 10^power (Lemire 2021, sections 5 to 8)."""
    if digits == 0 or power < SMALLEST_POWER:
        return 0.0
    if power > LARGEST_POWER:
        return np.inf
    shift = leading_zeros(digits)
    digits <<= shift
    high = high_half(digits, HIGH[power - SMALLEST_POWER])
    low = digits * HIGH[power - SMALLEST_POWER]
    if high & U64(0x1FF) == U64(0x1FF):
        more = high_half(digits, LOW[power - SMALLEST_POWER])
        low += more
        if low < more:
            high += ONE
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
        mantissa = (mantissa + (mantissa & ONE)) >> ONE
        return float_of(mantissa)
    # Exactly between two float64s: to the even one. Only these powers can be.
    if low <= ONE and -4 <= power <= 23 and mantissa & U64(3) == ONE and mantissa << dropped == high:
        mantissa &= ~ONE
    mantissa = (mantissa + (mantissa & ONE)) >> ONE
    if mantissa >= U64(2**53):
        mantissa >>= ONE
        exponent += 1
    if exponent >= 2047:
        return np.inf
    return float_of((mantissa & U64(2**52 - 1)) | (U64(exponent) << U64(52)))


@compiled
def _of_many_digits(text, at, power):
    """Return the float64 nearest to the number whose first digit is at `at`, of more digits than a word holds.

    The second value is 1 if it is coarse and may differ from the number.
    """
    start = at
    digits = U64(0)
    taken = dropped = 0
    more = False
    while text[at] == 46 or 48 <= text[at] <= 57:
        if text[at] != 46:
            if taken < SIGNIFICANT_DIGITS:
                digits = digits * U64(10) + U64(text[at] - 48)
                taken += np.int64(digits > 0)
            else:
                dropped += 1
                more |= text[at] != 48
        at += 1
    lower = _rounded(digits, power + dropped)
    if not more:
        return lower, _is_coarse(digits, power + dropped, lower)
    upper = _rounded(digits + ONE, power + dropped)
    nearest = lower
    if lower != upper:
        above = _beyond_middle(text, start, power, bits_of(lower))
        if above > 0 or (above == 0 and bits_of(lower) & ONE):
            nearest = upper
    return nearest, np.int64(nearest != 0 and bits_of(nearest) & COARSE_BITS == 0)


@compiled_in_place
def _is_coarse(digits, power, value):
    """Return 1 if value, the float64 nearest to digits * 10^power, is coarse and differs from it, else 0."""
    if bits_of(value) & COARSE_BITS != 0:
        return 0
    return _differs(digits, power, bits_of(value))


@compiled
def _differs(digits, power, bits):
    """Return 1 if digits * 10^power differs from the coarse float64 with these bits, else 0.

    Both are compared as an odd whole number times a power of two. Zero counts as equal: no float32 is nearer.
    """
    if bits == 0:
        return 0
    mantissa, exponent = _parts_of(bits)
    shift = trailing_zeros(mantissa)
    mantissa >>= shift
    exponent += np.int64(shift)
    shift = trailing_zeros(digits)
    digits >>= shift
    if exponent != power + np.int64(shift) or abs(power) >= len(FIVES):
        return 1
    if power < 0:
        mantissa, digits = digits, mantissa
    five = FIVES[abs(power)]
    return np.int64(high_half(digits, five) != 0 or digits * five != mantissa)


@compiled_in_place
def _parts_of(bits):
    """Return the mantissa of a positive float64 as a whole number, and the power of two that it is multiplied by."""
    field = np.int64(bits >> U64(52))
    mantissa = bits & U64(2**52 - 1)
    if field > 0:
        mantissa |= U64(2**52)
    return mantissa, max(field, 1) - 1075


@compiled
def _beyond_middle(text, at, power, lower):
    """Whether the number at `at` is above (1), below (-1) or in (0) the middle between a float64 and the next one.

    `lower` are the bits of the float64.
    """
    mantissa, exponent = _parts_of(lower)
    return _compare(text, at, power, U64(2) * mantissa + ONE, exponent - 1)


@compiled
def _compare(text, at, power, mantissa, exponent):
    """Return 1 if the number at `at` is above mantissa * 2^exponent, -1 if it is below, 0 if they are equal.

    Both sides are multiplied by the same powers of five and of two, which makes them whole numbers.
    """
    number, other = np.zeros((2, WORDS), np.uint64)
    digits = U64(0)
    taken = count = size = 0
    more = False
    while text[at] == 46 or 48 <= text[at] <= 57:
        if text[at] != 46:
            if taken == DECISIVE_DIGITS:
                power += 1
                more |= text[at] != 48
            else:
                digits = digits * U64(10) + U64(text[at] - 48)
                if taken > 0 or digits > 0:
                    taken += 1
                    count += 1
                if count == SIGNIFICANT_DIGITS:
                    size = _times(number, size, WHOLE_TENS[count], digits)
                    digits = U64(0)
                    count = 0
        at += 1
    size = _times(number, size, WHOLE_TENS[count], digits)
    length = _times(other, 0, ONE, mantissa)
    if power >= 0:
        size = _times_power_of_five(number, size, power)
    else:
        length = _times_power_of_five(other, length, -power)
    if exponent >= power:
        length = _shifted(other, length, exponent - power)
    else:
        size = _shifted(number, size, power - exponent)
    if size != length:
        return 1 if size > length else -1
    for place in range(size - 1, -1, -1):
        if number[place] != other[place]:
            return 1 if number[place] > other[place] else -1
    return np.int64(more)


@compiled
def _times(number, size, factor, summand):
    """Multiply a whole number of `size` words, the lowest first, in place and add to it; how many words it has now."""
    for place in range(size):
        low = number[place] * factor
        high = high_half(number[place], factor)
        low += summand
        summand = high + U64(low < summand)
        number[place] = low
    if summand > 0:
        number[size] = summand
        size += 1
    return size


@compiled
def _times_power_of_five(number, size, power):
    while power > 0:
        step = min(power, len(FIVES) - 1)
        size = _times(number, size, FIVES[step], U64(0))
        power -= step
    return size


@compiled
def _shifted(number, size, bits):
    """Multiply a whole number by 2^bits in place; how many words it has now."""
    words = bits >> 6
    size = _times(number, size, ONE << U64(bits & 63), U64(0))
    for place in range(size - 1, -1, -1):
        number[place + words] = number[place]
    number[:words] = 0
    return size + words


@compiled_in_place
def _eight_digits(word):
    """The number whose eight digits are the bytes of a word, 0 to 9, the first in the lowest."""
    word = word * U64(10) + (word >> U64(8))
    low = (word & U64(0x000000FF000000FF)) * U64(0x000F424000000064)
    high = (word >> U64(16) & U64(0x000000FF000000FF)) * U64(0x0000271000000001)
    return low + high >> U64(32)


@compiled_in_place
def _digits(text, at, value):
    """Where the digits at `at` end, and `value` with them behind it."""
    while at + 8 <= len(text):
        characters = eight_bytes(text, at)
        word = characters - ZEROS
        other = (characters + PAST_NINE | word) & TOP_BITS
        if other == 0:
            value = value * U64(100_000_000) + _eight_digits(word)
            at += 8
        else:
            bits = trailing_zeros(other) & U64(56)
            if bits > 0:
                count = np.int64(bits >> U64(3))
                value = value * WHOLE_TENS[count] + _eight_digits(word << (U64(64) - bits))
                at += count
            return at, value
    while 48 <= text[at] <= 57:
        value = value * U64(10) + U64(text[at] - 48)
        at += 1
    return at, value


@compiled
def _leading(text, at):
    """How many zeros stand before the first other digit of the number at `at`."""
    count = 0
    while text[at] == 48 or text[at] == 46:
        count += np.int64(text[at] == 48)
        at += 1
    return count


@compiled_in_place
def _space(text, at):
    """Where the white space at `at` ends."""
    while text[at] <= 32 and (text[at] == 32 or text[at] == 10 or text[at] == 13 or text[at] == 9):
        at += 1
    return at


@compiled_in_place
def _number(text, at):
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
        at, digits = _digits(text, at, digits)
        if at == first:
            return -1, 0.0, 0, 0
    power = 0
    count = at - first
    if text[at] == 46:
        point = at + 1
        at, digits = _digits(text, point, digits)
        if at == point:
            return -1, 0.0, 0, 0
        power = point - at
        count -= power
    elif count <= EXACT_DIGITS and text[at] != 101 and text[at] != 69:
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
            exponent = min(exponent * 10 + np.int64(text[at]) - 48, LONGEST_EXPONENT)
            at += 1
        if at == begin:
            return -1, 0.0, 0, 0
        power += -exponent if downwards else exponent
    coarse = 0
    if count > SIGNIFICANT_DIGITS and count - _leading(text, first) > SIGNIFICANT_DIGITS:
        value, coarse = _of_many_digits(text, first, power)
    elif digits <= EXACT and -COARSE_DECIMALS <= power <= 0:
        value = np.float64(digits)
        if power < 0:
            value /= TENS[-power]
    elif digits <= EXACT and -22 <= power <= 22:
        value = np.float64(digits) / TENS[-power] if power < 0 else np.float64(digits) * TENS[power]
        coarse = _is_coarse(digits, power, value)
    else:
        value = _rounded(digits, power)
        coarse = _is_coarse(digits, power, value)
    return at, -value if negative else value, coarse, power


@compiled
def round_to_odd(text, values):
    """Replace each coarse number that differs from its text by the next float64 on the side of the text.

    text: uint8 (n), valid JSON that does not end in a digit. values: float64, the first numbers in it, which are
    written to. Returns how many of all the numbers are coarse and may differ.
    """
    at = place = count = 0
    while at < len(text):
        character = text[at]
        if character == 34:
            at, _ = _string_end(text, at + 1)
            if at < 0:
                break
        elif character == 45 or 48 <= character <= 57:
            first = at + np.int64(character == 45)
            at, value, coarse, power = _number(text, at)
            if at < 0:
                break
            count += coarse
            if coarse and place < len(values):
                bits = bits_of(abs(value))
                mantissa, exponent = _parts_of(bits)
                # Adding 2^64 - 1 subtracts 1.
                bits += U64(_compare(text, first, power, mantissa, exponent))
                values[place] = -float_of(bits) if value < 0 else float_of(bits)
            place += 1
        at += 1
    return count


@compiled
def _string_end(text, at):
    """Where the string whose first character is at `at` has its closing quote (-1: nowhere), and if it has escapes."""
    escapes = False
    while at < len(text):
        while at + 8 <= len(text):
            word = eight_bytes(text, at)
            quote, backslash = word ^ QUOTES, word ^ BACKSLASHES
            special = (quote - LOW_BITS & ~quote) | (backslash - LOW_BITS & ~backslash) | (word - SPACES & ~word)
            if special & TOP_BITS != 0:
                break
            at += 8
        character = text[at]
        if character == 34:
            return at, escapes
        if character < 32:
            return -1, escapes
        if character == 92:
            escapes = True
            at += 1
        at += 1
    return -1, escapes


@compiled
def _is_data(text, at):
    """The string at `at` is the value of "data"."""
    at = _before_space(text, at)
    if at < 0 or text[at] != 58:
        return False
    at = _before_space(text, at)
    # A name whose end is spelt like that has a backslash before the quote.
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


@compiled
def _before_space(text, at):
    """Where the last character before `at` is that is not white space."""
    at -= 1
    while at >= 0 and (text[at] == 32 or text[at] == 10 or text[at] == 13 or text[at] == 9):
        at -= 1
    return at


@compiled
def space_behind(text):
    """How many bytes of white space a text ends in."""
    return len(text) - 1 - _before_space(text, len(text))


@compiled
def count_marks(text):
    """How many brackets that open, colons and quotes a text has: more than the values that a parser makes of it."""
    count = 0
    for character in text:
        count += np.int64((character == 34) | (character == 58) | (character == 91) | (character == 123))
    return count


@compiled
def _list_end(text, at):
    """Behind the bracket that closes the list which opens at `at` (-1: there is none), and its names and parts."""
    depth = names = parts = 0
    while at < len(text):
        character = text[at]
        if character == 34:
            at, _ = _string_end(text, at + 1)
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


@compiled
def _is_other_value(text, at):
    """A string, an object, true, false or null is at `at`: a JSON value, but no number."""
    first = text[at]
    if first == 34 or first == 123:
        return True
    # Two letters tell null from the nan that is no JSON; what is misspelt further on is refused all the same. The
    # brace that ends the text is none of the first ones, so there is a second.
    return (
        (first == 116 and text[at + 1] == 114)
        or (first == 102 and text[at + 1] == 97)
        or (first == 110 and text[at + 1] == 117)
    )


@compiled
def _array(text, state, values, counts, sides):
    """Read on in the list of numbers that `state` is in.

    Returns DONE behind it, MALFORMED at what is no JSON, and -1 - the code of a fault where it is no array of numbers.
    """
    at, phase, depth, leaf, filled = state[AT], state[PHASE], state[DEPTH], state[LEAF], state[VALUES]
    outcome = np.int64(MALFORMED)
    while True:
        at = _space(text, at)
        character = text[at]
        if phase == BEFORE:
            if character == 91:
                if depth == leaf:
                    outcome = -1 - A_LIST
                    break
                if depth + 1 == MAX_DIMENSIONS:
                    outcome = -1 - TOO_DEEP
                    break
                depth += 1
                counts[depth] = 0
                at += 1
                continue
            if character == 93 and counts[depth] == 0:
                outcome = -1 - RAGGED
                break
            if character == 45 or 48 <= character <= 57:
                if leaf < 0:
                    leaf = depth
                if depth != leaf:
                    outcome = -1 - NOT_A_LIST
                    break
                end, value, coarse, _ = _number(text, at)
                if end < 0 or np.isinf(value):
                    break
                if coarse:
                    state[COARSE] = 1
                values[filled] = value
                filled += 1
                counts[depth] += 1
                at = end
                phase = BEHIND
                continue
            if _is_other_value(text, at):
                outcome = -1 - (NOT_A_NUMBER if leaf < 0 or depth == leaf else NOT_A_LIST)
            break
        if character == 44:
            at += 1
            phase = BEFORE
        elif character == 93:
            if sides[depth] < 0:
                sides[depth] = counts[depth]
            if sides[depth] != counts[depth]:
                outcome = -1 - RAGGED
                break
            at += 1
            depth -= 1
            if depth < 0:
                outcome = DONE
                break
            counts[depth] += 1
        else:
            break
    state[AT], state[PHASE], state[DEPTH], state[LEAF], state[VALUES] = at, phase, depth, leaf, filled
    return outcome


@compiled
def scan(text, state, values, counts, sides, spans):
    """Find the arrays and long strings of a JSON text and read the arrays' numbers.

    text: uint8 (n), the whole text; it must end in a brace, which ends whatever is read. state: int64 (STATE_FIELDS),
    zeros at first. values: float64, room for n / 2 + 1 numbers. counts, sides: int64 (MAX_DIMENSIONS). spans: int64
    (any, SPAN_FIELDS), filled up to state[SPANS] with what was found.

    Returns DONE, FULL (empty the spans and go on) or MALFORMED: the text is no JSON at state[AT], or ends there.
    state[PARTS] is how much a JSON parser will have to do: the lists, objects, names and commas outside of arrays, and
    PARTS_OF_A_SPAN for each span.
    """
    while True:
        if state[SPANS] == len(spans):
            return FULL
        if state[PHASE] == OUTSIDE:
            at = state[AT]
            while at < len(text):
                character = text[at]
                if character == 34:
                    end, escapes = _string_end(text, at + 1)
                    if end < 0:
                        state[AT] = at
                        return MALFORMED
                    if end - at > LONG_STRING and not escapes and _is_data(text, at):
                        _add(spans, state, STRING, at, end + 1)
                    at = end
                elif character == 44 or character == 123:
                    state[PARTS] += 1
                elif character == 58:
                    state[NAMES] += 1
                    state[PARTS] += 1
                elif character == 91:
                    inside = _space(text, at + 1)
                    if text[inside] != 123:
                        break
                    state[PARTS] += 1
                at += 1
                if state[SPANS] == len(spans):
                    state[AT] = at
                    return FULL
            if at >= len(text):
                state[AT] = at
                return DONE
            state[START], state[AT], state[PHASE], state[FIRST] = at, at + 1, BEFORE, state[VALUES]
            state[DEPTH], state[LEAF], state[COARSE], counts[0] = 0, -1, 0, 0
            for depth in range(MAX_DIMENSIONS):
                sides[depth] = -1
        outcome = _array(text, state, values, counts, sides)
        if outcome > DONE:
            return outcome
        flat_and_short = outcome == DONE and state[LEAF] == 0 and sides[0] <= SHORT_LIST
        if flat_and_short:
            state[PARTS] += 1
        if outcome == DONE and not flat_and_short:
            span = _add(spans, state, ARRAY, state[START], state[AT])
            spans[span, OFFSET], spans[span, CODE] = state[FIRST], state[COARSE]
            _put_sides(spans, span, sides, state[LEAF] + 1)
        else:
            state[VALUES] = state[FIRST]
        if outcome < DONE:
            end, names, parts = _list_end(text, state[START])
            if end < 0:
                state[AT] = len(text)
                return MALFORMED
            if end - state[START] > SHORT_FAULT or outcome == -1 - TOO_DEEP:
                _add_fault(spans, state, -1 - outcome, counts, sides, end)
            else:
                state[NAMES] += names
                state[PARTS] += parts
            state[AT] = end
        state[PHASE] = OUTSIDE


@compiled
def _add(spans, state, kind, begin, end):
    span = state[SPANS]
    state[SPANS] += 1
    state[PARTS] += PARTS_OF_A_SPAN
    spans[span, KIND], spans[span, BEGIN], spans[span, END] = kind, begin, end
    return span


@compiled
def _put_sides(spans, span, sides, count):
    spans[span, SIDES] = count
    for side in range(count):
        spans[span, FIRST_SIDE + side] = sides[side]


@compiled
def _add_fault(spans, state, code, counts, sides, end):
    depth = state[DEPTH]
    span = _add(spans, state, FAULT, state[START], end)
    spans[span, OFFSET], spans[span, CODE] = state[AT], code
    spans[span, GOT] = counts[depth]
    spans[span, EXPECTED] = sides[depth + 1] if code == NOT_A_LIST else sides[depth]
    # A row is at fault as a whole where it is ragged, and the entry in it otherwise.
    _put_sides(spans, span, counts, depth if code == RAGGED else depth + 1)
