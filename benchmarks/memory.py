"""Compare the peak memory of the service under random requests of every kind with CORR2D_MEMORY_MB.

    python benchmarks/memory.py [--requests 2000] [--memory-mb 600] [--seed 0] [--clients 8]

The requests are planes and layers for every engine and dtype, some with infinite, huge or subnormal values, fits with
every solver, and small requests in every format, sent by eight clients. The allowed statuses are 200, 413, 503 and 504.
The peak is VmHWM in /proc. The exit code is 1 if it exceeds the memory of the server before the first request
(libraries and compiled code, about 400 MB) by more than the setting plus 300 MB, or if a response has another status.
The process that compiles pipelines, and ends ten seconds after the last one, is reported separately: only the first run
of a version on a machine needs it.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import estimates
import fit_estimates
import httpx
import numpy as np
from servers.processes import list_process_tree

import core
from tests.soak import SERVICE_COMMAND, start_service
from tests.traffic import valid_requests

ALLOWED_ABOVE_MB = 300
COMPILER_MODULE = b"compile_pipelines"
MAX_BODY_MB = 64
KIND_FRACTIONS = {"plane": 0.35, "layer": 0.35, "fit": 0.2, "small": 0.1}
"""Fractions of the requests by kind."""

REJECTION_STATUSES = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
OPTION_NAMES = ("mode", "boundary", "stride", "dilation", "padding", "groups", "padding_mode", "dtype", "method")


class HttpRequest(NamedTuple):
    """A request over HTTP."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    text: str


