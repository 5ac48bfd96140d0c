"""Compare the JSON decoder with pysimdjson: CPU time per body, and the time for which each holds the GIL.

python benchmarks/json_parsers.py, after `make .venv/bench.stamp`
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from service.codecs import json as json_codec
from tests.gil_pauses import measure_longest_pause

SIDE = 1024
REPEATS = 15
Decoder = Callable[[bytes], NDArray[np.float64]]


def create_bodies() -> dict[str, bytes]:
    """Return JSON bodies with images of different kinds of numbers."""
    rng = np.random.default_rng(0)
    images: dict[str, NDArray[Any]] = {
        "pixels, 0 to 255": rng.integers(0, 256, (SIDE, SIDE)),
        "3 decimals": rng.random((SIDE, SIDE)).round(3),
        "float32, 8 digits": rng.random((SIDE, SIDE), np.float32),
        "float64, 16 digits": rng.random((SIDE, SIDE)),
        "float64, with exponents": rng.normal(size=(SIDE, SIDE)) * 10.0 ** rng.integers(-30, 30, (SIDE, SIDE)),
    }
    return {name: orjson.dumps({"input": x}, option=orjson.OPT_SERIALIZE_NUMPY) for name, x in images.items()}


def decode_with_corr2d(body: bytes) -> NDArray[np.float64]:
    """Return the array of a body by the decoder of the service."""
    return np.asarray(json_codec.decode(body)["input"])


def decode_with_simdjson(parser: simdjson.Parser, body: bytes) -> NDArray[np.float64]:
    """Return the array of a body by simdjson. `as_buffer` flattens ragged arrays, so the rows are checked."""
    rows = parser.parse(body)["input"]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError("ragged array")
    return np.frombuffer(rows.as_buffer(of_type="d")).reshape(len(rows), lengths.pop())


def measure_cpu_seconds(decode: Decoder, body: bytes) -> float:
    """Return the CPU seconds of one call; those of the machine's other processes do not count."""
    start = time.thread_time()
    decode(body)
    return time.thread_time() - start


def main() -> None:
    """Print a table in Markdown. A parser of simdjson that is used again has the memory for its next body."""
    print("| numbers | MB | corr2d, MB/s | simdjson, MB/s | parser used again, MB/s | GIL: corr2d, ms | simdjson, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    used_parser = simdjson.Parser()
    decoders: list[Decoder] = [
        decode_with_corr2d,
        lambda body: decode_with_simdjson(simdjson.Parser(), body),
        partial(decode_with_simdjson, used_parser),
    ]
    for name, body in create_bodies().items():
        first, *others = (decode(body) for decode in decoders)
        assert all(np.array_equal(first, other) for other in others), name  # noqa: S101
        times = [[measure_cpu_seconds(decode, body) for decode in decoders] for _ in range(REPEATS)]
        speeds = [len(body) / 1e6 / min(column) for column in zip(*times, strict=True)]
        pauses = [measure_longest_pause(partial(decode, body)) * 1e3 for decode in decoders[:2]]
        cells = [name, f"{len(body) / 1e6:.1f}", *(f"{speed:.0f}" for speed in speeds), *(f"{ms:.1f}" for ms in pauses)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
