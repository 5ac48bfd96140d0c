"""The command line, offline: the same core on files."""

import json
import os
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
from typer.testing import CliRunner, Result

import core
from service.__main__ import app
from service.offline import sparkline
from service.settings import Settings

CAMERA = Path("docs/images/camera.png")


def corr2d(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def saved(path: Path, array: object) -> Path:
    np.save(path, np.asarray(array))
    return path


def test_a_pictures_edges_are_scipys_as_an_array(tmp_path: Path) -> None:
    output = tmp_path / "edges.npy"
    options = ("--mode", "same", "--boundary", "symmetric", "--dtype", "float64")
    result = corr2d("correlate", CAMERA, "--kernel", "sobel_x", "-o", output, *options)
    assert result.exit_code == 0, result.output
    assert "docs/images/camera.png (512, 512) -> " in result.output
    assert "engine tensor on " in result.output
    expected = scipy.ndimage.sobel(np.asarray(Image.open(CAMERA)).astype(np.float64), axis=1, mode="reflect")
    assert np.abs(np.load(output) - expected).max() <= 1e-3 * 255


def test_a_pictures_edges_are_scipys_as_a_picture(tmp_path: Path) -> None:
    output = tmp_path / "edges.png"
    assert (
        corr2d(
            "correlate", CAMERA, "-k", "sobel_x", "--mode", "same", "--boundary", "symmetric", "-o", output
        ).exit_code
        == 0
    )
    expected = scipy.ndimage.sobel(np.asarray(Image.open(CAMERA)).astype(np.float64), axis=1, mode="reflect")
    scaled = np.rint((expected - expected.min()) * 255 / (expected.max() - expected.min()))
    picture = Image.open(output)
    assert (picture.mode, picture.size) == ("L", (512, 512))
    assert np.abs(np.asarray(picture).astype(int) - scaled).max() <= 1


def test_colour_pictures_keep_their_planes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, size=(9, 7, 3), dtype=np.uint8)
    pixels[0, 0], pixels[1, 1] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "in.png")
    assert corr2d("correlate", tmp_path / "in.png", "-k", "identity", "-o", tmp_path / "out.png").exit_code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), pixels)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("1", (4, 5)), ("L", (4, 5)), ("LA", (4, 5)), ("P", (3, 4, 5)), ("RGBA", (3, 4, 5)), ("I;16", (4, 5))],
)
def test_pictures_of_every_kind_are_read(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / "in.png")
    assert corr2d("correlate", tmp_path / "in.png", "-k", "identity", "-o", tmp_path / "out.npy").exit_code == 0
    assert np.load(tmp_path / "out.npy").shape == shape


