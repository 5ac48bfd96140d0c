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

KEY_PATTERN = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,256}")
KEY_RULE = "a key has 16 to 256 visible ASCII characters and no comma, as `openssl rand -hex 32` makes them"

COMMENT_PATTERN = re.compile(r"(?:^|\s)#.*")

MAX_KEY_FILE_BYTES = 1_000_000
"""Bytes of a file of keys."""

KEY_FILE_CHECK_INTERVAL_S = 1.0
"""The file is looked at no more often than that, and a change of it counts once it has stood still for as long."""


class InvalidKeys(ValueError):
    """What was meant to be keys and is not."""


def parse_keys(text: str) -> tuple[bytes, ...]:
    """The hashes of keys with commas between them. Raises BadKeys."""
    keys = [key.strip() for key in text.split(",")]
    return _hash_keys((f"key {number} of {len(keys)}", key) for number, key in enumerate(keys, 1))


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The hashes of a file's keys: one a line, blank lines and comments (# to the end) left out. Raises BadKeys."""
    return _read_file(path)[1]


class KeyRing:
    """The keys that are valid now: those of a list, and those that a file holds."""

    def __init__(self, listed: str | None, path: Path | None) -> None:
        """Raises BadKeys."""
        self._log = structlog.get_logger("corr2d")
        self._listed_keys = () if listed is None else parse_keys(listed)
        self._path = path
        self._state: _FileState | None = None
        self._last_seen_state: _FileState | None = None
        self._last_warning: str | None = None
        self._file_keys: tuple[bytes, ...] = ()
        self._next_check_at = time.monotonic() + KEY_FILE_CHECK_INTERVAL_S
        if path is not None:
            self._state, self._file_keys = _read_file(path)
        self._valid_keys = frozenset(self._listed_keys + self._file_keys)

    def is_valid(self, key: bytes) -> bool:
        """Return whether it is one of them, in the same time however many there are.

        What is looked up is the key's SHA-256: how far that agrees with the digest of a valid key, which is all that
        the time of the look-up could tell, says nothing about the valid key.
        """
        if self._path is not None and time.monotonic() >= self._next_check_at:
            self._reload_if_changed(self._path)
            self._next_check_at = time.monotonic() + KEY_FILE_CHECK_INTERVAL_S
        return sha256(key).digest() in self._valid_keys

    def _reload_if_changed(self, path: Path) -> None:
        """Take up the file's keys where it has changed; the last good ones stay while it is none, or no good."""
        try:
            state = _get_file_state(path.stat())
            # Somebody may be in the middle of writing it.
            is_stable = (
                state == self._last_seen_state or time.time() - state.changed_ns / 1e9 > KEY_FILE_CHECK_INTERVAL_S
            )
            self._last_seen_state = state
            if state != self._state and is_stable:
                self._state, self._file_keys = _read_file(path)
                self._valid_keys = frozenset(self._listed_keys + self._file_keys)
                self._log.info("API keys read again", file=str(path), keys=len(self._file_keys))
        except (InvalidKeys, OSError) as error:
            if str(error) != self._last_warning:
                self._log.warning("API keys not read again, the last ones stay", file=str(path), reason=str(error))
            self._last_warning = str(error)
        else:
            self._last_warning = None


class _FileState(NamedTuple):
    """What tells one state of a file from another."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def _get_file_state(stat_result: os.stat_result) -> _FileState:
    if not stat.S_ISREG(stat_result.st_mode):
        raise InvalidKeys("is not a file")
    return _FileState(
        stat_result.st_dev, stat_result.st_ino, stat_result.st_size, stat_result.st_mtime_ns, stat_result.st_ctime_ns
    )


def _read_file(path: Path) -> tuple[_FileState, tuple[bytes, ...]]:
    try:
        # To open a pipe would be to wait for its writer.
        _get_file_state(path.stat())
        with path.open("rb") as file:
            state, content = _get_file_state(os.fstat(file.fileno())), file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidKeys(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if len(content) > MAX_KEY_FILE_BYTES:
        raise InvalidKeys(f"has more than {MAX_KEY_FILE_BYTES:,} bytes")
    lines = enumerate(content.decode("utf-8-sig", "replace").split("\n"), 1)
    keys = [(f"line {number}", COMMENT_PATTERN.sub("", line.rstrip()).strip()) for number, line in lines]
    return state, _hash_keys((label, key) for label, key in keys if key)


def _hash_keys(keys: Iterable[tuple[str, str]]) -> tuple[bytes, ...]:
    hashes = []
    for label, key in keys:
        if not KEY_PATTERN.fullmatch(key):
            raise InvalidKeys(f"{label} is no key: {KEY_RULE}")
        hashes.append(sha256(key.encode()).digest())
    if not hashes:
        raise InvalidKeys(f"holds no key: {KEY_RULE}")
    return tuple(hashes)
