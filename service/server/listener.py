"""What the system does for a listening socket: small buffers, and a door that is shut before the socket is.

A connection is made by the system, and waits until the process accepts it: those that wait when the socket is closed
are reset. However quickly the last one is accepted, another may have come.
"""

import ctypes
import socket
import struct
import sys
from contextlib import suppress

SO_ATTACH_FILTER = 26
"""Of Linux, socket(7); Python does not name it."""

TCP_NOTSENT_LOWAT = 25
"""Of Linux, tcp(7); Python does not name it."""

MAX_UNSENT_BYTES = 1 << 19
"""Bytes of a response that the system holds beyond those that are on their way to the client."""

TCP_FLAGS_OFFSET, TCP_SYN, TCP_ACK = 13, 0x02, 0x10
"""Where the flags of a TCP segment are, and those that ask for a connection (RFC 9293, 3.1)."""

DROP_SYN_FILTER = (
    (0x30, 0, 0, TCP_FLAGS_OFFSET),  # load the byte there
    (0x54, 0, 0, TCP_SYN | TCP_ACK),  # and
    (0x15, 0, 1, TCP_SYN),  # unless it is SYN alone, skip the next one
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # let all of it pass
)
"""Instructions of the kernel's packet filter: code, jump if true, jump if false, operand."""


def limit_send_buffers(listener: socket.socket) -> None:
    """Let the system hold little of each response that its client does not read, instead of 4 MB.

    The connections that the socket accepts inherit it. What is in their buffers is in nobody's account of the memory.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)


def stop_accepting(listener: socket.socket) -> None:
    """Let the system make no more connections for this socket; those that it has begun to make come to their end.

    Whoever asks for one is not answered, asks again, and finds the port closed or its next owner. Only Linux can do
    that, and a sandbox may not let it: then what comes in the instant before the socket is closed is reset.
    """
    if sys.platform == "linux" and listener.family in (socket.AF_INET, socket.AF_INET6):
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in DROP_SYN_FILTER))
        described = struct.pack("HP", len(DROP_SYN_FILTER), ctypes.addressof(program))
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)
