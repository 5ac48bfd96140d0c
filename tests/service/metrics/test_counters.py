"""Tests of the counters that workers share, also when a worker is killed."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from service.metrics import counters
from service.metrics.counters import Metrics, SharedCounters
from service.timing import Timing

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc to detect zombies and parent processes"
)


def test_histogram_counts_every_bucket_from_the_bound_up() -> None:
    def counted(seconds: float) -> float:
        counting = Metrics()
        counting.start_request()
        counting.finish_request("/correlate", 200, Timing(), seconds, 0, None)
        return next(at for at, count in enumerate(counting.table.rows()[0][counting.seconds["/correlate"] :]) if count)

    bounds = counters.BUCKET_BOUNDS_S
    assert [counted(bound) for bound in bounds] == list(range(len(bounds)))
    assert [counted(bound * 1.0001) for bound in bounds] == list(range(1, len(bounds) + 1))
    assert counted(0) == 0
    assert list(bounds) == sorted(bounds)


def test_unknown_values_are_counted_as_other() -> None:
    counting = Metrics(reasons=["busy"])
    counting.start_request()
    counting.finish_request("/nowhere", 418, Timing(), 1.0, 10, "teapot")
    counting.count_engine("abacus")
    (row,) = counting.table.rows()
    assert row[counting.requests["other"]["other"]] == 1
    assert row[counting.rejections["other"]] == 1
    assert row[counting.engines["other"]] == 1
    assert row[counting.sent_bytes] == 10


def test_workers_claim_rows_and_extra_ones_count_privately() -> None:
    table = SharedCounters(2)
    counting = [Metrics(table) for _ in range(5)]
    for each in counting:
        each.count_engine("abacus")
    assert [row[counting[0].engines["other"]] for row in table.rows()] == [1, 1, 1, 1]
    assert len(table.live_rows()) == 4


def count_and_exit(table: SharedCounters) -> None:
    counting = Metrics(table)
    counting.queue_depth.set(9)
    counting.count_engine("abacus")
    os._exit(9)


@pytest.mark.slow
@needs_proc
def test_counters_outlive_a_worker_and_gauges_do_not() -> None:
    table = SharedCounters(2)
    ours = Metrics(table)
    ours.queue_depth.set(1)
    worker = multiprocessing.get_context("spawn").Process(target=count_and_exit, args=(table,))
    worker.start()
    # Until its parent waits for it, the worker is a zombie: its process id exists, but no process runs.
    deadline = time.monotonic() + 30
    while not table.rows()[1][ours.engines["other"]] or len(table.live_rows()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [table.rows().index(row) for row in table.live_rows()] == [0]
    assert table.rows()[1][QUEUE_DEPTH_COLUMN] == 9
    worker.join()
    successor = Metrics(table)
    successor.count_engine("abacus")
    assert [row[QUEUE_DEPTH_COLUMN] for row in table.rows()] == [1, 0, 0, 0]
    assert [row[ours.engines["other"]] for row in table.rows()] == [0, 2, 0, 0]


QUEUE_DEPTH_COLUMN = counters.FIRST_GAUGE_CELL + counters.GAUGE_NAMES.index("queue_depth")


def test_reused_process_id_is_not_the_worker() -> None:
    table = SharedCounters(2)
    Metrics(table)
    assert len(table.live_rows()) == 1
    table.rows()[0][counters.START_TIME_CELL] -= 1
    assert table.live_rows() == []


def test_worker_killed_while_claiming_a_row_does_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "LOCK_TIMEOUT_S", 0.05)
    table = SharedCounters(2)
    assert table._lock is not None  # noqa: SLF001 - only a killed process leaves it locked
    table._lock.acquire()  # noqa: SLF001
    Metrics(table)
    monkeypatch.setattr(counters, "LOCK_TIMEOUT_S", 60)
    Metrics(table)
    assert len(table.live_rows()) == 2
