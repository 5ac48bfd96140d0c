"""Signals that the processes of the server ignore, and those that reload or stop it immediately."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

IGNORED_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that would end a process by default, and have no meaning until a handler is set."""

RELOAD_SIGNAL = getattr(signal, "SIGHUP", None)
"""The signal that reloads: a supervisor restarts its workers, a single process reads its API keys again."""

QUIT_SIGNAL = getattr(signal, "SIGQUIT", None)
"""The signal that exits immediately; Windows has none."""


@contextmanager
def hold_reload_signal() -> Iterator[None]:
    """Hold back RELOAD_SIGNAL for the block; a process that is started in it never receives the signal.

    Its parent has a handler, which is not inherited: without this, the signal would end a process that just starts.
    """
    if RELOAD_SIGNAL is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {RELOAD_SIGNAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore signals that would end the process by accident, such as SIGHUP when a terminal is closed."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
