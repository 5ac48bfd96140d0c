"""Robustness cases 70, 71 and 75: small valid bodies whose decoding takes much time or memory, or holds the GIL."""

import gc
import gzip
import io
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from service.codecs import content_coding, json, loss_curve, multipart, npy, npz, safetensors
from service.codecs.decode_limits import raise_if_out_of_memory
from service.codecs.images import jpeg, png, tiff, webp
from service.codecs.registry import FORMATS, predict_decode_seconds
from service.codecs.response_options import ResponseOptions
from service.codecs.zstandard import zstd
from service.errors import InvalidRequest, NotParseable, ServiceError
from tests.gil_pauses import measure_longest_pause, measure_python_pause

DECODE_LIMIT_BYTES = 64_000_000
MAX_PAUSE_S = 0.02
"""Longest allowed pause of other threads, in seconds."""

PAUSE_MARGIN = 4
"""Allowed pause as a multiple of Python's own pauses, which are long if the machine is slow."""


def assert_pauses_are_short(work: Callable[[], object]) -> None:
    pause = measure_longest_pause(work)
    allowed = max(MAX_PAUSE_S, PAUSE_MARGIN * measure_python_pause())
    assert pause < allowed, f"other threads waited for {1000 * pause:.1f} ms, at most {1000 * allowed:.1f} are allowed"


@pytest.mark.robustness(70)
def test_call_that_holds_the_gil_is_detected() -> None:
    lists = b'{"a": [' + b"[], " * 3_000_000 + b"[]]}"
    assert measure_longest_pause(partial(orjson.loads, lists)) > MAX_PAUSE_S


def save_image(array: np.ndarray[Any, Any], suffix: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, suffix, **options)
    return file.getvalue()


