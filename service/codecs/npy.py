"""numpy's .npy files."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode(content: bytes) -> NDArray[Any]:
    """The array. Raises ValueError where the content is no .npy file of plain numbers; never unpickles."""
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (EOFError, OSError, SyntaxError, TypeError) as error:
        raise ValueError(f"not a .npy file: {error}") from error
    return array


def encode(array: NDArray[Any]) -> bytes:
    """The array as a .npy file, format version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
