"""Compare the time of core.conv2d with torch, ONNX Runtime and OpenVINO on layers of many channels, on the CPU.

    make layers                                      everything, in about 4 minutes
    .venv/bin/python benchmarks/layers.py --help     fewer layers, more time, a Markdown file

Tables: A row is a layer: "1 x 64 x 56 x 56 -> 64, 3 x 3" is one image of 64 channels and 64 filters. Numbers are median
milliseconds of one call, with float32 input and output in the layout (N, C, H, W) and a new output in each call.
"core" is a core.Conv2d, "weight in each call" core.conv2d. "torch channels_last" includes the conversions.
"core / best" is the time of core divided by that of the fastest peer.
"chosen / fastest" is the time of the engine that core chose divided by that of its fastest engine.

Method: Each library has a process of its own, which is stopped (SIGSTOP) while another one is timed, because threads
that wait for work use the cores. The processes take turns of 0.06 seconds, three times for each layer; the first calls
of a turn do not count. core.Conv2d, ONNX Runtime and OpenVINO get the weight when the layer is made; torch and
core.conv2d get it in each call. Before a layer is timed, the output of each library is checked.
"""

import argparse
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from measurement.layer import measure_layer, start_children
from measurement.layer_peers import PEER_PACKAGES, PEERS, Layer
from reports.layer import format_claims, format_table
from reports.tables import get_cpu_model, print_progress

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