def save_archive(save: Callable[..., None], **arrays: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def build_safetensors_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def draw_noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def build_long_scan_jpeg() -> bytes:
    return save_image(draw_noise(64, 64), "jpeg")[:-2] + b"\xff\x00" * 16_000_000 + b"\xff\xd9"


def build_form(file: bytes, fields: int = 1) -> bytes:
    begin = b"--boundary\r\nContent-Disposition: form-data; name="
    options = b"".join(begin + b'"a%d"\r\n\r\n%d\r\n' % (at, at) for at in range(fields))
    return options + begin + b'input; filename="a"\r\n\r\n' + file + b"\r\n--boundary--\r\n"


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "numbers": (json.MEDIA_TYPE, lambda: b'{"input": [' + b"0.123456789, " * 2_000_000 + b"1]}"),
    "digits": (json.MEDIA_TYPE, lambda: b'{"input": [' + b"9" * 16_000_000 + b"]}"),
    "objects": (json.MEDIA_TYPE, lambda: b'{"pairs": [' + b'{"a":{}},' * 110_000 + b"{}]}"),
    "names": (json.MEDIA_TYPE, lambda: b'{"a": {' + b",".join(b'"%x":1' % at for at in range(80_000)) + b"}}"),
    "a long text": (json.MEDIA_TYPE, lambda: b'{"kernel": "' + b"\xc3\xa4" * 16_000_000 + b'"}'),
    "base64": (json.MEDIA_TYPE, lambda: b'{"kernel": {"data": "' + b"A" * 32_000_000 + b'"}}'),
    "many lines": (json.MEDIA_TYPE, lambda: b'{"input": [[1' + b"\n" * 60_000_000 + b"x]]}"),
    "tiny arrays": (json.MEDIA_TYPE, lambda: b"{" + b"[[1]]" * 3_200_000 + b"}"),
    "npy in columns": (npy.MEDIA_TYPE, lambda: b"".join(map(bytes, save_fortran_npy()))),
    "deflated": (npz.MEDIA_TYPE, lambda: save_archive(np.savez_compressed, a=np.zeros(6_000_000))),
    "stored": (npz.MEDIA_TYPE, lambda: save_archive(np.savez, a=np.zeros(4_000_000))),
    "safetensors of lists": (
        safetensors.MEDIA_TYPE,
        lambda: build_safetensors_header(b'{"a":[' + b"[]," * 80_000 + b"[]]}"),
    ),
    "safetensors of names": (
        safetensors.MEDIA_TYPE,
        lambda: build_safetensors_header(b"{" + b",".join(b'"%x":{}' % at for at in range(20_000)) + b"}"),
    ),
    "png": (png.MEDIA_TYPE, lambda: save_image(draw_noise(5000, 5000), "png", compress_level=0)),
    "png in colour": (png.MEDIA_TYPE, lambda: save_image(draw_noise(2500, 2500, 3), "png", compress_level=0)),
    "png with alpha": (png.MEDIA_TYPE, lambda: save_image(draw_noise(3000, 3000, 2), "png", compress_level=0)),
    "jpeg": (jpeg.MEDIA_TYPE, lambda: save_image(draw_noise(3000, 3000, 3), "jpeg", quality=98)),
    "webp": (webp.MEDIA_TYPE, lambda: save_image(draw_noise(2000, 2000, 3), "webp", quality=90, method=0)),
    "lossless webp": (webp.MEDIA_TYPE, lambda: save_image(draw_noise(1000, 1000, 3), "webp", lossless=True, method=0)),
    "tiff": (tiff.MEDIA_TYPE, lambda: save_image(draw_noise(4000, 4000, 3), "tiff")),
    "deflated tiff": (
        tiff.MEDIA_TYPE,
        lambda: save_image(draw_noise(2500, 2500, 3), "tiff", compression="tiff_adobe_deflate"),
    ),
    "tiff of many strips": (
        tiff.MEDIA_TYPE,
        lambda: save_image(draw_noise(60_000, 100), "tiff", compression="tiff_lzw", strip_size=100),
    ),
    "jpeg tiff": (tiff.MEDIA_TYPE, lambda: save_image(draw_noise(2500, 2500, 3), "tiff", compression="jpeg")),
    "form": (
        multipart.MEDIA_TYPE,
        lambda: build_form(save_image(draw_noise(5000, 5000), "png", compress_level=0)),
    ),
    "form of boundaries": (multipart.MEDIA_TYPE, lambda: build_form(b"\r\n--boundar" * 5_000_000)),
    "form of fields": (multipart.MEDIA_TYPE, lambda: build_form(b"", 10_000)),
    "jpeg of one long scan": (jpeg.MEDIA_TYPE, build_long_scan_jpeg),
    "jpeg of fill bytes": (jpeg.MEDIA_TYPE, lambda: save_image(draw_noise(64, 64), "jpeg")[:2] + b"\xff" * 60_000_000),
}


def save_fortran_npy() -> list[Any]:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(draw_noise(5000, 6000)))
    return [file.getvalue()]


@pytest.mark.robustness(70)
@pytest.mark.parametrize("name", BODIES)
def test_decoding_releases_the_gil(name: str) -> None:
    media_type, make = BODIES[name]
    body = bytearray(make())
    decode = FORMATS[media_type].decode
    assert decode is not None

    def work() -> None:
        with suppress(ServiceError):
            decode(body, DECODE_LIMIT_BYTES)

    assert_pauses_are_short(work)


CODED_BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip of noise": ("gzip", lambda: gzip.compress(os.urandom(48_000_000), 0)),
    "gzip of zeros": ("gzip", lambda: gzip.compress(bytes(48_000_000), 1)),
    "many ends of gzip": ("gzip", lambda: gzip.compress(b"") * 4096),
    "zstd of zeros": ("zstd", lambda: zstd.compress(bytes(48_000_000))),
    "deflate of zeros": ("deflate", lambda: zlib.compress(bytes(48_000_000), 1)),
}


@pytest.mark.robustness(70)
@pytest.mark.parametrize("name", CODED_BODIES)
def test_content_decoding_releases_the_gil(name: str) -> None:
    coding, make = CODED_BODIES[name]
    body = bytearray(make())
    assert_pauses_are_short(lambda: content_coding.decompress(coding, body, DECODE_LIMIT_BYTES))


@cache
def build_response() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "kernel": rng.normal(size=(1500, 1000)),
        "loss_history": rng.random(1_000_000).tolist(),
        "final_loss": 1.0,
        "best_possible_loss": 0.5,
        "steps": 1_000_000,
        "status": "max_steps",
        "message": "the end",
        "solver": "sgd",
        "learning_rate": 0.1,
    }


