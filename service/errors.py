"""Errors between the socket and core, without HTTP: service/problems.py maps each to a response.

ServiceError
├── NotParseable
├── InvalidRequest
├── UnsupportedMediaType
├── NotAcceptable
├── Unauthorized
├── BodyTooLarge
├── HeaderTooLarge
├── TargetTooLong
├── MisdirectedRequest
├── TransferCodingNotSupported
├── HTTPVersionNotSupported
├── RequestTimeout
├── NotReady
├── Busy
├── OutOfMemory
├── ClientDisconnected
└── DeadlineExceeded
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUT_OF_MEMORY_MESSAGE = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)
"""Messages of RuntimeErrors with which torch reports a lack of memory."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One entry of a problem's `errors`."""

    field: str
    message: str
    got: object = None
    limit: object = None


class ServiceError(Exception):
    """Base class of all errors of the service."""

    def __init__(
        self, detail: str, *, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}


class NotParseable(ServiceError):
    """Body that is not valid in the format of its media type."""


class InvalidRequest(ServiceError):
    """Body or query that can be parsed but is not valid."""


class UnsupportedMediaType(ServiceError):
    """Body in an unsupported format or content coding."""


class NotAcceptable(ServiceError):
    """Accept header that no supported response format satisfies."""


class Unauthorized(ServiceError):
    """Missing or invalid API key."""


class BodyTooLarge(ServiceError):
    """Body over the size limit, as received or decompressed."""


class HeaderTooLarge(ServiceError):
    """Request headers over the size limit."""


class TargetTooLong(ServiceError):
    """Request target over the length limit."""


class MisdirectedRequest(ServiceError):
    """Request target that does not belong to this service."""


class TransferCodingNotSupported(ServiceError):
    """Unsupported transfer coding."""


class HTTPVersionNotSupported(ServiceError):
    """Unsupported HTTP version."""


class RequestTimeout(ServiceError):
    """Request headers or body not received in time."""


class NotReady(ServiceError):
    """Service before its warm-up, after a failed warm-up, or during shutdown."""


class Busy(ServiceError):
    """Rejection for lack of queue slots, memory or time."""


class OutOfMemory(ServiceError):
    """Failed memory allocation."""


class ClientDisconnected(ServiceError):
    """Connection closed by the client before the response."""


class DeadlineExceeded(ServiceError):
    """Request not finished by its deadline."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether numpy, torch or Python failed to allocate memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY_MESSAGE.search(str(error)) is not None
    )
