"""Fuzz a decoder with coverage guidance: `python tests/fuzz/decoders.py png --seconds 600`.

For any bytes, a decoder must return valid arrays within the size limit or raise a ServiceError. Other results, crashes,
hangs and excessive memory are findings: the input is written to a file, the command that repeats it is printed, and the
exit code is not 0. With --corpus, inputs that reach new branches are stored in that folder and used by the next run.
"""

import argparse
import gzip
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit(
        "atheris is not installed: .venv/bin/pip install atheris\n"
        "(it has wheels for some versions of Python on Linux; see https://pypi.org/project/atheris/#files)"
    )

# Numba compiles json_scanner from its bytecode, which must not be instrumented.
with atheris.instrument_imports(include=["service.codecs"], exclude=["service.codecs.json_scanner"]):
    from service.codecs import content_coding
    from service.codecs.zstandard import zstd
    from service.errors import ServiceError
    from tests.fuzz import checksums
    from tests.service.codecs.json_oracle import assert_matches_orjson
    from tests.service.codecs.valid_files import VALID_FILES, assert_valid_arrays

DECODE_LIMIT_BYTES = 1_000_000
MAX_INPUT_BYTES = 8192
SECONDS_PER_INPUT = 5
MEMORY_MB = 1024
"""Memory limit of the process in MB; the imports (numpy, numba) need a quarter of it."""

InputCheck = Callable[[bytes], None]


@dataclass(frozen=True)
class FuzzTarget:
    """Check of a decoder for any bytes, valid files as seeds, and a function that repairs mutated checksums."""

    check: InputCheck
    seeds: Sequence[bytes]
    repair: Callable[[bytes], bytes] = bytes


def build_decoder_check(decode: Callable[[bytes, int], object]) -> InputCheck:
    def check(content: bytes) -> None:
        decoded: object = {}
        detail = "decoded"
        try:
            decoded = decode(content, DECODE_LIMIT_BYTES)
        except ServiceError as error:
            detail = error.detail
        assert_valid_arrays(decoded, DECODE_LIMIT_BYTES)
        assert 0 < len(detail) < 1000, detail

    return check


def create_target(name: str, repair: Callable[[bytes], bytes] = bytes) -> FuzzTarget:
    """Return the target of a format; its valid files share one decoder."""
    files = [file for kind, file in VALID_FILES.items() if name in kind.split()]
    return FuzzTarget(build_decoder_check(files[0][0]), [content for _, content in files], repair)


def create_coding_target(name: str, seed: bytes) -> FuzzTarget:
    """Return the target of a content coding, which must decode to bytes within the limit."""

    def check(content: bytes) -> None:
        with suppress(ServiceError):
            assert len(content_coding.decompress(name, content, DECODE_LIMIT_BYTES)) <= DECODE_LIMIT_BYTES

    return FuzzTarget(check, [seed])


JSON_SEEDS = (
    b'{"input": [[1, 2.5e1, -3], [4, 5, 0.25]], "kernel": [[1, 0.1234567890123456789]], "mode": "same"}',
    b'{"pairs": [{"X": [[[1]]], "Y": [[1e-3]]}], "stride": [1, 2], "bias": true, "seed": null}',
    b'{"input": {"shape": [2, 3], "dtype": "float32", "data": "' + b"A" * 140 + b'"}, "kernel": "gaussian(2.0)"}',
)

TARGETS: Mapping[str, FuzzTarget] = {
    "npy": create_target("npy", checksums.repair_npy),
    "npz": create_target("npz", checksums.repair_npz),
    "safetensors": create_target("safetensors", checksums.repair_safetensors),
    "png": create_target("png", checksums.repair_png),
    "jpeg": create_target("jpeg"),
    "webp": create_target("webp"),
    "tiff": create_target("tiff"),
    "multipart": create_target("multipart"),
    "json": FuzzTarget(assert_matches_orjson, JSON_SEEDS),
    "gzip": create_coding_target("gzip", gzip.compress(JSON_SEEDS[0])),
    "deflate": create_coding_target("deflate", zlib.compress(JSON_SEEDS[0])),
    "zstd": create_coding_target("zstd", zstd.compress(JSON_SEEDS[0])),
}


def fuzz(name: str, seconds: int, corpus: Path, findings: Path) -> None:
    """Mutate inputs of the corpus until the time is over or a finding occurs; does not return."""
    chosen = TARGETS[name]
    for number, seed in enumerate(chosen.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def check(content: bytes) -> None:
        try:
            chosen.check(content)
        except BaseException:
            sys.stderr.write(f"\n{name}, {len(content)} bytes: {content!r}\n")
            raise

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        mutated: bytes = atheris.Mutate(content, max_size)
        return chosen.repair(mutated)[:max_size] if random.Random(seed).random() < 0.8 else mutated  # noqa: S311

    sys.stderr.write(
        f"findings are written to {findings}; to repeat one: python tests/fuzz/decoders.py {name} --again FILE\n"
    )
    options = {
        "max_total_time": seconds,
        "max_len": MAX_INPUT_BYTES,
        "timeout": SECONDS_PER_INPUT,
        "rss_limit_mb": MEMORY_MB,
        "artifact_prefix": f"{findings}/{name}-",
        "print_final_stats": 1,
    }
    flags = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], check, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", nargs="?", choices=TARGETS)
    parser.add_argument("--list", action="store_true", help="print the formats")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--corpus", type=Path, help="folder with initial inputs; inputs that reach new branches are added"
    )
    parser.add_argument("--again", type=Path, metavar="FILE", help="only check the bytes of this file")
    arguments = parser.parse_args()
    if arguments.list:
        print(*TARGETS)  # noqa: T201 - for `make fuzz`
        return
    if arguments.format is None:
        parser.error("name a format, or --list")
    if arguments.again:
        TARGETS[arguments.format].check(arguments.again.read_bytes())
        return
    findings = Path(tempfile.mkdtemp(prefix="corr2d-fuzz-"))
    corpus = arguments.corpus or findings / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    fuzz(arguments.format, arguments.seconds, corpus, findings)


if __name__ == "__main__":
    main()
