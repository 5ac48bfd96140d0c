"""Exceptions of core, independent of HTTP.

CoreError
├── InvalidArgument (also a ValueError)   not valid on any machine
│   ├── InvalidShape                      sizes that do not fit together
│   ├── InvalidOption                     an option outside its allowed values
│   ├── InvalidNumbers                    values that are not real numbers
│   └── UnknownKernel                     a kernel name that does not exist, or invalid arguments of a named kernel
├── DeviceUnavailable                     a device that this machine does not have
├── MethodUnavailable                     no engine supports the problem with the requested method
└── TooLarge                              above the limits that the caller set
"""

from typing import Literal, NamedTuple

Quantity = Literal["memory", "compute", "time", "engine"]
"""The quantity that a limit applies to."""


class Cost(NamedTuple):
    """The predicted cost of a call: memory in megabytes (10^6 bytes), arithmetic in Gflop (10^9 operations), seconds.

    `megabytes` is the peak memory that the call adds: copies of its arguments, and the arrays of `engine`, the engine
    that would run. `result_megabytes` is the part of it that the result occupies.
    """

    megabytes: float
    gflop: float
    seconds: float
    result_megabytes: float = 0.0
    engine: str = ""


class CoreError(Exception):
    """Base class of the errors that the caller can fix by changing the call.

    `field` is the name of the invalid argument, `got` the received value and `limit` the allowed range; each may be
    None.
    """

    def __init__(self, message: str, *, field: str | None = None, got: object = None, limit: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.got = got
        self.limit = limit


class InvalidArgument(CoreError, ValueError):
    """An argument that is not valid on any machine."""


class InvalidShape(InvalidArgument):
    """Sizes that do not fit together."""


class InvalidOption(InvalidArgument):
    """An option outside its allowed values."""


class InvalidNumbers(InvalidArgument):
    """Values that are not real numbers."""


class UnknownKernel(InvalidArgument):
    """A kernel name that does not exist, or invalid arguments of a named kernel."""


class DeviceUnavailable(CoreError):
    """A device that this machine does not have."""


class MethodUnavailable(CoreError):
    """No engine supports the problem with the requested method."""


class TooLarge(CoreError):
    """An estimate above the limits that the caller set, raised before any allocation. `cost` is the whole estimate."""

    def __init__(self, message: str, *, quantity: Quantity, got: str, limit: str, cost: Cost) -> None:
        super().__init__(message, got=got, limit=limit)
        self.quantity = quantity
        self.cost = cost
