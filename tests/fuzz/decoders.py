"""Fuzz a decoder, guided by the branches it takes: `python tests/fuzz/decoders.py png --seconds 600`.

Whatever the bytes, a decoder returns what is sound and within the limit, or raises a ServiceError. Anything else, a
crash, a hang or too much memory is a finding: it is written to a file, the command that repeats it is printed, and the
exit code is not 0. With --corpus, what was found to take new branches is kept there and built upon the next time.
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

from backports import zstd

try:
    import atheris
except ImportError:
    sys.exit(
        "atheris is not installed: .venv/bin/pip install atheris\n"
        "(it has wheels for some versions of Python on Linux; see https://pypi.org/project/atheris/#files)"
    )

# Numba compiles that one from its bytecode, which must be as it was written.
with atheris.instrument_imports(include=["service.codecs"], exclude=["service.codecs.json_scanner"]):
    from service.codecs import content_coding
    from service.errors import ServiceError
    from tests.fuzz import checksums
    from tests.service.codecs.json_oracle import assert_matches_orjson
    from tests.service.codecs.valid_files import VALID_FILES, assert_valid_arrays

DECODE_LIMIT_BYTES = 1_000_000
MAX_INPUT_BYTES = 8192
SECONDS_PER_INPUT = 5
MEMORY_MB = 1024
"""Of the whole process. Its imports alone, numpy and what decodes JSON, are a quarter of it."""

InputCheck = Callable[[bytes], None]


@dataclass(frozen=True)
class FuzzTarget:
    """What must be true of any bytes, valid files to begin from, and how a mutated one gets past its checksums."""

    check: InputCheck
    seeds: Sequence[bytes]
    repair: Callable[[bytes], bytes] = bytes


def build_decoder_check(decode: Callable[[bytes, int], object]) -> InputCheck:
    def check(content: bytes) -> None:
        decoded: object = {}
        refusal = "a sentence"
        try:
            decoded = decode(content, DECODE_LIMIT_BYTES)
        except ServiceError as error:
            refusal = error.detail
        assert_valid_arrays(decoded, DECODE_LIMIT_BYTES)
        assert 0 < len(refusal) < 1000, refusal

    return check


def create_target(name: str, repair: Callable[[bytes], bytes] = bytes) -> FuzzTarget:
    """The format whose files are called so, all of which have one decoder."""
    files = [file for kind, file in VALID_FILES.items() if name in kind.split()]
    return FuzzTarget(build_decoder_check(files[0][0]), [content for _, content in files], repair)


def create_coding_target(name: str, seed: bytes) -> FuzzTarget:
    """A content coding, which decodes to bytes within the limit."""

    def check(content: bytes) -> None:
        with suppress(ServiceError):
            assert len(content_coding.decode(name, content, DECODE_LIMIT_BYTES)) <= DECODE_LIMIT_BYTES

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
    "json": FuzzTarget(assert_matches_orjson, JSON_SEEDS),
    "gzip": create_coding_target("gzip", gzip.compress(JSON_SEEDS[0])),
    "deflate": create_coding_target("deflate", zlib.compress(JSON_SEEDS[0])),
    "zstd": create_coding_target("zstd", zstd.compress(JSON_SEEDS[0])),
}


def fuzz(name: str, seconds: int, corpus: Path, findings: Path) -> None:
    """Mutate what is in the corpus until the time is over or something is found; does not return."""
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

    sys.stderr.write(f"what is found goes to {findings}; again: python tests/fuzz/decoders.py {name} --again FILE\n")
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
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="a folder of inputs to begin from, and to keep new ones in")
    parser.add_argument("--again", type=Path, metavar="FILE", help="check the bytes of one file, and nothing else")
    arguments = parser.parse_args()
    if arguments.again:
        TARGETS[arguments.format].check(arguments.again.read_bytes())
        return
    findings = Path(tempfile.mkdtemp(prefix="corr2d-fuzz-"))
    corpus = arguments.corpus or findings / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    fuzz(arguments.format, arguments.seconds, corpus, findings)


if __name__ == "__main__":
    main()
