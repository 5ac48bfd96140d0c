"""Send GET /livez to a server every 20 ms, on its own connection: `livez_probe.py HOST PORT SECONDS`.

Prints a line for each request: when it was due (time.monotonic), the seconds by which this process sent it late, and
the seconds from when it was due to its response. If a response arrives after the next request is due, that request is
sent at once, and its time also counts from when it was due: a stall counts for every request that it delays.
"""

import socket
import sys
from time import monotonic, sleep

INTERVAL_S = 0.02
"""Time between two requests, in seconds."""

LIVEZ_REQUEST = b"GET /livez HTTP/1.1\r\nHost: corr2d\r\n\r\n"
LIVEZ_RESPONSE = b'{"status":"alive"}'


def main() -> None:
    """Send the requests, and print the times at the end, so that printing does not delay requests."""
    host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    lines: list[str] = []
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = received = monotonic()
        end = due + seconds
        while due < end:
            sleep(max(0.0, due - monotonic()))
            late = monotonic() - max(due, received)
            connection.sendall(LIVEZ_REQUEST)
            response = b""
            while not response.endswith(LIVEZ_RESPONSE):
                piece = connection.recv(65536)
                if not piece:
                    sys.exit(f"the connection was closed after {response[:200]!r}")
                response += piece
            received = monotonic()
            lines.append(f"{due} {late} {received - due}")
            due += INTERVAL_S
    print("\n".join(lines))


if __name__ == "__main__":
    main()
