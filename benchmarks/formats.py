"""Measure the constants of service/codecs/registry.py and service/scheduling/threads.py on this machine.

`python benchmarks/formats.py` prints, for every format, the nanoseconds per byte of a body and per number of a
response, and the time of a thread hand-off. The image is a photograph, neither uniform nor noise.
"""

import asyncio
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from core import Cost
from service.codecs import json
from service.codecs.images import png
from service.codecs.registry import FORMATS, Format
from service.codecs.response_options import ResponseOptions
from service.scheduling import threads
from service.scheduling.admission import Admission, Reservation
from service.scheduling.pool import WorkerPool

IMAGE_SIDE = 1024
REPETITIONS = 9
ROUND_TRIPS = 2000
IMAGE_PATH = Path(__file__).parents[1] / "docs" / "images" / "camera.png"


def measure_best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of several runs, in seconds."""
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_format(served: Format) -> tuple[float, float, float]:
    """Return ns per byte of a body, measured and predicted, and ns per number of a response; NaN if not supported."""
    photograph = png.decode(IMAGE_PATH.read_bytes(), limit=1 << 30).astype(np.float32)
    image = np.tile(photograph, (IMAGE_SIDE // photograph.shape[0], IMAGE_SIDE // photograph.shape[1])) + np.float32(
        1 / 3
    )
    fields = {"output": image}
    decoding = encoding = math.nan
    body = b""
    if served.encode is not None:
        encoding = measure_best_seconds(partial(served.encode, fields, ResponseOptions())) / image.size
        body = b"".join(served.encode(fields, ResponseOptions()))
        if served is FORMATS[json.MEDIA_TYPE]:
            body = body.replace(b"output", b"input")
    if served.decode is not None and body:
        decoding = measure_best_seconds(partial(served.decode, bytearray(body), 1 << 30)) / len(body)
    predicted = (
        served.estimate_decode_seconds(body, 1 << 30) / len(body) if served.decode is not None and body else math.nan
    )
    return 1e9 * decoding, 1e9 * predicted, 1e9 * encoding


async def measure_thread_round_trip() -> float:
    """Return the median time in seconds of an empty job in a thread of the pool."""
    admission = Admission(10**9, timeout_s=60)
    admission.queue = pool = WorkerPool(admission, concurrency=2, queue=2, queue_timeout_s=60)
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        await pool.run(Reservation(admission), Cost(0, 0, 1), lambda _: None)
        times.append(time.perf_counter() - start)
    pool.close()
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Print the table of formats and the time of a thread hand-off."""
    print("| format | decoding, ns per byte | predicted | encoding, ns per number | in FORMATS |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for media_type, served in FORMATS.items():
        decoding, predicted, encoding = measure_format(served)
        constant = 1e9 * served.encode_seconds_per_number
        print(f"| {media_type} | {decoding:.2f} | {predicted:.2f} | {encoding:.2f} | {constant:.2f} |")
    hand_off = 1e6 * asyncio.run(measure_thread_round_trip())
    print(f"thread hand-off: {hand_off:.0f} us; INLINE_THRESHOLD_S: {1e6 * threads.INLINE_THRESHOLD_S:.0f} us")


if __name__ == "__main__":
    main()
