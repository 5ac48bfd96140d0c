"""The limit on open file descriptors, and the number of connections that it allows."""

import structlog

from service.server.timeouts import RESERVED_CONNECTIONS

RESERVED_DESCRIPTORS = 256
"""File descriptors that the process needs in addition to those of its connections, at most."""


def fit_descriptor_limit(connections: int) -> tuple[int, int]:
    """Return the number of connections that this process may have, and of further ones for health checks only.

    Each needs a file descriptor: raise that limit as far as the system allows, and log a warning if it is too low.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return connections, RESERVED_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED_CONNECTIONS + RESERVED_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections, RESERVED_CONNECTIONS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return connections, RESERVED_CONNECTIONS
    available = allowed - min(RESERVED_DESCRIPTORS, allowed // 2)
    reserved = min(RESERVED_CONNECTIONS, available // 4)
    reduced = max(1, min(connections, available - reserved))
    structlog.get_logger("corr2d").warning(
        "connections reduced: the limit on file descriptors (ulimit -n) is low",
        connections=reduced,
        setting=connections,
        descriptors=allowed,
        needed=wanted,
    )
    return reduced, reserved
