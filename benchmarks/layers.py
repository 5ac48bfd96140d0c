"""Compare the time of core.conv2d with torch, ONNX Runtime and OpenVINO on layers of many channels, on the CPU.

    make layers                                      everything, in about 4 minutes
    .venv/bin/python benchmarks/layers.py --help     fewer layers, more time, a Markdown file

Tables: A row is a layer: "1 x 64 x 56 x 56 -> 64, 3 x 3" is one image of 64 channels and 64 filters. Numbers are median
milliseconds of one call, with float32 input and output in the layout (N, C, H, W) and a new output in each call.
"torch channels_last" includes the conversions. "core / best" is the time of core divided by that of the fastest peer.
"chosen / fastest" is the time of the engine that core chose divided by that of its fastest engine.

Method: Each library has a process of its own, which is stopped (SIGSTOP) while another one is timed, because threads
that wait for work use the cores. The processes take turns of 0.06 seconds, three times for each layer; the first calls
of a turn do not count. The weights are constants for ONNX Runtime and OpenVINO, which convert them when the layer is
loaded; torch and core get them in each call. Before a layer is timed, the output of each library is checked.
"""

import argparse
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from reports.tables import Claim, format_heading, format_milliseconds, format_number, get_cpu_model, print_progress

Array = NDArray[Any]
Call = Callable[[], Array]

TURN_S = 0.06
WARM_UP_CALLS = 3
MIN_CALLS = 5
TURNS = 3

SMALL_LAYER_S = 1e-4
MAX_RATIO, MAX_SMALL_RATIO, MEAN_RATIO, WINOGRAD_RATIO = 1.1, 1.25, 0.9, 0.8
GOOD_CHOICE_RATIO, GOOD_CHOICES = 1.1, 0.95

TOLERANCE = 1e-5
"""Largest accepted error, as a fraction of the largest output."""


