"""A listening socket that is shut before it is closed."""

import socket
import sys
import threading

import pytest

from service.listener import shut

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_is_connected_is_served_and_nobody_else_gets_in(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        address = listener.getsockname()[:2]
        with socket.create_connection(address, timeout=10) as early:
            shut(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            accepted, _ = listener.accept()
            with accepted:
                early.sendall(b"asked")
                assert accepted.recv(5) == b"asked"
                accepted.sendall(b"answered")
                assert early.recv(8) == b"answered"


def test_who_knocks_meanwhile_finds_the_port_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shut(listener)
        closing = threading.Timer(0.3, listener.close)
        closing.start()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=30)
        closing.join()


def test_a_socket_for_which_it_cannot_be_done_is_left_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.close()
        shut(listener)
