"""Good and bad requests of every kind, mixed, each checked: the traffic that the service must take without growing."""

from collections.abc import Iterator

import numpy as np

from tests.traffic.bad import BAD
from tests.traffic.exchanges import Exchange
from tests.traffic.good import NEXT, drawn

__all__ = ["Exchange", "traffic"]


def traffic(seed: int) -> Iterator[Exchange]:
    """Without end, the same for the same seed: a good one, a bad one, the small good one that must still be right.

    The bad ones come all, in another order each time.
    """
    rng = np.random.default_rng(seed)
    while True:
        for place in rng.permutation(len(BAD)):
            yield drawn(rng)
            yield BAD[place]
            yield NEXT
