"""Draw the pictures of the README again: `make pictures`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import core
from service.codecs import FILE_READERS, FILE_WRITERS

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Write edges.png and loss.png beside camera.png."""
    camera = FILE_READERS[".png"]((IMAGES / "camera.png").read_bytes())
    edges = core.correlate(camera, "sobel_x", mode="same", boundary="symmetric").output
    (IMAGES / "edges.png").write_bytes(b"".join(FILE_WRITERS[".png"](edges.numpy())))

    target = core.correlate(camera, "sobel_x").output
    fit = core.fit_kernel(camera, target, loss="mean", learning_rate=4.5e-6, steps=300, seed=0)
    history = np.array([*fit.loss_history, fit.final_loss])

    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(history, color="#1f6feb")
    axes.set(xlabel="step", ylabel="mean squared error", xlim=(0, len(history) - 1))
    axes.grid(color="#d0d7de", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "loss.png", dpi=120)


if __name__ == "__main__":
    main()