class Layer(NamedTuple):
    """A layer: shape of the images, filters, side of the kernel, stride and groups; padding keeps the size."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        steps = f", stride {self.stride}" if self.stride > 1 else ""
        grouped = (
            "" if self.groups == 1 else ", depthwise" if self.groups == self.channels else f", {self.groups} groups"
        )
        image = f"{self.batch} x {self.channels} x {self.height} x {self.width}"
        return f"{image} -> {self.filters}, {self.kernel} x {self.kernel}{steps}{grouped}"

    @property
    def padding(self) -> int:
        """Pixels of zeros on each side."""
        return self.kernel // 2

    def draw(self) -> tuple[Array, Array]:
        """Return random images and kernels."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((self.batch, self.channels, self.height, self.width), np.float32)
        weight = rng.standard_normal((self.filters, self.channels // self.groups, self.kernel, self.kernel), np.float32)
        return images, weight


LAYERS = (
    *(Layer(1, channels, side, side, channels, 3) for channels, side in ((16, 112), (32, 56), (64, 56), (64, 112))),
    *(Layer(1, channels, side, side, channels, 3) for channels, side in ((128, 28), (128, 56), (256, 14), (256, 28))),
    *(Layer(1, channels, side, side, channels, 3) for channels, side in ((512, 7), (512, 14), (24, 65), (48, 33))),
    *(Layer(batch, 64, 56, 56, 64, 3) for batch in (2, 8)),
    *(Layer(4, channels, side, side, channels, 3) for channels, side in ((32, 28), (128, 14), (256, 7))),
    *(Layer(1, channels, 128, 128, filters, 3) for channels, filters in ((16, 32), (32, 16), (8, 64), (64, 8))),
    *(Layer(1, 3, 224, 224, filters, 3) for filters in (16, 64)),
    Layer(1, 8, 256, 256, 8, 3),
    Layer(1, 16, 40, 300, 16, 3),
    Layer(1, 32, 17, 17, 64, 3),
    *(Layer(1, channels, side, side, filters, 3, 2) for channels, side, filters in ((64, 56, 128), (128, 56, 128))),
    *(Layer(1, channels, side, side, filters, 3, 2) for channels, side, filters in ((256, 28, 256), (3, 224, 32))),
    Layer(1, 3, 224, 224, 64, 7, 2),
    Layer(4, 3, 112, 112, 32, 7, 2),
    *(Layer(1, channels, side, side, channels, 5) for channels, side in ((16, 64), (32, 64), (64, 28), (96, 27))),
    Layer(1, 3, 128, 128, 8, 5),
    Layer(1, 1, 512, 512, 8, 5),
    Layer(1, 48, 28, 28, 64, 5, 2),
    Layer(1, 16, 64, 64, 16, 7),
    Layer(1, 16, 64, 64, 16, 9),
    *(Layer(1, channels, 56, 56, filters, 1) for channels, filters in ((64, 64), (64, 256), (256, 64))),
    *(Layer(1, channels, 28, 28, filters, 1) for channels, filters in ((128, 512), (512, 128))),
    *(Layer(1, channels, 14, 14, filters, 1) for channels, filters in ((256, 64), (256, 1024), (1024, 256))),
    Layer(1, 256, 56, 56, 128, 1, 2),
    Layer(8, 32, 56, 56, 16, 1),
    *(Layer(1, channels, side, side, channels, 3, 1, channels) for channels, side in ((32, 112), (96, 56), (384, 14))),
    *(Layer(1, channels, side, side, channels, 3, 2, channels) for channels, side in ((96, 112), (144, 56), (32, 224))),
    *(Layer(1, channels, side, side, channels, 5, 1, channels) for channels, side in ((72, 28), (240, 14))),
    Layer(1, 72, 56, 56, 72, 5, 2, 72),
    *(Layer(1, channels, 56, 56, channels, 3, 1, groups) for channels, groups in ((128, 32), (64, 4))),
)


def prepare_torch(layer: Layer, threads: int, *, channels_last: bool = False) -> Call:
    """Return a call of torch's conv2d, with or without conversion to and from channels_last."""
    import torch

    torch.set_num_threads(threads)
    images, weight = (torch.from_numpy(array) for array in layer.draw())
    options = None, layer.stride, layer.padding, 1, layer.groups
    if not channels_last:
        return lambda: torch.nn.functional.conv2d(images, weight, *options).numpy()

    def convolve() -> Array:
        inputs, kernels = (part.to(memory_format=torch.channels_last) for part in (images, weight))
        output: Array = torch.nn.functional.conv2d(inputs, kernels, *options).contiguous().numpy()
        return output

    return convolve


def prepare_onnx_runtime(layer: Layer, threads: int) -> Call:
    """Return a call of ONNX Runtime on a model of the one layer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    model = build_model(layer).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images = layer.draw()[0]
    return lambda: session.run(None, {"images": images})[0]


def prepare_openvino(layer: Layer, threads: int) -> Call:
    """Return a call of OpenVINO on a model of the one layer, in float32."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(build_model(layer).SerializeToString()), "CPU", options
    )
    request, images = compiled.create_infer_request(), layer.draw()[0]

    def convolve() -> Array:
        # The output belongs to the request: a new one is a copy, as for the others.
        output: Array = request.infer([images], share_inputs=True)[0].copy()
        return output

    return convolve


def build_model(layer: Layer) -> Any:
    """Return an ONNX model of the layer, with its kernels as constants."""
    from onnx import TensorProto, helper, numpy_helper

    images, weight = layer.draw()
    node = helper.make_node(
        "Conv",
        ["images", "weight"],
        ["output"],
        kernel_shape=[layer.kernel] * 2,
        strides=[layer.stride] * 2,
        pads=[layer.padding] * 4,
        group=layer.groups,
    )
    shapes = [("images", images.shape), ("output", None)]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in shapes)
    graph = helper.make_graph([node], "layer", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class CoreCalls:
    """The calls of core in its process: with its own choice, and each engine alone."""

    def __init__(self, threads: int) -> None:
        import torch

        import core

        torch.set_num_threads(threads)
        self._machine = core.measure_machine(core.Machine(threads))
        self._layer: Layer | None = None
        self._arrays: tuple[Array, ...] = ()

    def prepare(self, layer: Layer, engine: str | None) -> Call | None:
        """Return a call of core.conv2d; None if the engine cannot compute the layer."""
        import core

        try:
            self._convolve(layer, engine)
        except core.MethodUnavailable:
            return None
        return lambda: np.asarray(self._convolve(layer, engine).array)

    def choose(self, layer: Layer) -> str:
        """Return the engine that core chooses."""
        return str(self._convolve(layer, None).engine)

    def _convolve(self, layer: Layer, engine: str | None) -> Any:
        import core

        if layer != self._layer:
            self._layer, self._arrays = layer, layer.draw()
        options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        if engine is not None:
            options |= {"engines": (engine,), "method": core.ENGINES[engine].METHOD}
        return core.conv2d(*self._arrays, machine=self._machine, **options)


PEERS: dict[str, Callable[[Layer, int], Call]] = {
    "torch": prepare_torch,
    "torch channels_last": lambda layer, threads: prepare_torch(layer, threads, channels_last=True),
    "ONNX Runtime": prepare_onnx_runtime,
    "OpenVINO": prepare_openvino,
}
PEER_PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}

