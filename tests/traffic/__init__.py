"""Good and bad requests of every kind, mixed, each checked: the traffic that the service must take without growing."""

from collections.abc import Iterator

import numpy as np

from tests.traffic.exchanges import Exchange
from tests.traffic.invalid_requests import INVALID_REQUESTS
from tests.traffic.valid_requests import PROBE_REQUEST, draw_request

__all__ = ["Exchange", "generate_traffic"]


def generate_traffic(seed: int, good_first: int = 0) -> Iterator[Exchange]:
    """Without end, the same for the same seed: a good one, a bad one, the small good one that must still be right.

    The bad ones come all, in another order each time. `good_first`: before that, so many good ones, after which all has
    been compiled that ever is, and what is remembered of shapes is as much as is remembered at most.
    """
    rng = np.random.default_rng(seed)
    for _ in range(good_first):
        yield draw_request(rng)
    while True:
        for place in rng.permutation(len(INVALID_REQUESTS)):
            yield draw_request(rng)
            yield INVALID_REQUESTS[place]
            yield PROBE_REQUEST
