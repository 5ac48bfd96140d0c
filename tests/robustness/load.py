"""Clients that keep a service busy and count the outcome of every request."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.robustness.sample_requests import SMALL_INPUT
from tests.robustness.workloads import build_fit_request

JSON_HEADERS = {"Content-Type": "application/json"}

LOAD_REQUESTS = [
    ("/correlate", json.dumps({"input": SMALL_INPUT, "kernel": [[1]]}).encode()),
    ("/train-kernel", json.dumps(build_fit_request(32, 50)).encode()),
]


@dataclass
class RequestTally:
    """Number of requests with status 200, and the error or status of every other request that was sent."""

    succeeded: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def generate_load(address: str, clients: int = 16) -> Iterator[RequestTally]:
    """Run clients that send requests, some on a new connection each time, until the server accepts no connection.

    A request counts as sent if its connection was established.
    """
    tally, stopped = RequestTally(), threading.Event()
    host, port = urlsplit(address).hostname or "", urlsplit(address).port

    def send_requests(number: int) -> None:
        path, body = LOAD_REQUESTS[number % 2]
        while not stopped.is_set():
            with closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
                try:
                    connection.connect()
                except OSError:
                    return
                # Some use a new connection for each request; the others, until the server closes it.
                keep_alive = True
                while keep_alive and not stopped.is_set():
                    try:
                        connection.request("POST", path, body, JSON_HEADERS)
                        response = connection.getresponse()
                        response.read()
                    except (OSError, http.client.HTTPException) as error:
                        tally.lost.append(repr(error))
                        break
                    if response.status == 200:
                        tally.succeeded += 1
                    else:
                        tally.lost.append(str(response.status))
                    keep_alive = not response.will_close and number % 3 != 0

    threads = [threading.Thread(target=send_requests, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
