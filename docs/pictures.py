"""Regenerate the images of the README: `make pictures`."""

from pathlib import Path

import core
from service.cli.files import Target, read_array
from service.codecs import loss_curve

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Write edges.png and loss.png to docs/images."""
    camera = read_array(IMAGES / "camera.png", "input")
    edges = core.correlate(camera, "sobel_x", mode="same", boundary="symmetric").output
    Target.open(IMAGES / "edges.png", ".png").write({"output": edges.numpy()})

    target = core.correlate(camera, "sobel_x").output
    fit = core.fit_kernel(camera, target, loss="mean", learning_rate=4.5e-6, steps=300, seed=0)
    (IMAGES / "loss.png").write_bytes(
        loss_curve.draw_png({name: getattr(fit, name) for name in loss_curve.PLOTTED_FIELDS})
    )


if __name__ == "__main__":
    main()
