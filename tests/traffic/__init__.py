"""Mixed valid and invalid requests, each with a check of its response, for tests of stability under load."""

from collections.abc import Iterator

import numpy as np

from tests.traffic.exchanges import Exchange
from tests.traffic.invalid_requests import INVALID_REQUESTS
from tests.traffic.valid_requests import PROBE_REQUEST, draw_request

__all__ = ["Exchange", "generate_traffic"]


def generate_traffic(seed: int, good_first: int = 0) -> Iterator[Exchange]:
    """Yield endless exchanges, reproducible by seed: a valid one, an invalid one, and a small valid probe, in turn.

    Each round contains every invalid request, in a new order. The first `good_first` exchanges are valid: after enough
    of them, every pipeline has been compiled and the caches are full.
    """
    rng = np.random.default_rng(seed)
    for _ in range(good_first):
        yield draw_request(rng)
    while True:
        for index in rng.permutation(len(INVALID_REQUESTS)):
            yield draw_request(rng)
            yield INVALID_REQUESTS[index]
            yield PROBE_REQUEST