def test_without_a_file_to_write_the_result_is_printed(tmp_path: Path) -> None:
    image = saved(tmp_path / "x.npy", [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    kernel = saved(tmp_path / "k.npy", [[0, 1], [2, 3]])
    assert json.loads(corr2d("correlate", image, "--kernel", kernel).stdout) == [[19, 25], [37, 43]]


def test_conv2d_on_files_is_torchs(tmp_path: Path, rng: np.random.Generator) -> None:
    images, weight, bias = rng.normal(size=(2, 4, 9, 8)), rng.normal(size=(6, 2, 3, 2)), rng.normal(size=6)
    files = [saved(tmp_path / f"{name}.npy", array) for name, array in (("x", images), ("w", weight), ("b", bias))]
    options = ["--stride", "2,1", "--padding", "1,2", "--dilation", "1,2", "--groups", "2", "--dtype", "float64"]
    output = tmp_path / "y.npy"
    result = corr2d("conv2d", files[0], files[1], "--bias", files[2], "-o", output, *options)
    assert result.exit_code == 0, result.output
    options_of_torch: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    x, w, b = (torch.from_numpy(array) for array in (images, weight, bias))
    expected = torch.nn.functional.conv2d(x, w, b, **options_of_torch)
    np.testing.assert_allclose(np.load(output), expected, rtol=1e-12)
    same = corr2d("conv2d", files[0], files[1], "--groups", 2, "--padding", "same")
    assert np.shape(json.loads(same.stdout)) == (2, 6, 9, 8)


def test_the_lesson_is_learned_from_files(tmp_path: Path) -> None:
    image = np.ones((6, 8))
    image[:, 2:6] = 0
    files = saved(tmp_path / "x.npy", image), saved(tmp_path / "y.npy", core.correlate(image, [[-1, 1]]).output)
    output = tmp_path / "k.npy"
    result = corr2d("train", *files, "--seed", 1, "--steps", 100, "-o", output)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(output), [[-1, 1]], atol=1e-6)
    assert "the loss fell from" in result.stdout
    assert f"loss {'█'}" in result.stdout
    assert "100/100" in result.stderr
    printed = corr2d("train", *files, "--seed", 1, "--bias", "--learning-rate", 0.005, "--kernel-size", "1,2")
    assert "bias [" in printed.stdout
    assert "diverged" in corr2d("train", *files, "--seed", 1, "--bias").stdout


def test_kernels_lists_every_name_and_prints_the_numbers_of_one() -> None:
    listed = corr2d("kernels").stdout
    for family in core.KERNELS.values():
        assert family.signature in listed
    rows = [[float(word) for word in line.split()] for line in corr2d("kernels", "sobel_x").stdout.splitlines()]
    assert rows == core.named_kernel("sobel_x").tolist()


def test_config_shows_every_setting_and_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORR2D_QUEUE", "5")
    shown = {line.split()[0]: line.split()[1:3] for line in corr2d("config", "--port", "81").stdout.splitlines()}
    for name in Settings.model_fields:
        assert f"CORR2D_{name.upper()}" in shown
    assert shown["CORR2D_PORT"] == ["81", "flag"]
    assert shown["CORR2D_QUEUE"] == ["5", "environment"]
    assert shown["CORR2D_HOST"] == ["127.0.0.1", "default"]
    assert shown["CORR2D_THREADS"] == ["unset", "default"]


def test_version_names_what_the_numbers_rest_on() -> None:
    assert f"torch {version('torch')}" in corr2d("version").stdout


@pytest.mark.parametrize("command", ["serve", "correlate", "conv2d", "train", "kernels", "config", "version"])
def test_every_command_has_help_worth_reading(command: str) -> None:
    result = corr2d(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout) > 200
    assert command in corr2d("--help").stdout


def test_serve_has_a_flag_for_every_setting() -> None:
    text = corr2d("serve", "--help").stdout
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert f"CORR2D_{name.upper()}" in text
        assert str(field.description).split(";", maxsplit=1)[0][:30] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["correlate", "{x}", "-k", "sobelx"], "did you mean sobel_x"),
        (["correlate", "{x}", "-k", "missing.npy"], "missing.npy"),
        (["correlate", "{x}", "-k", "box(9)"], 'mode "valid" needs it to fit'),
        (["correlate", "{x}", "-k", "box(1)", "--mode", "most"], 'mode "most" is not one of'),
        (["correlate", "{x}", "-k", "box(1)", "-o", "{tmp}/y.jpg"], "cannot write .jpg; .npy, .png can be"),
        (["correlate", "{x}", "-k", "box(1)", "-o", "{tmp}/none/y.npy"], "No such file"),
        (["correlate", "{text}", "-k", "box(1)"], "cannot read .txt; .npy, .png, .jpg, .jpeg can be"),
        (["correlate", "{broken}", "-k", "box(1)"], "broken.png: the PNG picture is cut off after 200 bytes"),
        (["correlate", "{broken_npy}", "-k", "box(1)"], "broken.npy: "),
        (["correlate", "{pickled}", "-k", "box(1)"], "pickled.npy: "),
        (
            ["correlate", "{deep}", "-k", "box(1)", "-o", "{tmp}/y.png"],
            "a PNG holds one plane (H, W) or three (3, H, W); ask for",
        ),
        (["correlate", "{nan}", "-k", "box(1)", "-o", "{tmp}/y.png"], "finite"),
        (["conv2d", "{x}", "{x}", "--stride", "0"], "stride 0 is neither"),
        (["conv2d", "{x}", "{x}", "--padding", "full"], "padding 'full' is none of"),
        (["train", "{x}", "{x}", "--steps", "0"], "steps 0"),
        (["kernels", "sobel_z"], "is not a named kernel"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1 2 3")
    (tmp_path / "broken.png").write_bytes(CAMERA.read_bytes()[:200])
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = {
        "tmp": tmp_path,
        "x": saved(tmp_path / "x.npy", np.ones((3, 4))),
        "deep": saved(tmp_path / "deep.npy", np.ones((2, 3, 4))),
        "nan": saved(tmp_path / "nan.npy", np.full((3, 4), np.nan)),
        "text": tmp_path / "x.txt",
        "broken": tmp_path / "broken.png",
        "broken_npy": tmp_path / "broken.npy",
        "pickled": tmp_path / "pickled.npy",
    }
    result = corr2d(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("corr2d: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_and_version_do_not_load_torch() -> None:
    script = "import sys; from service.__main__ import app; assert not {'torch', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})


def test_a_sparkline_is_a_log_plot_in_one_line() -> None:
    assert sparkline([1000, 100, 10, 1]) == "█▆▃▁"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([0, float("inf")]) == ""
    assert len(sparkline([float(number) for number in range(1, 1000)])) <= 60


def test_explain_draws_a_table_of_the_engines() -> None:
    result = corr2d("explain", "64x80", "5", "--threads", "1", "--rank", "1")
    assert result.exit_code == 0
    for name in core.ENGINES:
        assert name in result.output
    assert result.output.count("chosen") == 1
    layer = corr2d("explain", "1x3x32x32", "4x3x3x3", "--stride", "2", "--padding", "1")
    assert "output (16, 16)" in layer.output
    assert corr2d("explain", "64y80", "5").exit_code != 0
    assert "larger than the input" in corr2d("explain", "3", "5").output
