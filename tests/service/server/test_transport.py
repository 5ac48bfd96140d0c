"""Test of the transport that joins response headers and body."""

import asyncio

import pytest

from service.server.transport import CoalescingTransport

pytestmark = pytest.mark.slow


def test_headers_are_sent_with_the_body_or_alone_at_once() -> None:
    sent: list[bytes] = []

    class Transport(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            sent.append(bytes(data))

        def close(self) -> None:
            sent.append(b"closed")

        def is_closing(self) -> bool:
            return b"closed" in sent

    async def talk() -> None:
        transport = CoalescingTransport(Transport(), asyncio.get_running_loop())
        transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
        assert not sent
        transport.write(memoryview(b"body"))
        transport.write(b"more")
        assert sent == [b"HTTP/1.1 200 OK\r\n\r\nbody", b"more"]
        transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.sleep(0)
        assert sent[2:] == [b"HTTP/1.1 200 OK\r\n\r\n"]
        transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        transport.close()
        assert sent[3:] == [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"closed"]

    asyncio.run(talk())