@pytest.mark.robustness(70)
@pytest.mark.parametrize("media_type", [name for name, served in FORMATS.items() if served.encode])
@pytest.mark.parametrize("coding", [None, "gzip", "zstd"])
@pytest.mark.parametrize("form", ["nested", "base64"])
def test_encoding_releases_the_gil(media_type: str, coding: str | None, form: str) -> None:
    encode = FORMATS[media_type].encode
    assert encode is not None
    if form != "nested" and media_type != json.MEDIA_TYPE:
        pytest.skip("only JSON has forms")

    def work() -> None:
        parts = encode(build_response(), ResponseOptions.model_validate({"arrays": form}))
        if coding:
            content_coding.compress(coding, parts)

    assert_pauses_are_short(work)


@pytest.mark.robustness(70)
def test_plotting_a_long_history_releases_the_gil() -> None:
    # The first plot loads matplotlib.
    loss_curve.draw_svg({**build_response(), "loss_history": [1.0, 0.5]})
    gc.collect()
    # The service does this too when it is ready.
    gc.freeze()
    try:
        assert_pauses_are_short(lambda: loss_curve.draw_svg(build_response()))
    finally:
        gc.unfreeze()


@pytest.mark.robustness(71)
@pytest.mark.parametrize(
    "text",
    [
        b"{" + b"[[1]]" * 3_200_000 + b"}",
        b'{"pairs": [' + b'{"input": [[1]], "target": [[1]]}, ' * 100_000 + b"{}]}",
        b'{"pairs": [' + b'{"input": ' + b"[" * 33 + b"1" + b"]" * 33 + b"}, " + b"[[[[[1]]]]], " * 200_000 + b"{}]}",
        b'{"a": {"a": ' + (b'{"data": "' + b"A" * 200 + b'"}, "a": ') * 100_000 + b"1}}",
    ],
    ids=["spans", "pairs", "deep", "data"],
)
def test_millions_of_tiny_arrays_are_rejected_early(text: bytes) -> None:
    assert measure_rejection_mb(text) < 60


