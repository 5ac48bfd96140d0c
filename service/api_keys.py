"""API keys from a list and from a file that is read again when it changes; stored and compared as SHA-256 hashes.

No message contains a key or an invalid key.
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
KEY_RULE = "a key has 16 to 256 visible ASCII characters and no comma; `openssl rand -hex 32` creates one"

COMMENT_PATTERN = re.compile(r"(?:^|\s)#.*")

MAX_KEY_FILE_BYTES = 1_000_000
"""Maximum size of the file of keys, in bytes."""

KEY_FILE_CHECK_INTERVAL_S = 1.0
"""Seconds between checks of the file; a change is read once the file has not changed for as long."""


class InvalidKeys(ValueError):
    """Invalid list or file of API keys."""


def parse_keys(text: str) -> tuple[bytes, ...]:
    """Return the hashes of comma-separated keys. Raises InvalidKeys."""
    keys = [key.strip() for key in text.split(",")]
    return _hash_keys((f"key {number} of {len(keys)}", key) for number, key in enumerate(keys, 1))


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Return the hashes of the keys in a file: one per line, without blank lines and # comments. Raises InvalidKeys."""
    return _read_file(path)[1]


class KeyRing:
    """Set of the valid keys: those of a list and those of a file."""

    def __init__(self, listed: str | None, path: Path | None) -> None:
        """Read the keys. Raises InvalidKeys."""
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
        """Return whether the key is valid. The time does not depend on the number of keys.

        The lookup compares SHA-256 digests: its time can reveal at most how many leading bytes of the digests agree,
        which says nothing about a valid key.
        """
        if self._path is not None and time.monotonic() >= self._next_check_at:
            self._reload_if_changed(self._path)
            self._next_check_at = time.monotonic() + KEY_FILE_CHECK_INTERVAL_S
        return sha256(key).digest() in self._valid_keys

    def _reload_if_changed(self, path: Path) -> None:
        """Read the file again if it has changed; the last valid keys stay in force while it is missing or invalid."""
        try:
            state = _get_file_state(path.stat())
            # A file that changed just now may be incomplete.
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
                self._log.warning(
                    "API keys not read again, the last ones stay in force", file=str(path), reason=str(error)
                )
            self._last_warning = str(error)
        else:
            self._last_warning = None


class _FileState(NamedTuple):
    """Attributes of a file that change with its content."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def _get_file_state(stat_result: os.stat_result) -> _FileState:
    if not stat.S_ISREG(stat_result.st_mode):
        raise InvalidKeys("is not a regular file")
    return _FileState(
        stat_result.st_dev, stat_result.st_ino, stat_result.st_size, stat_result.st_mtime_ns, stat_result.st_ctime_ns
    )


def _read_file(path: Path) -> tuple[_FileState, tuple[bytes, ...]]:
    try:
        # Checked before opening: opening a pipe waits for its writer.
        _get_file_state(path.stat())
        with path.open("rb") as file:
            state, content = _get_file_state(os.fstat(file.fileno())), file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidKeys(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if len(content) > MAX_KEY_FILE_BYTES:
        raise InvalidKeys(f"has more than {MAX_KEY_FILE_BYTES:,} bytes, the maximum")
    lines = enumerate(content.decode("utf-8-sig", "replace").split("\n"), 1)
    keys = [(f"line {number}", COMMENT_PATTERN.sub("", line.rstrip()).strip()) for number, line in lines]
    return state, _hash_keys((label, key) for label, key in keys if key)


def _hash_keys(keys: Iterable[tuple[str, str]]) -> tuple[bytes, ...]:
    hashes = []
    for label, key in keys:
        if not KEY_PATTERN.fullmatch(key):
            raise InvalidKeys(f"{label} is not a valid key: {KEY_RULE}")
        hashes.append(sha256(key.encode()).digest())
    if not hashes:
        raise InvalidKeys(f"contains no key: {KEY_RULE}")
    return tuple(hashes)
