"""The weight of a layer that is called again and again, with the forms that engines derive from it."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

from core.arrays import Array


class PreparedWeight:
    """A weight (O, C/groups, h, w), which must not change, and forms of it, each computed once. Thread-safe."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self._lock = threading.Lock()
        self._forms: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, weight: "Array | PreparedWeight") -> "PreparedWeight":
        """Return a prepared weight itself, or that of an array, whose forms are not kept."""
        return weight if isinstance(weight, PreparedWeight) else cls(weight)

    def derive(self, form: Hashable, make: Callable[[], Any]) -> Any:
        """Return a form of the weight, which `make` computes at the first call."""
        with self._lock:
            if form not in self._forms:
                self._forms[form] = make()
            return self._forms[form]