def measure_rejection_mb(text: bytes) -> float:
    """Return the memory, in MB, that rejecting a JSON text takes in addition to the text and the process itself."""
    script = (
        "import resource, sys\n"
        "from service.codecs import json\n"
        "from service.errors import InvalidRequest\n"
        "text = sys.stdin.buffer.read()\n"
        "json.decode(b'{\"input\": [[1, 2], [3, 4]]}'.rjust(2 * json.MAX_UNSCANNED_BYTES))\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1e3\n"
        "before = peak()\n"
        "try:\n    json.decode(text)\n"
        "except InvalidRequest as error:\n    assert 'outside of arrays' in error.detail, error.detail\n"
        "else:\n    raise SystemExit('taken')\n"
        "print(peak() - before)\n"
    )
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("reads the peak memory from Linux's /proc")
    done = subprocess.run([sys.executable, "-c", script], input=text, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return float(done.stdout)


def measure_cpu_seconds(work: Callable[[], object], tries: int = 3) -> float:
    """Return the least CPU time of several runs, in seconds."""
    times = []
    for _ in range(tries):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.robustness(75)
@pytest.mark.parametrize(
    "number", [b"9007199254740993.00000", b"9007199254740993.00001", b"0." + b"1" * 18 + b"5" * 500]
)
def test_numbers_of_any_length_are_parsed_at_full_speed(number: bytes) -> None:
    def a_byte(unit: bytes) -> float:
        body = b'{"input": [' + b", ".join([unit] * (2_000_000 // len(unit))) + b"]}"
        return measure_cpu_seconds(lambda: json.decode(body)) / len(body)

    assert a_byte(number) < 15 * a_byte(b"0.1234567890123456")


@pytest.mark.robustness(75)
def test_image_of_many_scans_is_rejected_before_decoding() -> None:
    content = save_image(np.zeros((2000, 2000), np.uint8), "jpeg", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    body = content[:-2] + last * 50 + b"\xff\xd9"
    with pytest.raises(NotParseable, match="scans: at most 20 are read"):
        jpeg.decode(body, DECODE_LIMIT_BYTES)


PREDICTED_BODIES = [
    "numbers", "npy in columns", "deflated", "png", "png in colour", "png with alpha", "jpeg", "webp", "tiff",
    "deflated tiff", "jpeg tiff", "form",
]  # fmt: skip


@pytest.mark.robustness(75)
@pytest.mark.parametrize("name", PREDICTED_BODIES)
def test_decode_time_is_predicted_from_the_header(name: str) -> None:
    media_type, make = BODIES[name]
    body = make()
    served = FORMATS[media_type]
    assert served.decode is not None
    taken = measure_cpu_seconds(partial(served.decode, body, DECODE_LIMIT_BYTES))
    predicted = predict_decode_seconds(served, None, body, DECODE_LIMIT_BYTES)
    assert taken / 10 < predicted < 10 * taken
    assert measure_cpu_seconds(lambda: predict_decode_seconds(served, None, body, DECODE_LIMIT_BYTES), 9) < taken / 50


@pytest.mark.robustness(75)
@pytest.mark.parametrize("coding", ["gzip", "zstd", "deflate"])
def test_compressed_body_counts_at_its_maximum_size(coding: str) -> None:
    served = FORMATS[json.MEDIA_TYPE]
    assert predict_decode_seconds(served, coding, bytes(100_000), DECODE_LIMIT_BYTES) > 0.3
    assert predict_decode_seconds(served, coding, bytes(100), 10_000) < 0.001


class TimeIsOverError(Exception):
    """Error that a simulated deadline raises."""


@pytest.mark.robustness(75)
@pytest.mark.parametrize("name", ["deflated", "png", "jpeg", "webp", "deflated tiff", "jpeg tiff", "form"])
def test_decoding_stops_when_its_check_raises(name: str) -> None:
    media_type, make = BODIES[name]
    decode = FORMATS[media_type].decode
    assert decode is not None
    with pytest.raises(TimeIsOverError):
        decode(make(), DECODE_LIMIT_BYTES, raise_at_third_call())
    with pytest.raises(TimeIsOverError):
        content_coding.decompress("gzip", gzip.compress(bytes(10_000_000)), DECODE_LIMIT_BYTES, raise_at_third_call())


def raise_at_third_call() -> Callable[[], None]:
    calls = iter(range(3))

    def check() -> None:
        if next(calls) == 2:
            raise TimeIsOverError

    return check


@pytest.mark.robustness(75)
def test_thousands_of_unknown_names_are_one_error() -> None:
    text = b'{"input": [[1]], "kernel": [[1]], ' + b", ".join(b'"x%d": 1' % at for at in range(12_000)) + b"}"
    with pytest.raises(InvalidRequest, match="12,002 names"):
        json.decode(text)


@pytest.mark.robustness(73)
def test_memory_shortage_is_not_a_client_error() -> None:
    script = (
        "import io, resource\n"
        "from PIL import Image\n"
        "from service.codecs.images import jpeg\n"
        "file = io.BytesIO()\n"
        "Image.new('L', (8000, 8000)).save(file, 'jpeg')\n"
        "jpeg.decode(file.getvalue(), 1 << 40)\n"
        "now = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 25), now + (1 << 25)))\n"
        "try:\n    jpeg.decode(file.getvalue(), 1 << 40)\n"
        "except MemoryError:\n    print('no memory')\n"
    )
    if sys.platform != "linux":
        pytest.skip("only Linux enforces RLIMIT_AS")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=120)
    assert done.stdout == b"no memory\n", done.stderr.decode()


@pytest.mark.robustness(73)
@pytest.mark.parametrize(
    "error", [zlib.error("Error -4 while decompressing data"), zstd.ZstdError("Allocation error : not enough memory")]
)
def test_library_out_of_memory_errors_become_memory_error(error: Exception) -> None:
    with pytest.raises(MemoryError):
        raise_if_out_of_memory(error)
    raise_if_out_of_memory(zlib.error("Error -3 while decompressing data: incorrect header check"))
