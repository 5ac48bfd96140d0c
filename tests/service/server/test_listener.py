"""Tests of a listening socket that stops accepting before it is closed, and of its clients' addresses."""

import socket
import sys
import threading

import pytest

from service.server.listener import convert_mapped_address, stop_accepting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_queued_connection_is_served_and_new_ones_blocked(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        address = listener.getsockname()[:2]
        with socket.create_connection(address, timeout=10) as early:
            stop_accepting(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            accepted, _ = listener.accept()
            with accepted:
                early.sendall(b"query")
                assert accepted.recv(5) == b"query"
                accepted.sendall(b"response")
                assert early.recv(8) == b"response"


def test_blocked_connection_fails_when_the_socket_closes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop_accepting(listener)
        closing = threading.Timer(0.3, listener.close)
        closing.start()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=30)
        closing.join()


@pytest.mark.parametrize(
    ("host", "converted"),
    [("::ffff:10.0.0.7", "10.0.0.7"), ("::1", "::1"), ("10.0.0.7", "10.0.0.7"), ("::ffff:0:10.0.0.7",) * 2],
)
def test_ipv4_address_of_a_client_on_an_ipv6_socket(host: str, converted: str) -> None:
    assert convert_mapped_address(host) == converted


def test_unsupported_socket_is_left_unchanged() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.close()
        stop_accepting(listener)
