"""Compare parts of the service that a library also offers, in CPU time: the PNG writer and the metrics.

python benchmarks/libraries.py, after `make .venv/dev.stamp`
"""

import io
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core import correlate
from service.codecs.images import png
from service.codecs.images.values import convert_to_pixels
from service.metrics.counters import BUCKET_BOUNDS_S, PHASES, Metrics
from service.timing import Timing

REPEATS = 15
REQUESTS = 2000
"""Requests that are counted at a time."""

PHOTO = Path(__file__).parents[1] / "docs" / "images" / "camera.png"


PILLOW_OPTIONS: Mapping[str, Mapping[str, int]] = {
    "run-length": {"compress_level": 1, "compress_type": zlib.Z_RLE},
    "level 1": {"compress_level": 1},
    "level 6": {"compress_level": 6},
}


def main() -> None:
    """Print two tables in Markdown."""
    writers = ["corr2d", *(f"Pillow, {name}" for name in PILLOW_OPTIONS)]
    print("| PNG, ms and kB |", " | ".join(writers), "|")
    print("| --- " * (1 + len(writers)) + "|")
    for name, (array, options) in create_images().items():
        encoders = [
            partial(encode_with_corr2d, array, options),
            *(partial(encode_with_pillow, array, options, pillow) for pillow in PILLOW_OPTIONS.values()),
        ]
        times = zip(measure(encoders), encoders, strict=True)
        print(f"| {name} |", *(f"{seconds * 1e3:.1f}, {len(encode()) / 1e3:.0f} |" for seconds, encode in times))
    print()
    print("| metrics of a request | microseconds |")
    print("| --- | --- |")
    # prometheus_client reads the variable when it is imported. /dev/shm: no writes to a disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # noqa: S108
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        ours, theirs = measure([count_with_corr2d, create_prometheus_counter()])
    print(f"| corr2d, one row of shared memory | {ours / REQUESTS * 1e6:.1f} |")
    print(f"| prometheus_client, multiprocess mode | {theirs / REQUESTS * 1e6:.1f} |")


def create_images() -> dict[str, tuple[NDArray[Any], dict[str, bool]]]:
    """Return arrays and the options for their encoding, by name."""
    photo = np.asarray(Image.open(PHOTO).convert("L"), np.float32)
    edges = np.asarray(correlate(photo, "sobel_x", mode="same").output)
    return {
        "edges, 512 x 512": (edges, {}),
        "edges, 1024 x 1024": (np.tile(edges, (2, 2)), {}),
        "photo, 512 x 512": (photo, {"clip": True}),
        "colour, 512 x 512": (np.stack([photo, photo[::-1], photo.T]), {"clip": True}),
        "16 bits, 512 x 512": (60 * np.abs(edges), {"clip": True, "deep": True}),
    }


def encode_with_corr2d(array: NDArray[Any], options: Mapping[str, bool]) -> bytes:
    """Return the file that corr2d writes."""
    return b"".join(png.encode(array, **options))


def encode_with_pillow(array: NDArray[Any], options: Mapping[str, bool], pillow: Mapping[str, int]) -> bytes:
    """Return the file that Pillow writes for the same pixels. It cannot write colour of 16 bits."""
    white = 65535 if options.get("deep") else 255
    pixels = convert_to_pixels(array, "PNG", clip=options.get("clip", False), white=white)
    file = io.BytesIO()
    lines = pixels if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, 0, 2))
    Image.fromarray(lines).save(file, "PNG", **pillow)
    return file.getvalue()


metrics = Metrics(engines=["stencil"], reasons=["validation"])
TIMING = Timing()
TIMING.parse, TIMING.wait, TIMING.compute, TIMING.encode = 0.1, 0.02, 0.03, 0.05


def count_with_corr2d() -> None:
    """Count requests."""
    for _ in range(REQUESTS):
        metrics.start_request()
        metrics.add_received_bytes(60)
        metrics.count_engine("stencil")
        metrics.finish_request("/correlate", 200, TIMING, 0.0002, 80, None)


def create_prometheus_counter() -> Callable[[], None]:
    """Return a function that counts requests with prometheus_client; the children of labels are kept."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    registry = CollectorRegistry()
    in_progress = Gauge("in_progress", "-", registry=registry, multiprocess_mode="livesum")
    received, sent = (Counter(name, "-", registry=registry) for name in ("received_bytes", "sent_bytes"))
    engine = Counter("engine", "-", ["engine"], registry=registry).labels("stencil")
    request = Counter("requests", "-", ["route", "status"], registry=registry).labels("/correlate", "200")
    seconds = Histogram("seconds", "-", ["route"], registry=registry, buckets=BUCKET_BOUNDS_S).labels("/correlate")
    phase_family = Histogram("phase_seconds", "-", ["phase"], registry=registry, buckets=BUCKET_BOUNDS_S)
    phases = [phase_family.labels(phase) for phase in PHASES]

    def count() -> None:
        for _ in range(REQUESTS):
            in_progress.inc()
            received.inc(60)
            engine.inc()
            in_progress.dec()
            request.inc()
            seconds.observe(0.0002)
            for phase, ms in zip(phases, (TIMING.parse, TIMING.wait, TIMING.compute, TIMING.encode), strict=True):
                phase.observe(ms / 1000)
            sent.inc(80)

    return count


def measure(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the least CPU seconds of each call, which are called in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, column in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            column.append(time.thread_time() - start)
    return [min(column) for column in times]


if __name__ == "__main__":
    main()
