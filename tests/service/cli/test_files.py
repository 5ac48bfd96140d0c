"""Tests of the files of commands: formats, kernels, many inputs, stdin and stdout."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core
from service.cli import batch
from service.cli.error_messages import describe_error
from service.cli.files import Source
from service.cli.printing import print_array
from tests.service.cli.command_line import CAMERA, run_corr2d, save_npy, save_png

IMAGE = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
KERNEL = np.array([[0, 1], [2, 3]])
OUTPUT = [[19, 25], [37, 43]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "kernel",
    [
        "[[0,1],[2,3]]",
        " [[0, 1.0], [2e0, 3]]",
        '{"shape": [2, 2], "dtype": "float32", "data": [0, 1, 2, 3]}',
        json.dumps({"shape": [2, 2], "dtype": "uint8", "data": base64.b64encode(bytes([0, 1, 2, 3])).decode()}),
        '{"kernel": [[0, 1], [2, 3]], "mode": "same"}',
    ],
)
def test_kernel_is_a_json_matrix(tmp_path: Path, kernel: str) -> None:
    image = save_npy(tmp_path / "x.npy", IMAGE)
    result = run_corr2d("correlate", image, "--kernel", kernel)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == OUTPUT


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("[[1,1],[1]]", "kernel[1] is ragged: length 1, expected 2"),
        ("[[1,1", "--kernel is not JSON: unexpected end of data: line 1 column 6 (char 5)"),
        ('[[1,"a"]]', "kernel[0][1] is a string, expected a number"),
        ("[[NaN]]", "--kernel is not JSON: "),
        ("[]", "kernel is empty: its shape is (0,) and every side must be at least 1"),
        ("[1,2]", "kernel"),
        ('{"taps": [[1]], "other": [[1]]}', "contains the arrays 'taps', 'other'; one must be named 'kernel' or 'K'"),
        ("notes.txt", "notes.txt: cannot read .txt; supported: "),
        ("missing.npy", "missing.npy: No such file or directory"),
    ],
)
def test_invalid_kernel_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("1 2")
    result = run_corr2d("correlate", save_npy(tmp_path / "x.npy", IMAGE), "--kernel", kernel)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_png_clip_keeps_the_values(tmp_path: Path) -> None:
    image = save_npy(tmp_path / "x.npy", [[-5.0, 10.4, 99.6], [254.0, 255.0, 300.0]])
    clipped, scaled = tmp_path / "clipped.png", tmp_path / "scaled.png"
    assert run_corr2d("correlate", image, "-k", "identity", "--png", "clip", "-o", clipped).exit_code == 0
    assert run_corr2d("correlate", image, "-k", "identity", "-o", scaled).exit_code == 0
    assert np.asarray(Image.open(clipped)).tolist() == [[0, 10, 100], [254, 255, 255]]
    assert np.asarray(Image.open(scaled)).tolist()[0][0] == 0
    deep = tmp_path / "deep.png"
    assert run_corr2d("correlate", image, "-k", "[[300]]", "--png", "clip16", "-o", deep).exit_code == 0
    with Image.open(deep) as image_16_bit:
        assert image_16_bit.mode == "I;16"
        pixels = np.asarray(image_16_bit)
    assert pixels.tolist() == [[0, 3120, 29880], [65535, 65535, 65535]]
    for options, message in (
        (("--png", "round", "-o", scaled), '--png "round" is not one of: scale, clip, clip16'),
        (("--png", "clip", "-o", tmp_path / "y.npy"), "--png clip does not apply to .npy: it selects"),
        (("--png", "clip"), "--png needs an output"),
        (("--format", "npy"), "--format needs an output"),
        (("--format", "npy", "-o", scaled), "--format does not apply to "),
    ):
        rejected = run_corr2d("correlate", image, "-k", "identity", *options)
        assert rejected.exit_code == 1
        assert message in rejected.stderr


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".json", ".npy"])
def test_every_array_format_is_written_and_read(tmp_path: Path, suffix: str) -> None:
    image = save_npy(tmp_path / "x.npy", IMAGE)
    output = tmp_path / f"y{suffix}"
    assert run_corr2d("correlate", image, "-k", "[[0,1],[2,3]]", "-o", output).exit_code == 0
    assert json.loads(run_corr2d("correlate", output, "-k", "identity").stdout) == OUTPUT


def test_array_of_an_archive_is_chosen_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=IMAGE, kernel=KERNEL, bias=[1])
    archive = tmp_path / "x.npz"
    assert json.loads(run_corr2d("correlate", archive, "--kernel", archive).stdout) == OUTPUT
    np.savez(tmp_path / "layer.npz", weight=KERNEL, bias=[1.0])
    layer = tmp_path / "layer.npz"
    added = json.loads(run_corr2d("conv2d", archive, layer, "--bias", layer).stdout)
    assert added == [[20, 26], [38, 44]]
    np.savez(tmp_path / "two.npz", first=IMAGE, second=IMAGE)
    result = run_corr2d("correlate", tmp_path / "two.npz", "-k", "identity")
    assert result.stderr == (
        f"corr2d: {tmp_path}/two.npz: contains the arrays 'first', 'second'; "
        "one must be named 'input' or 'X', or be the only one\n"
    )


def test_large_json_list_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.normal(size=(60, 50))
    (tmp_path / "x.json").write_text(json.dumps(array.tolist()))
    result = run_corr2d("correlate", tmp_path / "x.json", "-k", "identity", "--dtype", "float64")
    np.testing.assert_array_equal(json.loads(result.stdout), array)
    (tmp_path / "x.json").write_text(json.dumps([*array.tolist(), [1, 2]]))
    ragged = run_corr2d("correlate", tmp_path / "x.json", "-k", "identity")
    assert ragged.stderr == f"corr2d: {tmp_path}/x.json: input[60] is ragged: length 2, expected 50\n"


def test_numbers_in_json_are_rounded_once(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[[16777217.0000000001]]")
    number, one = tmp_path / "x.json", save_npy(tmp_path / "one.npy", [[1.0]])
    for arguments in (
        ("correlate", number, "-k", "identity"),
        ("correlate", one, "-k", "[[16777217.0000000001]]"),
        ("correlate", one, "-k", number),
        ("conv2d", number, one),
        ("conv2d", one, number),
    ):
        assert json.loads(run_corr2d(*arguments).stdout) == [[16777218]]


def test_many_files_are_written_to_a_folder(tmp_path: Path) -> None:
    images = [save_png(tmp_path / f"{number}.png", IMAGE + number) for number in range(5)]
    (tmp_path / "notes.txt").write_text("1 2")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(CAMERA.read_bytes()[:300])
    folder = tmp_path / "out"
    inputs = [*images[:2], tmp_path / "notes.txt", damaged, tmp_path / "missing.png", *images[2:]]
    result = run_corr2d("correlate", *inputs, "-k", "identity", "--png", "clip", "-o", f"{folder}/", "--format", "png")
    assert result.exit_code == 1
    assert sorted(path.name for path in folder.iterdir()) == [f"{number}.png" for number in range(5)]
    for number in range(5):
        assert np.asarray(Image.open(folder / f"{number}.png")).tolist() == (IMAGE + number).tolist()
    notes, cut, missing, total = result.stderr.splitlines()
    assert notes.startswith(f"corr2d: {tmp_path}/notes.txt: cannot read .txt")
    assert cut == f"corr2d: {damaged}: the PNG image is cut off after 300 bytes"
    assert missing == f"corr2d: {tmp_path}/missing.png: No such file or directory"
    assert total == "corr2d: 3 of 8 files failed"
    assert len(result.stdout.splitlines()) == 5


def test_folder_files_have_the_format_of_the_input(tmp_path: Path) -> None:
    inputs = save_npy(tmp_path / "a.npy", IMAGE), save_png(tmp_path / "b.png", IMAGE)
    folder = tmp_path / "out"
    folder.mkdir()
    assert run_corr2d("correlate", *inputs, "-k", "identity", "-o", folder).exit_code == 0
    assert {path.name for path in folder.iterdir()} == {"a.npy", "b.png"}
    weight = save_npy(tmp_path / "w.npy", KERNEL)
    result = run_corr2d("conv2d", *inputs, weight, "-o", f"{folder}/", "--format", "npz")
    assert result.exit_code == 0, result.output
    assert np.load(folder / "b.npz")["output"].tolist() == OUTPUT


def test_outputs_of_many_files_are_checked_first(tmp_path: Path) -> None:
    a, b, c = (save_npy(tmp_path / name, IMAGE) for name in ("a.npy", "b.npy", "c.npy"))
    (tmp_path / "other").mkdir()
    same_name = save_npy(tmp_path / "other" / "a.npy", IMAGE)
    folder = f"{tmp_path}/out/"
    for inputs, output, message in (
        ([a, b, c], tmp_path / "y.npy", "3 inputs need a folder for their outputs, not "),
        ([a, b], "-", "2 inputs need a folder for their outputs, not -"),
        ([a, b], tmp_path, "a.npy is an input, which would be overwritten"),
        ([a, same_name], folder, f"{a} and {same_name} would both be written to {folder}a.npy"),
        ([a, b], f"{tmp_path}/none/out/", "No such file or directory"),
    ):
        result = run_corr2d("correlate", *inputs, "-k", "identity", "-o", output)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    unknown = run_corr2d("correlate", a, b, "-k", "identity", "-o", folder, "--format", "bmp")
    assert '--format "bmp" is not one of: json, npy' in unknown.stderr


def test_many_results_are_printed_as_lines(tmp_path: Path) -> None:
    inputs = [save_npy(tmp_path / f"{number}.npy", IMAGE + number) for number in range(3)]
    result = run_corr2d("correlate", *inputs, "-k", "identity")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [(IMAGE + n).tolist() for n in range(3)]


def test_progress_bar_counts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [save_npy(tmp_path / f"{number}.npy", IMAGE) for number in range(3)]
    stderr, stdout = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stdout)
    batch.process_files(
        inputs,
        None,
        lambda images, machine: core.correlate(images, KERNEL, machine=machine),
        dtype="float32",
        file_format=None,
        png=None,
    )
    assert "3/3" in stderr.getvalue()
    assert [json.loads(line) for line in stdout.getvalue().splitlines()] == [OUTPUT] * 3


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".json", ".png"])
def test_stdin_to_stdout_keeps_the_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    image = save_npy(tmp_path / "image.npy", IMAGE)
    assert run_corr2d("correlate", image, "-k", "identity", "--dtype", "float64", "-o", path).exit_code == 0
    options = ("--png", "clip") if suffix == ".png" else ()
    result = run_corr2d("correlate", "-", "-k", "identity", "-o", "-", *options, stdin=path.read_bytes())
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("stdin (3, 3) -> stdout (3, 3), engine ")
    source = Source(Path("-"), suffix, result.stdout_bytes)
    np.testing.assert_array_equal(source.read_array("input"), Source.open(path).read_array("input"))


def test_format_of_stdout_is_an_option(tmp_path: Path) -> None:
    result = run_corr2d("correlate", "-", "-k", "[[1]]", "-o", "-", "--format", "npy", stdin=b" [[1, 2], [3, 4]]")
    assert np.load(io.BytesIO(result.stdout_bytes)).tolist() == [[1, 2], [3, 4]]
    image = save_npy(tmp_path / "x.npy", IMAGE)
    assert json.loads(run_corr2d("correlate", image, "-k", "-", stdin=b"[[0,1],[2,3]]").stdout) == OUTPUT
    for content, message in (
        (b"", "stdin is empty"),
        (b"GIF89a", "stdin has no known format: its first bytes are b'GIF"),
    ):
        result = run_corr2d("correlate", "-", "-k", "identity", stdin=content)
        assert result.exit_code == 1
        assert message in result.stderr


def test_binary_output_to_a_terminal_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    image = save_npy(tmp_path / "x.npy", IMAGE)
    with pytest.raises(ValueError, match="stdout is a terminal, which cannot show"):
        batch.process_files(
            [image], "-", lambda images, _: core.correlate(images, KERNEL), dtype="float32", file_format=None, png=None
        )


def test_large_array_is_summarised_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(2 * 40 * 50, dtype=np.float32).reshape(2, 40, 50)
    array[1, 0, 0] = np.nan
    piped, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", piped)
    print_array(array, "kernel")
    assert np.shape(json.loads(piped.getvalue().removeprefix("kernel"))) == array.shape
    monkeypatch.setattr(sys, "stdout", terminal)
    print_array(array)
    first, *rows, dots, hint = terminal.getvalue().splitlines()
    assert first == "(2, 40, 50) float32, minimum 0, maximum 3999, mean 1999.5, 1 not finite"
    assert [row.split() for row in rows[:2]] == [
        [*map(str, range(8)), "..."],
        [*map(str, range(50, 58)), "..."],
    ]
    assert (len(rows), dots) == (4, "...")
    assert "-o" in hint
    print_array(KERNEL)
    assert terminal.getvalue().splitlines()[-1] == "[[0,1],[2,3]]"


def test_memory_errors_are_one_line() -> None:
    with pytest.raises(MemoryError) as numpy_error:
        np.empty((10**6, 10**9))
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(10**17)
    assert describe_error(numpy_error.value) == (
        "not enough memory: 7.11 PiB could not be allocated; use a smaller input, or a machine with more memory"
    )
    assert str(describe_error(torch_error.value)).startswith("not enough memory: 400000000000000000 bytes could not be")
    assert describe_error(RuntimeError("out of range")) is None


def test_internal_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("internal")

    monkeypatch.setattr(core, "correlate", fail)
    inputs = [save_npy(tmp_path / name, IMAGE) for name in ("a.npy", "b.npy")]
    for files in (inputs, inputs[:1]):
        result = run_corr2d("correlate", *files, "-k", "identity")
        assert str(result.exception) == "internal"