CORE_ENGINES = ("stencil", "implicit_gemm", "winograd", "torch")
"""Engines that are timed alone; the others are never the fastest for these layers."""


def serve_calls(name: str, threads: int, connection: Connection) -> None:
    """Prepare and time calls in a process of its own, as the main process asks."""
    call: Call | None = None
    of_core = CoreCalls(threads) if name == "core" else None
    while True:
        layer, engine = connection.recv()
        if layer is None:
            connection.send(time_calls(call) if call is not None else [])
        elif of_core is None:
            call = PEERS[name](layer, threads)
            connection.send(call())
        elif engine == "choice":
            connection.send(of_core.choose(layer))
        else:
            call = of_core.prepare(layer, engine)
            connection.send(None if call is None else call())


def time_calls(call: Call) -> list[float]:
    """Return the seconds of each call of a turn."""
    for _ in range(WARM_UP_CALLS):
        call()
    seconds: list[float] = []
    end = time.perf_counter() + TURN_S
    while time.perf_counter() < end or len(seconds) < MIN_CALLS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


class Child:
    """A process with one library, stopped unless it works."""

    def __init__(self, name: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve_calls, args=(name, threads, other), daemon=True)
        self._process.start()

    def ask(self, layer: Layer | None = None, engine: str | None = None) -> Any:
        """Prepare a layer and return its output, or time the prepared one; the process is stopped afterwards."""
        self._signal(signal.SIGCONT)
        self._connection.send((layer, engine))
        answer = self._connection.recv()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid or 0, number)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


@contextmanager
def start_children(names: Sequence[str], threads: int) -> Iterator[dict[str, Child]]:
    """Start a process for each library."""
    children: dict[str, Child] = {}
    try:
        for name in names:
            children[name] = Child(name, threads)
        yield children
    finally:
        for child in children.values():
            child.end()


class Row(NamedTuple):
    """Median seconds of a layer: of core, of each peer, and of each engine alone; the chosen engine."""

    layer: Layer
    threads: int
    core: float
    peers: dict[str, float]
    engines: dict[str, float]
    chosen: str

    @property
    def ratio(self) -> float:
        """Time of core divided by that of the fastest peer."""
        return self.core / min(self.peers.values())

    @property
    def regret(self) -> float:
        """Time of the chosen engine divided by that of the fastest."""
        return self.engines.get(self.chosen, self.core) / min(self.engines.values())


