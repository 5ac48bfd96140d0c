"""Formats: one file each, and the tables that name them.

To add one, write its file and its lines here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from service.codecs import json, npy, png

REQUEST_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    json.MEDIA_TYPE: json.decode,
}
"""What a request body may be: media type -> its decoder, which raises ValueError saying what is wrong."""

FILE_READERS: Mapping[str, Callable[[bytes], NDArray[Any]]] = {
    ".npy": npy.decode,
    ".png": png.decode,
}
"""What the command line reads, by suffix."""

FILE_WRITERS: Mapping[str, Callable[[NDArray[Any]], bytes]] = {
    ".npy": npy.encode,
    ".png": png.encode,
}
"""What the command line writes, by suffix."""
