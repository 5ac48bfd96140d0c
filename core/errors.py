"""What can go wrong, in the words of the domain; no status codes, no web.

CoreError
├── InvalidArgument (also a ValueError)   cannot be accepted on any machine
│   ├── InvalidShape                      sizes that do not fit together
│   ├── InvalidOption                     an option outside its allowed values
│   ├── InvalidNumbers                    values that are not plain real numbers
│   └── UnknownKernel                     a kernel name that names nothing
├── DeviceUnavailable                     a device that this machine does not have
├── MethodUnavailable                     no engine can do this problem by that method
└── TooLarge                              above the limits that the caller set
"""

from typing import Literal, NamedTuple

Quantity = Literal["memory", "compute", "time", "engine"]
"""What a limit is on."""


class Cost(NamedTuple):
    """What a call is expected to take: memory in megabytes (10^6 bytes), Gflop (10^9 operations), seconds.

    `megabytes` is the peak of the memory that the call adds: copies of its arguments, and what the engine takes, by
    name `engine`. `result_megabytes` is the part of it that the result keeps.
    """

    megabytes: float
    gflop: float
    seconds: float
    result_megabytes: float = 0.0
    engine: str = ""


class CoreError(Exception):
    """Something that the caller can understand and change.

    `field` is the argument at fault, `got` what came in it and `limit` what is allowed; each may be None.
    """

    def __init__(self, message: str, *, field: str | None = None, got: object = None, limit: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.got = got
        self.limit = limit


class InvalidArgument(CoreError, ValueError):
    """An argument that cannot be accepted on any machine."""


class InvalidShape(InvalidArgument):
    """Sizes that do not fit together."""


class InvalidOption(InvalidArgument):
    """An option outside its allowed values."""


class InvalidNumbers(InvalidArgument):
    """Values that are not plain real numbers."""


class UnknownKernel(InvalidArgument):
    """A kernel name that names nothing, or arguments that it does not take."""


class DeviceUnavailable(CoreError):
    """A device that this machine does not have."""


class MethodUnavailable(CoreError):
    """No engine can solve this problem by the method asked for."""


class TooLarge(CoreError):
    """An estimate above the limits that the caller set; nothing has been allocated. `cost` is the whole estimate."""

    def __init__(self, message: str, *, quantity: Quantity, got: str, limit: str, cost: Cost) -> None:
        super().__init__(message, got=got, limit=limit)
        self.quantity = quantity
        self.cost = cost
