"""Checks of the dtype, shape and names that a header declares.

Declared shapes are not trusted until their bytes have been received.
"""

from typing import Any

import numpy as np

from service.errors import FieldError, InvalidRequest

DTYPES = ("float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))

MAX_DIMENSIONS = 32
"""Maximum number of dimensions of an array; numpy's own limit is 64."""

MAX_SHOWN_NAME_LENGTH = 60


def resolve_dtype(name: str, field: str, *, received: str) -> np.dtype[Any]:
    """Return the dtype of that name. Raises InvalidRequest, which shows `received`, for a name not in DTYPES."""
    if name not in DTYPES:
        allowed = ", ".join(DTYPES)
        message = f"{field} has the dtype {received}: it must be one of {allowed}; convert it before sending"
        raise InvalidRequest(message, errors=[FieldError(field, message, received, allowed)])
    return np.dtype(name)


def check_shape(shape: tuple[int, ...], field: str) -> None:
    """Raise InvalidRequest for a single number, an empty array, or too many dimensions."""
    got = str(shape)
    if not shape:
        allowed = "at least 1 dimension"
        message = f"{field} has the shape (), a single number: it needs {allowed}; send it as an array of shape (1, 1)"
    elif len(shape) > MAX_DIMENSIONS:
        got, allowed = f"{len(shape)} dimensions", f"{MAX_DIMENSIONS} dimensions"
        message = f"{field} has {got}: at most {allowed} are allowed; remove sides of 1"
    elif 0 in shape:
        allowed = "every side at least 1"
        message = f"{field} has the shape {truncate_name(got)} and so no values: it needs {allowed}"
    else:
        return
    raise InvalidRequest(message, errors=[FieldError(field, message, got, allowed)])


def truncate_name(name: str) -> str:
    """Return a received name, cut to the length that messages show."""
    return name if len(name) <= MAX_SHOWN_NAME_LENGTH else name[: MAX_SHOWN_NAME_LENGTH - 1] + "…"


def quote_name(name: str) -> str:
    """Return a received name, cut and quoted for messages."""
    return repr(truncate_name(name))
