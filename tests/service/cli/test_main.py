"""Tests of the command line without a server: core on local files."""

import io
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

import core
from service.codecs.registry import READABLE_SUFFIXES, WRITABLE_SUFFIXES
from service.configuration.settings import Settings
from tests.service.cli.command_line import CAMERA, run_corr2d, save_npy

HTTP_WORDS = re.compile(r"\b(request|body|query|send|http|content-type|accept)\b", re.IGNORECASE)


def test_image_edges_as_array_match_scipy(tmp_path: Path) -> None:
    output = tmp_path / "edges.npy"
    options = ("--mode", "same", "--boundary", "symmetric", "--dtype", "float64")
    result = run_corr2d("correlate", CAMERA, "--kernel", "sobel_x", "-o", output, *options)
    assert result.exit_code == 0, result.output
    assert "docs/images/camera.png (512, 512) -> " in result.output
    assert "engine torch on " in result.output
    expected = scipy.ndimage.sobel(np.asarray(Image.open(CAMERA)).astype(np.float64), axis=1, mode="reflect")
    assert np.abs(np.load(output) - expected).max() <= 1e-3 * 255


def test_image_edges_as_image_match_scipy(tmp_path: Path) -> None:
    output = tmp_path / "edges.png"
    assert (
        run_corr2d(
            "correlate", CAMERA, "-k", "sobel_x", "--mode", "same", "--boundary", "symmetric", "-o", output
        ).exit_code
        == 0
    )
    expected = scipy.ndimage.sobel(np.asarray(Image.open(CAMERA)).astype(np.float64), axis=1, mode="reflect")
    scaled = np.rint((expected - expected.min()) * 255 / (expected.max() - expected.min()))
    image = Image.open(output)
    assert (image.mode, image.size) == ("L", (512, 512))
    assert np.abs(np.asarray(image).astype(int) - scaled).max() <= 1


def test_colour_images_keep_their_planes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, size=(9, 7, 3), dtype=np.uint8)
    pixels[0, 0], pixels[1, 1] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "in.png")
    assert run_corr2d("correlate", tmp_path / "in.png", "-k", "identity", "-o", tmp_path / "out.png").exit_code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), pixels)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("1", (4, 5)), ("L", (4, 5)), ("LA", (4, 5)), ("P", (3, 4, 5)), ("RGBA", (3, 4, 5)), ("I;16", (4, 5))],
)
def test_images_of_every_kind_are_read(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / "in.png")
    assert run_corr2d("correlate", tmp_path / "in.png", "-k", "identity", "-o", tmp_path / "out.npy").exit_code == 0
    assert np.load(tmp_path / "out.npy").shape == shape


