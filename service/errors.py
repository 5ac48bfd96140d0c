"""What goes wrong between the socket and core. No HTTP here: service/problems.py says how each is answered.

ServiceError
├── NotParseable           a body that is not what its media type says
├── InvalidRequest         a body or a query that says something unacceptable
├── UnsupportedMediaType   a body in a format or a content coding that is not served
├── NotAcceptable          nothing that is served satisfies Accept
├── Unauthorized           no API key, or none of the service's
├── BodyTooLarge           a body over the limit, as it came or decoded
├── HeaderTooLarge         a head over the limit
├── UriTooLong             a target over the limit
├── Misdirected            a target that is not of this service
├── CodingNotImplemented   a transfer coding that is not served
├── VersionNotSupported    a version of HTTP that is not served
├── TooSlow                a head or a body that does not come
├── NotReady               before the warm-up, or after it failed
├── Busy                   no room left in the queue
├── OutOfMemory            the system has no memory left
├── ClientLeft             nobody waits for the answer any more
└── DeadlinePassed         not done in time
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldError:
    """One entry of a problem's `errors`."""

    field: str
    message: str
    got: object = None
    limit: object = None


class ServiceError(Exception):
    """Something that went wrong between the socket and core."""

    def __init__(
        self, detail: str, *, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}


class NotParseable(ServiceError):
    """A body that is not what its media type says."""


class InvalidRequest(ServiceError):
    """A body or a query that was understood and says something unacceptable."""


class UnsupportedMediaType(ServiceError):
    """A body in a format or a content coding that is not served."""


class NotAcceptable(ServiceError):
    """Nothing that is served satisfies Accept."""


class Unauthorized(ServiceError):
    """No API key, or none of the service's."""


class BodyTooLarge(ServiceError):
    """A body over the limit, as it came or decoded."""


class HeaderTooLarge(ServiceError):
    """A head over the limit."""


class TargetTooLong(ServiceError):
    """A target over the limit."""


class MisdirectedRequest(ServiceError):
    """A target that is not of this service."""


class TransferCodingNotSupported(ServiceError):
    """A transfer coding that is not served."""


class HTTPVersionNotSupported(ServiceError):
    """A version of HTTP that is not served."""


class RequestTimeout(ServiceError):
    """A head or a body that does not come."""


class NotReady(ServiceError):
    """Before the warm-up, or after it failed."""


class Busy(ServiceError):
    """No room left in the queue."""


class OutOfMemory(ServiceError):
    """The system has no memory left."""


class ClientDisconnected(ServiceError):
    """Nobody waits for the answer any more."""


class DeadlineExceeded(ServiceError):
    """Not done in time."""