def draw_requests(count: int, seed: int) -> Iterator[HttpRequest]:
    """Draw requests of every kind."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        kind = str(rng.choice(list(KIND_FRACTIONS), p=list(KIND_FRACTIONS.values())))
        if kind == "small":
            request = valid_requests.draw_request(rng)
            yield HttpRequest(request.method, request.path, request.headers, request.body, f"small {request.path}")
        elif kind == "fit":
            arguments = fit_estimates.draw_fit(rng)
            # Some options contradict the shapes, such as ridge "auto" for a single target value.
            with contextlib.suppress(core.InvalidOption):
                core.plan_fit_kernel(**arguments)
                yield build_fit_request(arguments)
        elif (posted := draw_convolution(kind, rng)) is not None:
            yield posted


def draw_convolution(kind: str, rng: np.random.Generator) -> HttpRequest | None:
    """Draw a convolution, sent as npz; None if its engine cannot compute it."""
    engine, dtype = str(rng.choice(list(core.ENGINES))), str(rng.choice(["float32", "float64"]))
    values = str(rng.choice(["normal", "normal", "normal", *estimates.VALUE_KINDS]))
    request = estimates.DRAW_BY_KIND["plane" if engine == "separable" else kind](rng, engine, dtype)
    options = {**request.options, "method": core.ENGINES[engine].METHOD if rng.random() < 0.5 else "auto"}
    is_correlate = request.verb == "correlate"
    make_plan, name = (core.plan_correlate, "kernel") if is_correlate else (core.plan_conv2d, "weight")
    shapes: dict[str, Any] = {"input": np.broadcast_to(np.float32(0), request.input)}
    shapes[name] = np.broadcast_to(np.float32(0), request.kernel)
    try:
        make_plan(**shapes, **options).cost  # noqa: B018 - raises if no engine can compute it
    except core.CoreError:
        return None
    image, kernel = estimates.build_arrays(rng, request, values)
    query = {option: _format_value(options[option]) for option in OPTION_NAMES if option in options}
    accept = str(rng.choice(["application/x-npy", "application/x-npz", "application/json"]))
    return _build_npz_request(f"/{request.verb}", {"input": image, name: kernel}, query, accept, str(request))


def build_fit_request(arguments: dict[str, Any]) -> HttpRequest:
    """Build the request for a fit, as npz, or as JSON if it has pairs."""
    text = fit_estimates.describe_fit(arguments)
    if "pairs" in arguments:
        pairs = [{"input": _to_array(pair[0]), "target": _to_array(pair[1])} for pair in arguments["pairs"]]
        content = json.dumps({**arguments, "pairs": pairs}).encode()
        return HttpRequest("POST", "/train-kernel", {"Content-Type": "application/json"}, content, text)
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    query = {name: _format_value(value) for name, value in arguments.items() if name not in arrays}
    return _build_npz_request("/train-kernel", arrays, query, "application/json", text)


def _build_npz_request(
    path: str, arrays: Mapping[str, Any], query: Mapping[str, str], accept: str, text: str
) -> HttpRequest:
    file = io.BytesIO()
    np.savez(file, **arrays)
    headers = {"Content-Type": "application/x-npz", "Accept": accept}
    return HttpRequest("POST", f"{path}?{urlencode(query)}", headers, file.getvalue(), text)


def _to_array(values: Any) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
    return {"shape": values.shape, "dtype": str(values.dtype), "data": data}


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_memory_mb(pid: int, field: str = "VmHWM") -> float:
    """Return a memory field of the server, by default the peak resident memory, in 10^6 bytes."""
    return sum_memory_mb(pid, field, is_compiler=False)


def sum_memory_mb(pid: int, field: str, *, is_compiler: bool) -> float:
    """Return the sum of a memory field of the compiling processes, or of all others, of a process and its children."""
    total = 0.0
    for one in list_process_tree(pid):
        # A process that is ending has no memory fields, and then no file.
        with contextlib.suppress(FileNotFoundError, IndexError):
            command = Path(f"/proc/{one}/cmdline").read_bytes()
            if (COMPILER_MODULE in command) != is_compiler:
                continue
            status = Path(f"/proc/{one}/status").read_text(encoding="ascii")
            total += int(status.partition(f"{field}:")[2].split()[0]) * 1024 / 1e6
    return total


def main() -> int:
    """Send the requests and report the peak memory; the exit code is 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--memory-mb", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    os.environ["CORR2D_MEMORY_MB"] = str(options.memory_mb)
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        start_service(SERVICE_COMMAND, Path(folder) / "log") as (address, pid),
    ):
        ready = read_memory_mb(pid, "VmRSS")
        print(f"before the first request: {ready:.0f} MB", flush=True)
        client = httpx.Client(base_url=address, timeout=120)
        highest, compiler = read_memory_mb(pid), 0.0

        def send(posted: HttpRequest) -> None:
            nonlocal highest, compiler
            response = client.request(posted.method, posted.path, content=posted.body, headers=posted.headers)
            statuses[response.status_code] += 1
            if response.status_code not in (HTTPStatus.OK, *REJECTION_STATUSES):
                wrong.append(f"{response.status_code} {response.text[:300]} for {posted.text}")
            compiler = max(compiler, sum_memory_mb(pid, "VmHWM", is_compiler=True))
            if (peak := read_memory_mb(pid)) > highest + 20:
                highest = peak
                print(f"{sum(statuses.values()):5} requests: {peak:6.0f} MB, after {posted.text}", flush=True)

        with ThreadPoolExecutor(options.clients) as clients:
            waiting: list[Any] = []
            for posted in draw_requests(options.requests, options.seed):
                waiting = [future for future in waiting if not future.done()]
                if len(waiting) >= 2 * options.clients:
                    waiting.pop(0).result()
                waiting.append(clients.submit(send, posted))
            for future in waiting:
                future.result()
        peak = read_memory_mb(pid)
    print("\n".join(wrong))
    counted = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    excess = peak - ready - options.memory_mb
    print(f"{counted}; peak {peak:.0f} MB: {excess:+.0f} MB above the limit (allowed: {ALLOWED_ABOVE_MB} MB)")
    print(f"compiling process: peak {compiler:.0f} MB")
    return 1 if wrong or excess > ALLOWED_ABOVE_MB else 0


if __name__ == "__main__":
    sys.exit(main())
