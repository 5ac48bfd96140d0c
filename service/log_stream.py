"""Text stream that never blocks its caller: a thread writes, and lines are dropped if the reader falls behind."""

import atexit
import io
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue

MAX_PENDING_CHARS = 1 << 21
"""Maximum number of characters queued for writing. Further lines are dropped and counted."""

BATCH_S = 0.02
"""Seconds in which lines are collected for one write: waking the thread for each line costs more than the line."""

PIPE_BUF = getattr(select, "PIPE_BUF", 512)
"""Bytes that one write adds to a pipe at once, or not at all (POSIX)."""

DRAIN_S = 1.0
"""Longest wait, in seconds, for the reader at the end of the process."""


class LogStream(io.TextIOBase):
    """Text stream on a file descriptor that is safe to use from the event loop, from threads and signal handlers.

    A pipe blocks its writer once its reader falls 64 KiB behind. O_NONBLOCK would avoid that, but it belongs to the
    open file, which other processes share, and writes only parts of lines.
    """

    def __init__(self, descriptor: int) -> None:
        self.dropped = 0
        """Lines not written since the start, because the queue was full or the write failed."""
        self.report: Callable[[int], object] = lambda _: None
        """Called by the writing thread with the number of lines dropped, once writing succeeds again."""
        self._descriptor = descriptor
        self._pending: list[str] = []
        self._size = 0
        self._writing = False
        self._reporting = False
        self._reported = 0
        # Reentrant: a signal handler may log while its thread holds the lock.
        self._lock = threading.RLock()
        self._wake: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._run, name=f"log to {descriptor}", daemon=True).start()
        atexit.register(self.drain)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding; print and traceback read it."""
        return "utf-8"

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether a terminal reads it."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Queue the text, or drop it if too much is queued already."""
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected str")
        with self._lock:
            if self._size > MAX_PENDING_CHARS and not self._reporting:
                self.dropped += 1
            else:
                if not self._pending:
                    self._wake.put(None)
                self._pending.append(text)
                self._size += len(text)
        return len(text)

    def flush(self) -> None:
        """Return at once: loggers flush after each line. `drain` waits."""

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Wait until everything is written, at most that many seconds. For the end of the process."""
        deadline = time.monotonic() + timeout_s
        while (self._pending or self._writing) and time.monotonic() < deadline:
            time.sleep(BATCH_S / 4)

    def _run(self) -> None:
        while True:
            self._wake.get()
            time.sleep(BATCH_S)
            with self._lock:
                texts, self._pending, self._size, self._writing = self._pending, [], 0, True
                dropped = self.dropped - self._reported
            # A list, not a generator: a failed chunk does not keep the next ones from being written.
            written = [self._write(chunk) for chunk in _split_chunks(texts)]
            if all(written) and dropped:
                self._reported += dropped
                self._reporting = True
                self.report(dropped)
                self._reporting = False
            self._writing = False

    def _write(self, content: bytes) -> bool:
        """Write everything, however long the reader takes; return False if it fails, as on a full disk."""
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            with self._lock:
                self.dropped += content.count(b"\n")
            return False
        return True


def _split_chunks(texts: Iterable[str]) -> Iterator[bytes]:
    """Yield whole lines in chunks of at most PIPE_BUF bytes, which a pipe does not mix with other writers' output."""
    chunk = b""
    for text in texts:
        line = text.encode("utf-8", "backslashreplace")
        if chunk and len(chunk) + len(line) > PIPE_BUF:
            yield chunk
            chunk = b""
        chunk += line
    yield chunk


def open_standard_files() -> None:
    """Open the null device in place of each standard file that is closed.

    Otherwise the next file or socket gets its number, and whatever is printed goes into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        # For worker processes too.
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - it takes no name
    os.close(descriptor)
