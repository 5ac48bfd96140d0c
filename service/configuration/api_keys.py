"""API keys from a list and from a file that is read again when it changes; stored and compared as SHA-256 hashes.

An entry is a key, or a name for the log and a key: `NAME:KEY`. No message contains a key or an invalid key.
"""

import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import structlog

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME_RULE = "the text before the first colon is the name of a key: 1 to 64 letters, digits, - and _"

KEY_PATTERN = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,256}")
KEY_RULE = "a key has 16 to 256 visible ASCII characters and no comma; `openssl rand -hex 32` creates one"

COMMENT_PATTERN = re.compile(r"(?:^|\s)#.*")

MAX_KEY_FILE_BYTES = 1_000_000
"""Maximum size of the file of keys, in bytes."""

KEY_FILE_CHECK_INTERVAL_S = 1.0
"""Seconds between checks of the file; a change is read once the file has not changed for as long."""


class InvalidKeys(ValueError):
    """Invalid list or file of API keys."""


def parse_keys(text: str) -> Mapping[bytes, str]:
    """Return the names of comma-separated keys, by hash. Raises InvalidKeys."""
    return _hash_keys((f"key {number}", entry.strip()) for number, entry in enumerate(text.split(","), 1))


def read_keys(path: Path) -> Mapping[bytes, str]:
    """Return the names of the keys in a file, by hash: one per line, without # comments. Raises InvalidKeys."""
    return _read_file(path)[1]


class KeyRing:
    """The valid keys and their names: those of a list and those of a file.

    It can be passed to another process, which starts with the keys that are valid here, even if the file is damaged.
    """

    def __init__(self, listed: str | None, path: Path | None) -> None:
        """Read the keys. Raises InvalidKeys."""
        self._listed_keys = {} if listed is None else parse_keys(listed)
        self._path = path
        self._state: _FileState | None = None
        self._last_seen_state: _FileState | None = None
        self.last_problem: str | None = None
        """Reason why the file could not be read again when it was last checked."""
        file_keys: Mapping[bytes, str] = {}
        self._next_check_at = time.monotonic() + KEY_FILE_CHECK_INTERVAL_S
        if path is not None:
            self._state, file_keys = _read_file(path)
        self._names = {**file_keys, **self._listed_keys}

    def find_name(self, key: bytes) -> str | None:
        """Return the name of a valid key, None for an invalid one. The time does not depend on the number of keys.

        The lookup compares SHA-256 digests: its time can reveal at most how many leading bytes of the digests agree,
        which says nothing about a valid key.
        """
        self.check_file()
        return self._names.get(sha256(key).digest())

    def check_file(self) -> None:
        """Read the file again if it has changed; the last valid keys stay in force while it is missing or invalid."""
        if self._path is not None and time.monotonic() >= self._next_check_at:
            self._check_file(self._path)

    def reload(self) -> None:
        """Read the file again now, changed or not; the last valid keys stay in force if it is missing or invalid."""
        if self._path is not None:
            self._state = self._last_seen_state = self.last_problem = None
            self._check_file(self._path, is_complete=True)

    def _check_file(self, path: Path, *, is_complete: bool = False) -> None:
        log = structlog.get_logger("corr2d")
        try:
            state = _get_file_state(path.stat())
            # A file that changed just now may be incomplete.
            is_complete |= (
                state == self._last_seen_state or time.time() - state.changed_ns / 1e9 > KEY_FILE_CHECK_INTERVAL_S
            )
            self._last_seen_state = state
            if state != self._state and is_complete:
                self._state, file_keys = _read_file(path)
                self._names = {**file_keys, **self._listed_keys}
                log.info("API keys read again", file=str(path), keys=len(file_keys))
        except (InvalidKeys, OSError) as error:
            if str(error) != self.last_problem:
                log.warning("API keys not read again, the last ones stay in force", file=str(path), reason=str(error))
            self.last_problem = str(error)
        else:
            self.last_problem = None
        self._next_check_at = time.monotonic() + KEY_FILE_CHECK_INTERVAL_S


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


def _read_file(path: Path) -> tuple[_FileState, Mapping[bytes, str]]:
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


def _hash_keys(entries: Iterable[tuple[str, str]]) -> Mapping[bytes, str]:
    """Return the name of each entry, KEY or NAME:KEY, by the hash of its key; without a name, its label is the name."""
    names = {}
    for label, entry in entries:
        name, colon, key = entry.partition(":")
        if not colon:
            name, key = label, entry
        elif not NAME_PATTERN.fullmatch(name):
            raise InvalidKeys(f"{label} is not a valid key: {NAME_RULE}")
        if not KEY_PATTERN.fullmatch(key):
            raise InvalidKeys(f"{label} is not a valid key: {KEY_RULE}")
        names[sha256(key.encode()).digest()] = name
    if not names:
        raise InvalidKeys(f"contains no key: {KEY_RULE}")
    return names
