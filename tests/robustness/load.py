"""Clients that keep a service busy, and keep account of what became of every request."""

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
    """How many requests were answered with 200, and what became of those that were sent and were not."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def generate_load(address: str, clients: int = 16) -> Iterator[RequestTally]:
    """Clients that ask again and again, some on a new connection each time, until nobody takes a connection any more.

    What counts as sent went out on a connection that was made.
    """
    account, stopped = RequestTally(), threading.Event()
    host, port = urlsplit(address).hostname or "", urlsplit(address).port

    def ask(number: int) -> None:
        path, body = LOAD_REQUESTS[number % 2]
        while not stopped.is_set():
            with closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
                try:
                    connection.connect()
                except OSError:
                    return
                # Some on a new connection each time, the others until they are told to go.
                goes_on = True
                while goes_on and not stopped.is_set():
                    try:
                        connection.request("POST", path, body, JSON_HEADERS)
                        answer = connection.getresponse()
                        answer.read()
                    except (OSError, http.client.HTTPException) as error:
                        account.lost.append(repr(error))
                        break
                    if answer.status == 200:
                        account.answered += 1
                    else:
                        account.lost.append(str(answer.status))
                    goes_on = not answer.will_close and number % 3 != 0

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield account
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
