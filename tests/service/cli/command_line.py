"""Run the command `corr2d` in this process, on local files."""

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from service.cli.main import app

CAMERA = Path("docs/images/camera.png")


def run_corr2d(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": "200"})


def save_npy(path: Path, array: object) -> Path:
    np.save(path, np.asarray(array))
    return path


def save_png(path: Path, array: object) -> Path:
    """Save an array as PNG without scaling its values."""
    Image.fromarray(np.clip(np.rint(np.asarray(array)), 0, 255).astype(np.uint8)).save(path)
    return path
