"""A server under mixed traffic for thousands of requests, and what becomes of its memory."""

import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from tests.leaky_server import LEAK_BYTES_VARIABLE
from tests.servers import wait_until_ready
from tests.traffic import Exchange, generate_traffic
from tests.traffic.slow_clients import SLOW_CLIENT_KINDS, SlowClient

SERVICE_COMMAND = (str(Path(sys.executable).with_name("corr2d")),)
LEAKY_COMMAND = (sys.executable, "-m", "tests.leaky_server")

CLIENT_COUNT = 4
"""At a time."""

REQUESTS_PER_SAMPLE = 100
"""Requests."""

MIB = 2**20
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory after so many requests while none runs, by /proc/PID/smaps_rollup: all resident, and all of no file."""

    requests: int
    resident: int
    anonymous: int


@dataclass(frozen=True, slots=True)
class SoakReport:
    """What was seen: memory, and how often which exchange was not right, with the first reason."""

    samples: list[MemorySample] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def record_failure(self, name: str, reason: BaseException) -> None:
        """One that was not right."""
        self.wrong[name] += 1
        self.reasons.setdefault(name, f"{type(reason).__name__}: {reason}"[:400])


@dataclass(frozen=True, slots=True)
class MemoryGrowth:
    """Bytes of resident memory gained over a run, by a straight line through it and by the medians of its two ends."""

    by_line: float
    by_ends: float

    def verdict(self, limit: float) -> str:
        """Flat where both are within the limit, leaking where both are over it."""
        over = [self.by_line > limit, self.by_ends > limit]
        return "leaks" if all(over) else "unclear" if any(over) else "flat"


def estimate_growth(samples: Sequence[MemorySample], since: int) -> MemoryGrowth:
    """From the sample after `since` requests to the last; the ends are a fifth of them each, at least one."""
    later = [sample for sample in samples if sample.requests >= since]
    counts, sizes = [sample.requests for sample in later], [sample.resident for sample in later]
    slope = float(np.polyfit(counts, sizes, 1)[0])
    end = max(1, len(later) // 5)
    by_ends = statistics.median(sizes[-end:]) - statistics.median(sizes[:end])
    return MemoryGrowth(slope * (counts[-1] - counts[0]), by_ends)


def run_soak(
    address: str,
    pid: int,
    requests: int,
    seed: int,
    good_first: int = 0,
    each: Callable[[MemorySample], object] = lambda _: None,
) -> SoakReport:
    """Send the traffic, some clients at a time; slow clients come and hang on meanwhile. `each` sees every sample."""
    soak, slow = SoakReport(), deque[tuple[float, SlowClient]]()
    exchanges, kinds = (
        itertools.islice(generate_traffic(seed, good_first), requests),
        itertools.cycle(SLOW_CLIENT_KINDS),
    )
    with (
        httpx.Client(base_url=address, timeout=TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(CLIENT_COUNT) as pool,
    ):

        def run_exchange(exchange: Exchange) -> None:
            try:
                exchange.run_exchange(client)
            except (AssertionError, OSError, ValueError, httpx.HTTPError) as reason:
                soak.record_failure(exchange.name, reason)

        try:
            while block := list(itertools.islice(exchanges, REQUESTS_PER_SAMPLE)):
                slow.append((time.monotonic(), SlowClient(next(kinds), client)))
                list(pool.map(run_exchange, block))
                soak.kinds.update(exchange.name for exchange in block)
                soak.samples.append(measure_memory(pid, sum(soak.kinds.values())))
                each(soak.samples[-1])
                while slow and time.monotonic() - slow[0][0] > slow[0][1].kind.seconds:
                    one = slow.popleft()[1]
                    try:
                        one.check_closed()
                    except AssertionError as reason:
                        soak.record_failure(one.kind.name, reason)
        finally:
            for _, one in slow:
                one.leave()
    return soak


def measure_memory(pid: int, requests: int) -> MemorySample:
    """The process's memory now."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    kilobytes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", rollup, re.MULTILINE)}
    return MemorySample(requests, 1024 * kilobytes["Rss"], 1024 * kilobytes["Anonymous"])


@contextmanager
def start_service(command: Sequence[str], log: Path, *flags: str, leak: int = 0) -> Iterator[tuple[str, int]]:
    """The address and the process id of `corr2d serve`, or of what takes the same flags, once it is ready."""
    with (
        log.open("w", encoding="utf-8") as lines,
        subprocess.Popen(
            [*command, "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=lines,
            text=True,
            env={**os.environ, LEAK_BYTES_VARIABLE: str(leak)},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            address = re.search(r"listens on (http://[\w.:]+)", process.stdout.readline())
            assert address, log.read_text(encoding="utf-8")
            with httpx.Client(base_url=address[1], timeout=TIMEOUT_S, trust_env=False) as client:
                wait_until_ready(client.request)
            yield address[1], process.pid
        finally:
            process.terminate()
            try:
                process.wait(TIMEOUT_S)
            finally:
                process.kill()