def test_result_is_printed_without_an_output_file(tmp_path: Path) -> None:
    image = save_npy(tmp_path / "x.npy", [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    kernel = save_npy(tmp_path / "k.npy", [[0, 1], [2, 3]])
    assert json.loads(run_corr2d("correlate", image, "--kernel", kernel).stdout) == [[19, 25], [37, 43]]


def test_conv2d_on_files_matches_torch(tmp_path: Path, rng: np.random.Generator) -> None:
    images, weight, bias = rng.normal(size=(2, 4, 9, 8)), rng.normal(size=(6, 2, 3, 2)), rng.normal(size=6)
    files = [save_npy(tmp_path / f"{name}.npy", array) for name, array in (("x", images), ("w", weight), ("b", bias))]
    options = ["--stride", "2,1", "--padding", "1,2", "--dilation", "1,2", "--groups", "2", "--dtype", "float64"]
    output = tmp_path / "y.npy"
    result = run_corr2d("conv2d", files[0], files[1], "--bias", files[2], "-o", output, *options)
    assert result.exit_code == 0, result.output
    options_of_torch: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    x, w, b = (torch.from_numpy(array) for array in (images, weight, bias))
    expected = torch.nn.functional.conv2d(x, w, b, **options_of_torch)
    np.testing.assert_allclose(np.load(output), expected, rtol=1e-12)
    same = run_corr2d("conv2d", files[0], files[1], "--groups", 2, "--padding", "same")
    assert np.shape(json.loads(same.stdout)) == (2, 6, 9, 8)


def test_kernels_lists_names_and_prints_one() -> None:
    listed = run_corr2d("kernels").stdout
    for family in core.KERNELS.values():
        assert family.signature in listed
    rows = [[float(word) for word in line.split()] for line in run_corr2d("kernels", "sobel_x").stdout.splitlines()]
    assert rows == core.named_kernel("sobel_x").tolist()


def test_config_shows_every_setting_and_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORR2D_QUEUE", "5")
    shown = {line.split()[0]: line.split()[1:3] for line in run_corr2d("config", "--port", "81").stdout.splitlines()}
    for name in Settings.model_fields:
        assert f"CORR2D_{name.upper()}" in shown
    assert shown["CORR2D_PORT"] == ["81", "flag"]
    assert shown["CORR2D_QUEUE"] == ["5", "environment"]
    assert shown["CORR2D_HOST"] == ["127.0.0.1", "default"]
    assert shown["CORR2D_API_KEYS"] == ["unset", "default"]


def test_config_shows_computed_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("CORR2D_PORT", "tcp://10.0.0.7:8000")

    def read_config(*flags: str) -> dict[str, list[str]]:
        return {line.split()[0]: line.split()[1:3] for line in run_corr2d("config", *flags).stdout.splitlines()}

    shown = read_config("--workers", "2", "--memory-mb", "100")
    assert shown["CORR2D_THREADS"] == [str(core.usable_cores()), "computed"]
    assert shown["CORR2D_MEMORY_MB"] == ["100.0", "flag"]
    assert shown["CORR2D_MAX_COMPUTE_MB"] == ["25.0", "computed"]
    # The variable of Kubernetes is not a setting.
    assert shown["CORR2D_PORT"] == ["8000", "default"]
    megabytes, origin = read_config()["CORR2D_MEMORY_MB"]
    assert float(megabytes) == pytest.approx(0.6 * core.usable_memory() / 1e6, abs=1)
    assert origin == "computed"


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version_lists_its_dependencies(argument: str) -> None:
    assert f"torch {version('torch')}" in run_corr2d(argument).stdout


def test_help_lists_the_formats_of_the_registry() -> None:
    text = run_corr2d("correlate", "--help").stdout
    for suffixes in (READABLE_SUFFIXES, WRITABLE_SUFFIXES):
        assert f"({', '.join(suffix.removeprefix('.') for suffix in suffixes)})" in text
    assert "jpeg" in text


@pytest.mark.parametrize("command", ["serve", "correlate", "conv2d", "train", "kernels", "config", "version"])
def test_every_command_has_help(command: str) -> None:
    result = run_corr2d(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout) > 200
    assert command in run_corr2d("--help").stdout


def test_serve_has_a_flag_for_every_setting() -> None:
    text = run_corr2d("serve", "--help").stdout
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert f"CORR2D_{name.upper()}" in text
        assert str(field.description).split(";", maxsplit=1)[0][:30] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["correlate", "{x}", "-k", "sobelx"], "did you mean sobel_x"),
        (["correlate", "{x}", "-k", "missing.npy"], "missing.npy"),
        (["correlate", "{x}", "-k", "box(9)"], 'mode "valid" requires it to fit'),
        (["correlate", "{x}", "-k", "box(1)", "--mode", "most"], 'mode "most" is not one of'),
        (
            ["correlate", "{x}", "-k", "box(1)", "-o", "{tmp}/y.bmp"],
            f"cannot write .bmp; supported: {', '.join(WRITABLE_SUFFIXES)}",
        ),
        (["correlate", "{x}", "-k", "box(1)", "-o", "{tmp}/none/y.npy"], "No such file"),
        (["correlate", "{text}", "-k", "box(1)"], f"cannot read .txt; supported: {', '.join(READABLE_SUFFIXES)}"),
        (["correlate", "{broken}", "-k", "box(1)"], "broken.png: the PNG image is cut off after 200 bytes"),
        (["correlate", "{broken_npy}", "-k", "box(1)"], "broken.npy: "),
        (["correlate", "{pickled}", "-k", "box(1)"], "pickled.npy: "),
        (
            ["correlate", "{deep}", "-k", "box(1)", "-o", "{tmp}/y.png"],
            "a PNG holds one plane (H, W) or three (3, H, W); use .npy",
        ),
        (["correlate", "{nan}", "-k", "box(1)", "-o", "{tmp}/y.png"], "finite"),
        (["conv2d", "{x}", "{x}", "--stride", "0"], "stride 0 is neither"),
        (["conv2d", "{x}", "{x}", "--padding", "full"], "padding 'full' is not one of"),
        (["train", "{x}", "{x}", "--steps", "0"], "steps 0"),
        (["train", "{x}", "{x}", "--steps", "1000001"], "steps 1000001 is not an integer from 1 to 1000000"),
        (
            ["train", "{x}", "{x}", "--learning-rate", "fast"],
            "learning_rate 'fast' is not a number above 0, or \"auto\"",
        ),
        (["train", "{x}", "{x}", "--huber-delta", "2"], 'huber_delta does not apply to loss "sum"'),
        (["train", "{x}", "{x}", "--loss", "huber", "--huber-delta", "0"], "huber_delta 0.0 is not a number above 0"),
        (["train", "{x}", "{x}", "--learning-rate", "nan"], "learning_rate nan is not a number above 0"),
        (["train", "{x}", "{x}", "--solver", "newton"], 'solver "newton" is not one of: exact, sgd'),
        (["train", "{x}", "{x}", "--solver", "adam", "--betas", "0.9"], "betas 0.9 is not two numbers"),
        (["train", "{x}", "{x}", "--solver", "adam", "--betas", "0.9,high"], "betas '0.9,high' is not two numbers"),
        (["train", "{x}", "{x}", "--betas", "0.9,0.99"], 'betas does not apply to solver "sgd"'),
        (["train", "{x}", "{x}", "--momentum", "0.9"], 'momentum does not apply to solver "sgd"'),
        (["train", "{x}", "{x}", "--tolerance", "1"], "tolerance 1.0 is not a number above 0 to below 1"),
        (["train", "{x}", "{x}", "--ridge", "-1"], "ridge -1.0 is not a number from 0 on"),
        (["train", "{x}", "{x}", "--sum-to", "1"], 'constraints need solver "exact" and loss "sum" or "mean"'),
        (["train", "{x}", "{x}", "--separable", "0"], "separable 0 is not a rank: an integer from 1 on, or true for 1"),
        (["train", "{x}", "{x}", "--symmetric", "square"], 'symmetric "square" is not one of: horizontal, vertical'),
        (["train", "{x}", "{x}", "--batch-size", "2"], "batch_size 2 is above the number of images, 1"),
        (["train", "{x}", "{x}", "--kernel-size", "7"], "is larger than the input"),
        (["train", "{x}", "{x}", "--kernel-size", "wide"], "kernel_size 'wide' is neither"),
        (["train", "{x}", "{x}", "--kernel-size", "0"], "kernel_size 0 is neither"),
        (["train", "{x}", "{x}", "--kernel-size", "3", "--dilation", "0"], "dilation 0 is neither"),
        (
            ["train", "{x}", "{x}", "--kernel-size", "3", "--padding-mode", "reflect"],
            "makes (1, 2) out of input (3, 4)",
        ),
        (["train", "{x}", "{x}", "--weights", "{deep}"], "weights (1, 2, 3, 4) does not fit target (1, 1, 3, 4)"),
        (["train", "{x}", "{x}", "--device", "cuda:99"], "cuda:99"),
        (["train", "{x}", "{nan}"], "target holds 12 values that are NaN or infinite"),
        (["kernels", "sobel_z"], "is not a named kernel"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1 2 3")
    (tmp_path / "broken.png").write_bytes(CAMERA.read_bytes()[:200])
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = {
        "tmp": tmp_path,
        "x": save_npy(tmp_path / "x.npy", np.ones((3, 4))),
        "deep": save_npy(tmp_path / "deep.npy", np.ones((2, 3, 4))),
        "nan": save_npy(tmp_path / "nan.npy", np.full((3, 4), np.nan)),
        "text": tmp_path / "x.txt",
        "broken": tmp_path / "broken.png",
        "broken_npy": tmp_path / "broken.npy",
        "pickled": tmp_path / "pickled.npy",
    }
    result = run_corr2d(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("corr2d: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not HTTP_WORDS.search(result.stderr)


@pytest.mark.slow
def test_piped_command_loads_only_the_packages_it_needs() -> None:
    script = """
import sys
from service.cli.main import app
assert not {"torch", "core"} & set(sys.modules)
app(sys.argv[1:], standalone_mode=False)
assert "core" in sys.modules
unneeded = {"fastapi", "starlette", "uvicorn", "prometheus_client", "numba", "matplotlib", "scipy.linalg"}
assert not unneeded & set(sys.modules), unneeded & set(sys.modules)
"""
    command = [sys.executable, "-c", script, "correlate", "-", "-k", "[[1,0,-1]]", "-o", "-"]
    done = subprocess.run(command, input=CAMERA.read_bytes(), capture_output=True, check=True)
    assert np.asarray(Image.open(io.BytesIO(done.stdout))).shape == (512, 510)
    assert done.stderr.startswith(b"stdin (512, 512) -> stdout (512, 510), engine torch on ")


@pytest.mark.slow
def test_explain_prints_a_table_of_the_engines() -> None:
    result = run_corr2d("explain", "64x80", "5", "--threads", "1", "--rank", "1")
    assert result.exit_code == 0
    for name in core.ENGINES:
        assert name in result.output
    assert result.output.count("chosen") == 1
    layer = run_corr2d("explain", "1x3x32x32", "4x3x3x3", "--stride", "2", "--padding", "1")
    assert "output (16, 16)" in layer.output
    assert run_corr2d("explain", "64y80", "5").exit_code != 0
    assert "larger than the input" in run_corr2d("explain", "3", "5").output
