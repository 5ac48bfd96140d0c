"""Send thousands of mixed requests to a server, and measure the growth of its memory."""

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
"""Number of concurrent clients."""

REQUESTS_PER_SAMPLE = 100
"""Number of requests between two memory samples."""

MIB = 2**20
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident and anonymous memory in bytes after a number of requests, from /proc/PID/smaps_rollup."""

    requests: int
    resident: int
    anonymous: int


@dataclass(frozen=True, slots=True)
class SoakReport:
    """Memory samples, and per kind of exchange the count, the failures and the first reason for a failure."""

    samples: list[MemorySample] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def record_failure(self, name: str, reason: BaseException) -> None:
        self.wrong[name] += 1
        self.reasons.setdefault(name, f"{type(reason).__name__}: {reason}"[:400])


@dataclass(frozen=True, slots=True)
class MemoryGrowth:
    """Growth of resident memory over a run in bytes, by a fitted line and by the medians of both ends."""

    by_line: float
    by_ends: float

    def verdict(self, limit: float) -> str:
        """Return "flat" if both are within the limit, "leaks" if both exceed it, otherwise "unclear"."""
        over = [self.by_line > limit, self.by_ends > limit]
        return "leaks" if all(over) else "unclear" if any(over) else "flat"


def estimate_growth(samples: Sequence[MemorySample], since: int) -> MemoryGrowth:
    """Estimate the growth after the first `since` requests; each end is a fifth of the samples, at least one."""
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
    """Send the traffic by CLIENT_COUNT clients and some slow clients; call `each` with every sample."""
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
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    kilobytes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", rollup, re.MULTILINE)}
    return MemorySample(requests, 1024 * kilobytes["Rss"], 1024 * kilobytes["Anonymous"])


@contextmanager
def start_service(command: Sequence[str], log: Path, *flags: str, leak: int = 0) -> Iterator[tuple[str, int]]:
    """Start `corr2d serve` or a command with the same flags, and yield its address and process id once it is ready."""
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
