"""Tests of `corr2d train` on local files."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.progress
import scipy.ndimage
from PIL import Image
from typer.testing import CliRunner

import core
from service.cli import commands
from service.cli.main import app
from service.cli.printing import draw_sparkline
from service.codecs.registry import FILE_FORMATS, UNLIMITED_BYTES
from tests.service.cli.command_line import CAMERA, run_corr2d, save_npy, save_png


def test_d2l_example_is_fitted_from_files(tmp_path: Path) -> None:
    image = np.ones((6, 8))
    image[:, 2:6] = 0
    files = save_npy(tmp_path / "x.npy", image), save_npy(tmp_path / "y.npy", core.correlate(image, [[-1, 1]]).output)
    output = tmp_path / "k.npy"
    result = run_corr2d("train", *files, "--seed", 1, "--steps", 100, "-o", output)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(output), [[-1, 1]], atol=1e-6)
    assert "the loss fell from" in result.stdout
    assert f"loss {'█'}" in result.stdout
    printed = run_corr2d("train", *files, "--seed", 1, "--bias", "--learning-rate", 0.005, "--kernel-size", "1,2")
    assert "bias [" in printed.stdout
    assert "diverged" in run_corr2d("train", *files, "--seed", 1, "--bias").stdout


@pytest.mark.slow
def test_blur_is_fitted_from_images_before_and_after(tmp_path: Path) -> None:
    # scipy blurs the image, with a border rule that corr2d does not have ("mirror").
    before = np.asarray(Image.open(CAMERA)).astype(np.float64)
    after = save_png(tmp_path / "after.png", scipy.ndimage.correlate(before, np.full((3, 3), 1 / 9), mode="mirror"))
    kernel, plot = tmp_path / "kernel.npy", tmp_path / "loss.svg"
    result = run_corr2d(
        *("train", CAMERA, after, "--kernel-size", 5, "--solver", "exact", "--plot", plot, "-o", kernel),
    )
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(kernel), np.pad(np.full((3, 3), 1 / 9), 1), atol=2e-3)
    first, message, sparks, written, errors, known, drawn = result.stdout.splitlines()
    assert first.startswith("learning from the inner 508 x 508 of 512 x 512 pixels: the values outside")
    assert message.startswith("the best kernel: loss ")
    assert sparks == "loss █▁ (log scale)"
    assert written == f"kernel (5, 5) -> {kernel}"
    number = r"[\d.e+-]+"
    assert re.fullmatch(rf"standard errors of the best kernel {number} to {number}", errors)
    assert re.fullmatch(
        rf"smallest possible loss {number}, rank 25 of 25, condition number {number}, "
        rf"residual standard deviation {number}",
        known,
    )
    assert drawn == f"loss per step -> {plot}"
    assert message[:60] in plot.read_text()
    assert not result.stderr


@pytest.mark.slow
def test_edges_are_fitted_from_images_the_command_wrote(tmp_path: Path) -> None:
    edges, kernel, plot = tmp_path / "edges.png", tmp_path / "kernel.npy", tmp_path / "loss.PNG"
    run_corr2d("correlate", CAMERA, "-k", "sobel_x", "--mode", "same", "--boundary", "symmetric", "-o", edges)
    result = run_corr2d(
        *("train", CAMERA, edges, "--kernel-size", 3, "--bias", "--solver", "exact", "--plot", plot, "-o", kernel),
    )
    assert result.exit_code == 0, result.output
    learned = np.load(kernel)
    # The image's values are scaled and rounded, so only the kernel up to a factor can be recovered.
    sobel = core.named_kernel("sobel_x")
    np.testing.assert_allclose(learned / np.abs(learned).max() * 2, sobel, atol=0.01)
    assert "bias [" in result.stdout
    assert np.asarray(Image.open(plot)).shape[:2] == (540, 960)


@pytest.mark.parametrize("dilation", ["1", "2,1", "1,3"])
@pytest.mark.parametrize("size", [(3, 3), (2, 4), (5, 1), (4, 3)])
def test_same_size_target_is_fitted_on_its_inner_part(
    tmp_path: Path, rng: np.random.Generator, size: tuple[int, int], dilation: str
) -> None:
    apart = [int(step) for step in dilation.split(",")] * (2 if "," not in dilation else 1)
    image, kernel = rng.normal(size=(20, 23)), rng.normal(size=size)
    spread = np.zeros([step * (count - 1) + 1 for step, count in zip(apart, size, strict=True)])
    spread[:: apart[0], :: apart[1]] = kernel
    after = core.correlate(image, spread, mode="same", boundary="circular", dtype="float64").output
    output = tmp_path / "k.npy"
    result = run_corr2d(
        *("train", save_npy(tmp_path / "x.npy", image), save_npy(tmp_path / "y.npy", after), "-o", output),
        *("--kernel-size", ",".join(map(str, size)), "--dilation", dilation, "--solver", "exact"),
    )
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(output), kernel, atol=1e-9)
    rows, columns = (whole - side + 1 for whole, side in zip(image.shape, spread.shape, strict=True))
    assert f"learning from the inner {rows} x {columns} of 20 x 23 pixels" in result.stdout


def test_initial_kernel_and_weights_are_cropped_too(tmp_path: Path, rng: np.random.Generator) -> None:
    image, kernel = rng.normal(size=(12, 11)), rng.normal(size=(3, 3))
    after = scipy.ndimage.correlate(image, kernel, mode="wrap")
    weights = np.ones((12, 11))
    after[6, 5], weights[6, 5] = 1e6, 0
    files = [save_npy(tmp_path / f"{name}.npy", array) for name, array in (("x", image), ("y", after), ("w", weights))]
    start, output = save_npy(tmp_path / "start.npy", np.zeros((3, 3))), tmp_path / "k.npy"
    result = run_corr2d(
        *("train", *files[:2], "--weights", files[2], "--initial-kernel", start, "--solver", "exact", "-o", output),
    )
    assert "learning from the inner 10 x 9 of 12 x 11 pixels" in result.stdout
    np.testing.assert_allclose(np.load(output), kernel, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        (("--padding", "same"), (12, 11)),
        (("--padding", "1", "--padding-mode", "circular"), (12, 11)),
        (("--kernel-size", "1"), (12, 11)),
        ((), (10, 9)),
        (("--stride", "2", "--padding", "1"), (6, 6)),
    ],
)
def test_explicit_padding_disables_cropping(
    tmp_path: Path, rng: np.random.Generator, options: tuple[str, ...], target: tuple[int, int]
) -> None:
    files = (
        save_npy(tmp_path / f"{name}.npy", rng.normal(size=size)) for name, size in (("x", (12, 11)), ("y", target))
    )
    size = () if "--kernel-size" in options else ("--kernel-size", 3)
    result = run_corr2d("train", *files, "--solver", "exact", *size, *options)
    assert result.exit_code == 0, result.output
    assert "inner" not in result.stdout


def test_three_colours_are_fitted_from_grey(tmp_path: Path, rng: np.random.Generator) -> None:
    grey = rng.integers(0, 256, size=(16, 17)).astype(np.uint8)
    colour = np.stack([grey, 255 - grey, grey // 2], 2)
    files = save_png(tmp_path / "grey.png", grey), save_png(tmp_path / "colour.png", colour)
    output = tmp_path / "k.npy"
    result = run_corr2d("train", *files, "--kernel-size", 3, "--bias", "--solver", "exact", "-o", output)
    assert result.exit_code == 0, result.output
    assert "learning from the inner 14 x 15 of 16 x 17 pixels" in result.stdout
    assert np.load(output).shape == (3, 1, 3, 3)
    np.testing.assert_allclose(np.load(output)[:, 0, 1, 1], [1, -1, 0.5], atol=0.01)


WEIGHTS = np.arange(4 * 2 * 6 * 7).reshape(4, 2, 6, 7) % 3
INITIAL_KERNEL = np.full((2, 2, 3, 3), 0.25)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("--solver exact", {"solver": "exact"}),
        ("--solver momentum --momentum 0.5", {"solver": "momentum", "momentum": 0.5}),
        ("--solver nesterov", {"solver": "nesterov"}),
        ("--solver adam --betas 0.5,0.9", {"solver": "adam", "betas": (0.5, 0.9)}),
        ("--learning-rate auto", {"learning_rate": "auto"}),
        ("--learning-rate 2e-4", {"learning_rate": 2e-4}),
        ("--steps 3", {"steps": 3}),
        ("--loss mean", {"loss": "mean"}),
        ("--loss huber", {"loss": "huber"}),
        ("--loss huber --huber-delta 0.25", {"loss": "huber", "huber_delta": 0.25}),
        ("--loss huber --huber-delta auto --solver exact", {"loss": "huber", "huber_delta": "auto", "solver": "exact"}),
        ("--tolerance 0.7", {"tolerance": 0.7}),
        ("--ridge 25", {"ridge": 25}),
        ("--solver exact --nonnegative --sum-to 1", {"solver": "exact", "nonnegative": True, "sum_to": 1}),
        ("--solver exact --symmetric rotation", {"solver": "exact", "symmetric": "rotation"}),
        ("--solver exact --separable 2", {"solver": "exact", "separable": 2}),
        ("--solver exact --smoothness 3", {"solver": "exact", "smoothness": 3}),
        ("--ridge auto --solver exact", {"ridge": "auto", "solver": "exact"}),
        ("--batch-size 2", {"batch_size": 2}),
        ("--seed 5", {"seed": 5}),
        ("--bias", {"bias": True}),
        ("--bias --initial-bias {bias}", {"bias": True, "initial_bias": [1.0, -1.0]}),
        ("--initial-kernel {start}", {"initial_kernel": INITIAL_KERNEL}),
        ("--weights {weights}", {"weights": WEIGHTS}),
        ("--kernel-size 1,3 --padding 0,0,1,0", {"kernel_size": (1, 3), "padding": (0, 0, 1, 0)}),
        ("--stride 2,1 --kernel-size 2,3", {"stride": (2, 1), "kernel_size": (2, 3)}),
        ("--padding 1 --kernel-size 3", {"padding": 1, "kernel_size": 3}),
        (
            "--padding same --padding-mode circular --kernel-size 3",
            {"padding": "same", "padding_mode": "circular", "kernel_size": 3},
        ),
        ("--dilation 2 --kernel-size 3", {"dilation": 2, "kernel_size": 3}),
        ("--groups 2", {"groups": 2}),
    ],
)
def test_every_option_of_a_fit_is_a_flag(
    tmp_path: Path, rng: np.random.Generator, flags: str, arguments: dict[str, Any]
) -> None:
    layer = {name: arguments[name] for name in ("stride", "padding", "padding_mode", "dilation") if name in arguments}
    size = np.broadcast_to(arguments.get("kernel_size", 3), 2)
    x = rng.normal(size=(4, 2, 8, 9))
    y = rng.normal(size=core.conv2d(x, np.zeros((2, 2, *size)), **layer).output.shape)
    files = {
        "bias": save_npy(tmp_path / "bias.npy", [1.0, -1.0]),
        "start": save_npy(tmp_path / "start.npy", INITIAL_KERNEL),
        "weights": save_npy(tmp_path / "weights.npy", WEIGHTS),
    }
    output = tmp_path / "k.npy"
    result = run_corr2d(
        *("train", save_npy(tmp_path / "x.npy", x), save_npy(tmp_path / "y.npy", y), "-o", output),
        *("--learning-rate", "1e-3", "--seed", 1, *flags.format(**files).split()),
    )
    assert result.exit_code == 0, result.output
    expected = core.fit_kernel(x, y, **{"learning_rate": 1e-3, "seed": 1, **arguments})
    np.testing.assert_allclose(np.load(output), expected.kernel, rtol=1e-9)
    assert expected.message in result.stdout
    if not layer:
        plain = core.fit_kernel(x, y, learning_rate=1e-3, seed=1).kernel
        assert plain.shape != expected.kernel.shape or (plain - expected.kernel).abs().max() > 1e-4


def test_training_chooses_the_size(tmp_path: Path, rng: np.random.Generator) -> None:
    image, kernel = rng.normal(size=(30, 30)), rng.normal(size=(3, 5))
    whole = np.zeros((30, 30))
    whole[1:-1, 2:-2] = core.correlate(image, kernel, dtype="float64").output
    files = save_npy(tmp_path / "x.npy", image), save_npy(tmp_path / "y.npy", whole)
    output = tmp_path / "k.npy"
    for largest in ((), ("--max-kernel-size", "5,7")):
        result = run_corr2d("train", *files, "--kernel-size", "auto", *largest, "--solver", "exact", "-o", output)
        assert result.exit_code == 0, result.output
        np.testing.assert_allclose(np.load(output), kernel, atol=1e-9)
        assert "kernel_size (3, 5) has the smallest BIC of" in result.stdout
        assert f"up to {'(5, 7)' if largest else '(13, 13)'}" in result.stdout


def test_training_stops_by_validation_loss(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {name: rng.normal(size=(20, 20)) for name in ("x", "y", "other", "theirs", "w")}
    arrays["w"] = np.square(arrays["w"])
    files = {name: save_npy(tmp_path / f"{name}.npy", array) for name, array in arrays.items()}
    output = tmp_path / "k.npy"
    options = ("--kernel-size", 3, "--seed", 1, "--learning-rate", "1e-3", "--steps", 200, "-o", output)
    held_out = ("--validation-input", files["other"], "--validation-target", files["theirs"])
    weighted = ("--validation-weights", files["w"], "--patience", 4)
    result = run_corr2d("train", files["x"], files["y"], *options, *held_out, *weighted)
    assert result.exit_code == 0, result.output
    inside = np.s_[1:-1, 1:-1]
    fit = core.fit_kernel(
        arrays["x"],
        arrays["y"][inside],
        validation=[(arrays["other"], arrays["theirs"][inside], arrays["w"][inside])],
        patience=4,
        seed=1,
        learning_rate=1e-3,
        steps=200,
    )
    assert fit.status is core.Status.STOPPED_EARLY
    assert fit.message in result.stdout
    np.testing.assert_allclose(np.load(output), fit.kernel, rtol=1e-9)
    half = run_corr2d("train", files["x"], files["y"], *options, *held_out[:2])
    assert half.exit_code == 1
    assert half.stderr == "corr2d: a validation pair needs both --validation-input and --validation-target\n"


def test_ridge_path_and_covariance_are_written(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(9, 9)), rng.normal(size=(7, 8))
    files = save_npy(tmp_path / "x.npy", x), save_npy(tmp_path / "y.npy", y)
    path, covariance = tmp_path / "path.npz", tmp_path / "covariance.npy"
    flags = "--solver", "exact", "--bias", "--ridge", "auto", "--ridge-path", path, "--covariance", covariance
    result = run_corr2d("train", *files, *flags)
    assert result.exit_code == 0, result.output
    assert f"kernels of 50 ridges -> {path}" in result.stdout
    assert f"covariance (7, 7) -> {covariance}" in result.stdout
    expected = core.fit_kernel(x, y, solver="exact", bias=True, ridge="auto", ridge_path=True, covariance=True)
    np.testing.assert_array_equal(np.load(covariance), expected.covariance)
    with np.load(path) as written:
        assert set(written) == set(core.RIDGE_PATH_FIELDS)
        for name in written:
            np.testing.assert_array_equal(written[name], getattr(expected, name))

    undetermined = run_corr2d("train", save_npy(tmp_path / "x.npy", 0 * x), files[1], "--covariance", covariance)
    assert undetermined.exit_code == 0
    assert f"do not determine a covariance: {covariance} is not written" in undetermined.stdout
    wrong = run_corr2d("train", *files, "--ridge-path", tmp_path / "path.npy")
    assert wrong.exit_code != 0
    assert "cannot write .npy; supported: .npz" in wrong.stderr


def test_standard_errors_are_printed_with_the_kernel(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(9, 9)), rng.normal(size=(8, 7))
    files = save_npy(tmp_path / "x.npy", x), save_npy(tmp_path / "y.npy", y)
    expected = core.fit_kernel(x, y, solver="exact", bias=True)
    result = run_corr2d("train", *files, "--solver", "exact", "--bias")
    found = re.findall(r"^(standard errors[^\[]*) (\[.*)$", result.stdout, re.MULTILINE)
    printed = {name: json.loads(text) for name, text in found}
    assert expected.standard_errors is not None
    assert expected.bias_standard_errors is not None
    np.testing.assert_allclose(printed["standard errors of the best kernel"], expected.standard_errors, rtol=1e-3)
    np.testing.assert_allclose(printed["standard errors of the best bias"], expected.bias_standard_errors, rtol=1e-3)


@pytest.mark.parametrize("suffix", [".json", ".npz", ".safetensors"])
def test_whole_result_is_saved_and_usable_as_kernel(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    x, y = rng.normal(size=(9, 9)), rng.normal(size=(8, 7))
    files = save_npy(tmp_path / "x.npy", x), save_npy(tmp_path / "y.npy", y)
    output = tmp_path / f"fit{suffix}"
    result = run_corr2d("train", *files, "--solver", "exact", "--bias", "-o", output)
    assert result.exit_code == 0, result.output
    assert f"kernel (2, 3) and diagnostics -> {output}" in result.stdout
    assert "standard errors of the best bias [" in result.stdout
    expected = core.fit_kernel(x, y, solver="exact", bias=True)
    saved = FILE_FORMATS[suffix].decode(output.read_bytes(), UNLIMITED_BYTES)  # type: ignore[misc]
    for name in ("kernel", "standard_errors", "confidence_intervals", "bias", "loss_history"):
        np.testing.assert_allclose(saved[name], getattr(expected, name), rtol=1e-12)
    for name in ("final_loss", "condition_number", "rank", "r_squared"):
        np.testing.assert_allclose(saved[name], getattr(expected, name), rtol=1e-12)
    if suffix == ".json":
        assert saved["message"] == expected.message
        assert saved.keys() == {field.name for field in dataclasses.fields(expected)}
    correlated = run_corr2d("correlate", files[0], "--kernel", output, "--dtype", "float64")
    np.testing.assert_allclose(json.loads(correlated.stdout), core.correlate(x, expected.kernel).output, rtol=1e-5)


def test_result_on_stdout_is_separate_from_messages(tmp_path: Path, rng: np.random.Generator) -> None:
    files = [save_npy(tmp_path / f"{name}.npy", rng.normal(size=(5, 5))) for name in "xy"]
    result = run_corr2d("train", *files, "--kernel-size", 3, "--solver", "exact", "-o", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["message"] in result.stderr
    options = ("--kernel-size", 3, "--solver", "exact", "-o", "-", "--format", "npy")
    kernel = run_corr2d("train", "-", files[1], *options, stdin=files[0].read_bytes())
    assert "the values outside stdin are unknown" in kernel.stderr
    assert kernel.stdout_bytes.startswith(b"\x93NUMPY")
    for output in (("-o", tmp_path / "k.npy"), ()):
        rejected = run_corr2d("train", *files, "--format", "npy", *output)
        assert rejected.stderr == "corr2d: --format applies to -o - only: the suffix of a file names its format\n"


def test_divergence_is_predicted_and_can_be_rejected(tmp_path: Path, rng: np.random.Generator) -> None:
    files = [save_npy(tmp_path / f"{name}.npy", rng.normal(size=(9, 9))) for name in "xy"]
    output = tmp_path / "k.npy"
    result = run_corr2d("train", *files, "--kernel-size", 3, "--learning-rate", 10, "-o", output)
    assert result.exit_code == 1
    assert result.stderr.startswith("learning_rate 10 is above ")
    assert output.exists()
    output.unlink()
    rejected = run_corr2d(
        "train", *files, "--kernel-size", 3, "--learning-rate", 10, "--refuse-divergence", "-o", output
    )
    assert rejected.exit_code == 1
    assert rejected.stderr.startswith("corr2d: learning_rate 10 is above ")
    assert len(rejected.stderr.splitlines()) == 1
    assert not output.exists()


def test_unwritable_output_is_rejected_before_training(tmp_path: Path) -> None:
    x = save_npy(tmp_path / "x.npy", np.ones((9, 9)))
    for option, name, message in (
        ("--plot", "loss.gif", "loss.gif: cannot write .gif; supported: .svg, .png"),
        ("--plot", "loss", "loss: cannot write a file without a suffix; supported: .svg, .png"),
        ("--plot", "none/loss.svg", "No such file or directory"),
        ("-o", "kernel.txt", "kernel.txt: cannot write .txt; supported: .json, .npy"),
        ("-o", "none/kernel.npy", "No such file or directory"),
    ):
        result = run_corr2d("train", x, x, "--kernel-size", 3, option, tmp_path / name)
        assert result.exit_code == 1
        assert message in result.stderr
        assert not result.stdout
        assert len(result.stderr.splitlines()) == 1


def test_plot_without_matplotlib_is_rejected_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    x, plot = save_npy(tmp_path / "x.npy", np.ones((9, 9))), tmp_path / "loss.svg"
    result = run_corr2d("train", x, x, "--kernel-size", 3, "--plot", plot)
    assert result.exit_code == 1
    assert result.stderr == (
        f"corr2d: {plot} cannot be written: plots need matplotlib, which is not installed: "
        'install it with pip install "corr2d[plot]"\n'
    )
    assert not plot.exists()


def test_terminal_shows_progress(tmp_path: Path) -> None:
    files = save_npy(tmp_path / "x.npy", np.eye(9)), save_npy(tmp_path / "y.npy", np.eye(9)[1:-1, 1:-1])
    terminal = {"COLUMNS": "200", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}
    for solver, shown in (("sgd", "100/100"), ("exact", "1/1")):
        command = ["train", *map(str, files), "--steps", "100", "--solver", solver, "--learning-rate", "auto"]
        result = CliRunner().invoke(app, command, env=terminal)
        assert "reading" in result.stderr
        assert "learning" in result.stderr
        assert re.search(rf"{shown}\S* loss \d", result.stderr)
        assert "reading" not in result.stdout


def test_progress_bar_redraws_are_rate_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, drawn = 50_000, 0

    def fit() -> Generator[core.Progress, None, core.FitResult]:
        yield core.Reading(0, 3)
        for number in range(1, steps + 1):
            yield core.Step(number, 1.0)
        return core.fit_kernel([[1.0]], [[1.0]], solver="exact")

    def counted(bar: rich.progress.Progress, *arguments: Any, **fields: Any) -> None:
        nonlocal drawn
        drawn += 1
        update(bar, *arguments, **fields)

    update = rich.progress.Progress.update
    monkeypatch.setattr(rich.progress.Progress, "update", counted)
    start = time.monotonic()
    commands.run_with_progress(fit(), steps=steps, warn_divergence=True)
    assert 2 <= drawn <= 3 + (time.monotonic() - start) / commands.REDRAW_INTERVAL_S


@pytest.mark.slow
def test_ctrl_c_ends_training_without_a_traceback(tmp_path: Path, rng: np.random.Generator) -> None:
    files = [str(save_npy(tmp_path / f"{name}.npy", rng.normal(size=(9, 9)))) for name in "xy"]
    command = [sys.executable, "-m", "service", "train", *files, "--kernel-size", "3", "--learning-rate", "1e-9"]
    with subprocess.Popen(
        [*command, "--steps", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None
        assert training.stdout.readline().startswith("learning from the inner 7 x 7")
        time.sleep(0.5)
        training.send_signal(signal.SIGINT)
        out, err = training.communicate(timeout=30)
    assert training.returncode == 130
    assert "Traceback" not in err
    assert not out


def test_sparkline_is_a_log_plot_in_one_line() -> None:
    assert draw_sparkline([1000, 100, 10, 1]) == "█▆▃▁"
    assert draw_sparkline([5, 5]) == "▁▁"
    assert draw_sparkline([0, float("inf")]) == ""
    assert len(draw_sparkline([float(number) for number in range(1, 1000)])) <= 60