def measure_layer(layer: Layer, threads: int, children: dict[str, Child]) -> Row:
    """Check and time one layer."""
    core = children["core"]
    expected = children["torch"].ask(layer)
    peers = [name for name in children if name != "core"]
    for name in peers:
        check_output(name, layer, children[name].ask(layer), expected)
    seconds: dict[str, list[float]] = {name: [] for name in [*peers, "core", *CORE_ENGINES]}
    for _ in range(TURNS):
        for name in peers:
            seconds[name] += children[name].ask()
        for engine in (None, *CORE_ENGINES):
            output = core.ask(layer, engine)
            if output is not None:
                check_output(engine or "core", layer, output, expected)
                seconds[engine or "core"] += core.ask()
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    return Row(
        layer,
        threads,
        medians["core"],
        {name: medians[name] for name in peers},
        {name: medians[name] for name in CORE_ENGINES if name in medians},
        core.ask(layer, "choice"),
    )


def check_output(name: str, layer: Layer, output: Array, expected: Array) -> None:
    """Exit if an output is wrong."""
    error = float(np.abs(output - expected).max() / np.abs(expected).max())
    if error > TOLERANCE:
        sys.exit(f"{name}, {layer}: the output is off by {error:.2g} of its largest value")


def format_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of the layers with one number of threads."""
    names = list(rows[0].peers)
    lines = format_heading("milliseconds", "core", "engine", *names, "core / best", "chosen / fastest")
    for row in rows:
        numbers = [format_milliseconds(row.peers[name]) for name in names]
        ratios = format_number(row.ratio), format_number(row.regret)
        lines.append(
            f"| {' | '.join([str(row.layer), format_milliseconds(row.core), row.chosen, *numbers, *ratios])} |"
        )
    return lines


def format_claims(rows: Sequence[Row]) -> list[str]:
    """Return the table of targets."""
    small = [row for row in rows if min(row.peers.values()) < SMALL_LAYER_S]
    large = [row for row in rows if row not in small]
    many = [
        row
        for row in rows
        if row.layer.kernel == 3
        and row.layer.stride == row.layer.groups == 1
        and 16 <= row.layer.channels <= 256
        and 16 <= row.layer.filters <= 256
    ]
    worst, worst_small = (max((row.ratio for row in some), default=None) for some in (large, small))
    claims = [
        Claim("core / best peer, geometric mean", MEAN_RATIO, mean_ratio(rows), at_most=True),
        Claim("core / best peer, 3 x 3 with 16 to 256 channels, mean", WINOGRAD_RATIO, mean_ratio(many), at_most=True),
        Claim("core / best peer, worst", MAX_RATIO, worst, at_most=True),
        Claim("core / best peer, worst below 0.1 ms", MAX_SMALL_RATIO, worst_small, at_most=True),
        Claim(
            f"layers whose chosen engine takes at most {GOOD_CHOICE_RATIO} times the fastest",
            GOOD_CHOICES,
            sum(row.regret <= GOOD_CHOICE_RATIO for row in rows) / len(rows),
        ),
    ]
    return [*format_heading("measurement", "target", "reached", "holds"), *(claim.line() for claim in claims)]


def mean_ratio(rows: Sequence[Row]) -> float | None:
    """Return the geometric mean of core / best, None without rows."""
    return math.exp(statistics.mean(math.log(row.ratio) for row in rows)) if rows else None


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", default=cores, help="(default: %(default)s)")
    parser.add_argument("--layers", metavar="TEXT", default="", help="only layers whose description contains this text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE, as Markdown")
    return parser.parse_args()


def main() -> None:
    """Measure, print the report, and write the requested file."""
    arguments = parse_arguments()
    layers = [layer for layer in LAYERS if arguments.layers in str(layer)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *PEER_PACKAGES.values()))
    parts = [f"{datetime.now(UTC):%Y-%m-%d}, {get_cpu_model()}; {versions}"]
    for threads in arguments.threads:
        rows = []
        with start_children(["core", *PEERS], threads) as children:
            for layer in layers:
                rows.append(measure_layer(layer, threads, children))
                print_progress(format_table(rows[-1:])[-1])
        plural = "" if threads == 1 else "s"
        parts.append("\n".join([f"## {threads} thread{plural}", "", *format_table(rows), "", *format_claims(rows)]))
    text = "\n\n".join(parts) + "\n"
    print(text, end="")
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
