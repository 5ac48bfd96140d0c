"""Listening sockets: small send buffers, no new connections shortly before they are closed, and Unix sockets.

The system makes connections and queues them until the process accepts them; those in the queue when the socket is
closed are reset. However quickly the process accepts the last one, another may follow.
"""

import ctypes
import errno
import socket
import struct
import sys
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path

SO_ATTACH_FILTER = 26
"""Socket option of Linux, socket(7), that Python does not define."""

TCP_NOTSENT_LOWAT = 25
"""Socket option of Linux, tcp(7), that Python does not define."""

MAX_UNSENT_BYTES = 1 << 19
"""Bytes of a response that the system buffers in addition to those in flight to the client."""

CONNECT_TIMEOUT_S = 1
"""Seconds that a process with a full queue of connections has to accept one, before its socket counts as in use."""
MAPPED_ADDRESS_PREFIX = "::ffff:"
"""Prefix of the IPv6 address of a client with IPv4, on a socket that accepts both (RFC 4291, 2.5.5.2)."""

TCP_FLAGS_OFFSET, TCP_SYN, TCP_ACK = 13, 0x02, 0x10
"""Offset of the flags in a TCP segment, and the flags of connection requests (RFC 9293, 3.1)."""

DROP_SYN_FILTER = (
    (0x30, 0, 0, TCP_FLAGS_OFFSET),  # load the byte of flags
    (0x54, 0, 0, TCP_SYN | TCP_ACK),  # and
    (0x15, 0, 1, TCP_SYN),  # unless it is SYN alone, skip the next one
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # accept it
)
"""Instructions of the kernel's packet filter: code, jump if true, jump if false, operand."""


def open_unix_listener(path: Path, backlog: int) -> socket.socket:
    """Return a listening Unix socket; a socket file that no process uses any more is replaced. Raises OSError."""
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
            probe.settimeout(CONNECT_TIMEOUT_S)
            probe.connect(str(path))
            raise OSError(errno.EADDRINUSE, "another process uses it")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def limit_send_buffers(listener: socket.socket) -> None:
    """Limit the bytes that the system buffers of each response that its client does not read; 4 MB by default.

    Accepted connections inherit the limit. Admission control does not track these buffers.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)


def convert_mapped_address(host: str) -> str:
    """Return the IPv4 address in an IPv4-mapped IPv6 address, and other addresses unchanged."""
    mapped = IPv6Address(host).ipv4_mapped if host.startswith(MAPPED_ADDRESS_PREFIX) else None
    return str(mapped or host)


def stop_accepting(listener: socket.socket) -> None:
    """Stop the system from making new connections for this socket; handshakes in progress are completed.

    A client that connects then gets no reply, retries, and finds the port closed or its next owner. This works on Linux
    only, and a sandbox may forbid it: then connections made just before the socket is closed are reset. The file of a
    Unix socket is removed.
    """
    if hasattr(socket, "AF_UNIX") and listener.family == socket.AF_UNIX:
        Path(listener.getsockname()).unlink(missing_ok=True)
    elif sys.platform == "linux" and listener.family in (socket.AF_INET, socket.AF_INET6):
        program = ctypes.create_string_buffer(
            b"".join(struct.pack("HBBI", *instruction) for instruction in DROP_SYN_FILTER)
        )
        filter_program = struct.pack("HP", len(DROP_SYN_FILTER), ctypes.addressof(program))
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_program)
