"""API keys: read from a list and from a file that may change, kept and looked up as hashes.

No message here quotes a key, or what was meant to be one.
"""

import os
import re
import stat
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import structlog

KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,256}")
RULE = "a key has 16 to 256 visible ASCII characters and no comma, as `openssl rand -hex 32` makes them"

COMMENT = re.compile(r"(?:^|\s)#.*")

MAX_FILE = 1_000_000
"""Bytes of a file of keys."""

LOOK_S = 1.0
"""The file is looked at no more often than that, and a change of it counts once it has stood still for as long."""


class BadKeys(ValueError):
    """What was meant to be keys and is not."""


def listed_keys(text: str) -> tuple[bytes, ...]:
    """The hashes of keys with commas between them. Raises BadKeys."""
    keys = [key.strip() for key in text.split(",")]
    return _hashed((f"key {number} of {len(keys)}", key) for number, key in enumerate(keys, 1))


def keys_in_file(path: Path) -> tuple[bytes, ...]:
    """The hashes of a file's keys: one a line, blank lines and comments (# to the end) left out. Raises BadKeys."""
    return _read(path)[1]


class KeyRing:
    """The keys that are valid now: those of a list, and those that a file holds."""

    def __init__(self, listed: str | None, path: Path | None) -> None:
        """Raises BadKeys."""
        self._log = structlog.get_logger("corr2d")
        self._listed = () if listed is None else listed_keys(listed)
        self._path = path
        self._state: _State | None = None
        self._seen: _State | None = None
        self._complaint: str | None = None
        self._in_file: tuple[bytes, ...] = ()
        self._next_look = time.monotonic() + LOOK_S
        if path is not None:
            self._state, self._in_file = _read(path)
        self._all = frozenset(self._listed + self._in_file)

    def has(self, key: bytes) -> bool:
        """Return whether it is one of them, in the same time however many there are.

        What is looked up is the key's SHA-256: how far that agrees with the digest of a valid key, which is all that
        the time of the look-up could tell, says nothing about the valid key.
        """
        if self._path is not None and time.monotonic() >= self._next_look:
            self._look(self._path)
            self._next_look = time.monotonic() + LOOK_S
        return sha256(key).digest() in self._all

    def _look(self, path: Path) -> None:
        """Take up the file's keys where it has changed; the last good ones stay while it is none, or no good."""
        try:
            state = _state(path.stat())
            # Somebody may be in the middle of writing it.
            settled = state == self._seen or time.time() - state.changed_ns / 1e9 > LOOK_S
            self._seen = state
            if state != self._state and settled:
                self._state, self._in_file = _read(path)
                self._all = frozenset(self._listed + self._in_file)
                self._log.info("API keys read again", file=str(path), keys=len(self._in_file))
        except (BadKeys, OSError) as error:
            if str(error) != self._complaint:
                self._log.warning("API keys not read again, the last ones stay", file=str(path), reason=str(error))
            self._complaint = str(error)
        else:
            self._complaint = None


class _State(NamedTuple):
    """What tells one state of a file from another."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def _state(found: os.stat_result) -> _State:
    if not stat.S_ISREG(found.st_mode):
        raise BadKeys("is not a file")
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(path: Path) -> tuple[_State, tuple[bytes, ...]]:
    try:
        # To open a pipe would be to wait for its writer.
        _state(path.stat())
        with path.open("rb") as file:
            state, content = _state(os.fstat(file.fileno())), file.read(MAX_FILE + 1)
    except OSError as error:
        raise BadKeys(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if len(content) > MAX_FILE:
        raise BadKeys(f"has more than {MAX_FILE:,} bytes")
    lines = enumerate(content.decode("utf-8-sig", "replace").split("\n"), 1)
    keys = [(f"line {number}", COMMENT.sub("", line.rstrip()).strip()) for number, line in lines]
    return state, _hashed((where, key) for where, key in keys if key)


def _hashed(keys: Iterable[tuple[str, str]]) -> tuple[bytes, ...]:
    hashes = []
    for where, key in keys:
        if not KEY.fullmatch(key):
            raise BadKeys(f"{where} is no key: {RULE}")
        hashes.append(sha256(key.encode()).digest())
    if not hashes:
        raise BadKeys(f"holds no key: {RULE}")
    return tuple(hashes)
