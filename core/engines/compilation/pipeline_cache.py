"""Disk cache of compiled pipelines: object files in the user's cache folder."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CACHE_FORMAT_VERSION = 1
"""Version of the cache's file format; part of the hash in the file names."""

CACHE_MAX_AGE_DAYS = 60
"""Days without use after which a cached file is removed."""


class Argument(NamedTuple):
    """An argument of a pipeline: the name of its numpy dtype and its number of dimensions, None for a scalar."""

    dtype: str
    dimensions: int | None


class ObjectFile(NamedTuple):
    """A compiled pipeline: its arguments and the object code."""

    arguments: Sequence[Argument]
    code: bytes


def pipeline_name(module: str, name: str, key: tuple[object, ...]) -> str:
    """Return the name of a pipeline's file in the cache, which is also the name of its function."""
    return "p" + hashlib.sha256(repr((_build_fingerprint(), module, name, key)).encode()).hexdigest()[:40]


def read_cached(name: str) -> ObjectFile | None:
    """Return a pipeline from the cache, or None if it is missing or its checksum is wrong."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        path = folder / name
        digest, header, code = path.read_bytes().split(b"\n", 2)
        path.touch()
        if hashlib.sha256(header + code).hexdigest().encode() != digest:
            return None
        return ObjectFile([Argument(*argument) for argument in json.loads(header)], code)
    except (OSError, ValueError, TypeError):
        return None


def write_cached(name: str, built: ObjectFile) -> None:
    """Write a pipeline to the cache if possible; errors of the file system are ignored."""
    folder = cache_folder()
    if folder is None:
        return
    header = json.dumps(built.arguments).encode()
    content = b"\n".join([hashlib.sha256(header + built.code).hexdigest().encode(), header, built.code])
    with contextlib.suppress(OSError):
        # Written to a temporary file and renamed, so that other processes never read an incomplete file.
        descriptor, path = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(path).replace(folder / name)
        except OSError:
            Path(path).unlink()


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder for compiled pipelines, writable only by this user, or None if it cannot be created.

    It is in XDG_CACHE_HOME or ~/.cache or, if that is not writable, in the system's folder for temporary files.
    """
    owner = os.getuid() if hasattr(os, "getuid") else 0
    for name in ("home", "temporary"):
        # Without a home folder expanduser raises RuntimeError; without a temporary folder gettempdir raises OSError.
        with contextlib.suppress(OSError, RuntimeError):
            if name == "home":
                folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "corr2d"
            else:
                folder = Path(tempfile.gettempdir()) / f"corr2d-{owner}"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            # The files are executed, so other users must not be able to write them.
            ours = not hasattr(os, "getuid") or (found.st_uid == owner and not found.st_mode & 0o022)
            if stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK):
                return folder
    return None


@contextmanager
def lock_cached(name: str) -> Iterator[None]:
    """Hold an exclusive lock between processes on a file of the cache."""
    folder = cache_folder()
    if folder is None or fcntl is None:
        yield
        return
    with (folder / "lock").open("a") as lock:
        # Each name locks one byte of the lock file.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(name[1:9], 16))
        yield


def prune_cache() -> None:
    """Remove cached files that were not used for CACHE_MAX_AGE_DAYS: each version of the engines adds new files."""
    folder = cache_folder()
    for path in folder.iterdir() if folder is not None else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > CACHE_MAX_AGE_DAYS * 86_400:
                path.unlink()


@functools.cache
def _build_fingerprint() -> tuple[str, ...]:
    """Return everything besides name and arguments that the object code of a pipeline depends on."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        text.update(path.read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    processor = llvm.get_process_triple(), llvm.get_host_cpu_name(), features
    return (str(CACHE_FORMAT_VERSION), importlib.metadata.version("halide"), *processor, text.hexdigest())
