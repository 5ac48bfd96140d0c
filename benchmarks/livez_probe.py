"""Asks a server how it is, every 20 ms on a connection of its own: `pulse.py HOST PORT SECONDS`.

Prints a line for each: when it was due (time.monotonic), by how many seconds it was sent late through no fault of the
server, and how many seconds after it was due the answer was there. Where an answer takes longer than the next one's
turn, that one is sent at once and its time counts from its turn all the same: a stall is not measured by one in two.
"""

import socket
import sys
from time import monotonic, sleep

INTERVAL_S = 0.02
"""Seconds."""

LIVEZ_REQUEST = b"GET /livez HTTP/1.1\r\nHost: corr2d\r\n\r\n"
LIVEZ_RESPONSE = b'{"status":"alive"}'


def main() -> None:
    """Ask, and print when all is over: printing would take time."""
    host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    lines: list[str] = []
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = answered = monotonic()
        end = due + seconds
        while due < end:
            sleep(max(0.0, due - monotonic()))
            late = monotonic() - max(due, answered)
            connection.sendall(LIVEZ_REQUEST)
            come = b""
            while not come.endswith(LIVEZ_RESPONSE):
                piece = connection.recv(65536)
                if not piece:
                    sys.exit(f"not alive: {come[:200]!r}")
                come += piece
            answered = monotonic()
            lines.append(f"{due} {late} {answered - due}")
            due += INTERVAL_S
    print("\n".join(lines))


if __name__ == "__main__":
    main()
