"""Imports of large modules without garbage collections.

Importing torch creates hundreds of thousands of objects, which Python's garbage collector would visit many times over,
for a third of the time of the import. Almost none of them is garbage.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect no garbage within this context, nor later the objects that were created in it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
