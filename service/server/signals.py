"""Signals that the processes of the server ignore, and the signal that stops one immediately."""

import signal

IGNORED_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that would end a process by default, and have no meaning here."""

QUIT_SIGNAL = getattr(signal, "SIGQUIT", None)
"""The signal that exits immediately; Windows has none."""


def ignore_signals() -> None:
    """Ignore signals that would end the process by accident, such as SIGHUP when a terminal is closed."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
