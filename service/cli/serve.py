"""The command `corr2d serve`: the listening socket, the greeting, and the server."""

import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping

from service import exit_codes
from service.cli.exits import exit_with_error, load_settings_or_exit
from service.configuration.api_keys import KeyRing
from service.configuration.settings import ENV_PREFIX, Settings, list_variables
from service.imports import without_garbage_collection
from service.log import configure_logging
from service.log_stream import LogStream, open_standard_files
from service.server.listener import open_unix_listener, stop_accepting
from service.server.malloc import limit_malloc_arenas
from service.server.signals import ignore_signals
from service.version import VERSION

STDOUT_FD = 1
"""File descriptor of stdout; Python has no stream for it if it was closed at startup."""

LISTEN_BACKLOG = 2048
"""Number of connections that the system queues until the service accepts them."""

EXAMPLE_COMMAND = """curl --json '{"input": [[0,1,2],[3,4,5],[6,7,8]], "kernel": [[0,1],[2,3]]}' %s/correlate"""


def serve(flags: Mapping[str, object]) -> None:
    """Serve with the settings of these flags and of the environment, until SIGINT or SIGTERM."""
    # Set before torch is loaded, which takes seconds: the first process of a container receives only signals that it
    # has a handler for. uvicorn shuts down gracefully, then raises the signal again for this handler.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    ignore_signals()
    limit_malloc_arenas()
    open_standard_files()
    # Before the settings are valid: the error of an invalid one is a line of the log.
    log_format, replica = (
        flags[name] or list_variables().get(ENV_PREFIX + name.upper()) for name in ("log_format", "replica")
    )
    configure_logging("json" if log_format == "json" else "console", str(replica) if replica else None)
    settings = load_settings_or_exit(flags)
    # Here, and not after torch is loaded: the file has just been checked.
    keys = settings.read_api_keys()
    listener = _open_listener(settings)
    try:
        _serve(settings, listener, keys)
    finally:
        if listener.fileno() != -1:
            # Not closed by a graceful stop: remove the file of a Unix socket.
            stop_accepting(listener)


def _serve(settings: Settings, listener: socket.socket, keys: KeyRing | None) -> None:
    with without_garbage_collection():
        from core import CoreError, resolve_device
        from service.server.run import run

    try:
        resolve_device(settings.device)
    except CoreError as error:
        exit_with_error(f"{ENV_PREFIX}DEVICE {error}", exit_codes.INVALID_SETTINGS)
    # A LogStream does not block if stdout is a pipe that is not read.
    LogStream(STDOUT_FD).write(_format_greeting(settings, listener.getsockname()))
    run(settings, listener, keys)


def _format_greeting(settings: Settings, name: str | tuple[str, int]) -> str:
    """Return the address of the service and a command that tries it; `name` is that of the listening socket."""
    scheme = "http" if settings.ssl_certfile is None else "https"
    options, hints = "", "API docs: /docs, stop: Ctrl-C"
    if isinstance(name, str):
        address, url = f"unix:{name}", f"{scheme}://localhost"
        options += f" --unix-socket {shlex.quote(name)}"
    else:
        host, port = name[:2]
        hints = f"open it in a browser, {hints}"
        address = url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    if settings.ssl_certfile is not None:
        options += f" --cacert {shlex.quote(str(settings.ssl_certfile))}"
    if settings.requires_api_key:
        options += " -H 'X-API-Key: ...'"
    return f"corr2d {VERSION} listens on {address} ({hints}). Try:\n  {EXAMPLE_COMMAND % url}{options}\n"


def _open_listener(settings: Settings) -> socket.socket:
    """Return a listening socket. Opened before torch is loaded, so that a port in use is reported at once."""
    if settings.uds is not None:
        try:
            return open_unix_listener(settings.uds, LISTEN_BACKLOG)
        except OSError as error:
            exit_with_error(
                f"cannot listen on the Unix socket {settings.uds}: {(error.strerror or str(error)).lower()}; "
                f"choose another path with {ENV_PREFIX}UDS (--uds)",
                exit_codes.INVALID_SETTINGS,
            )
    is_ipv6 = ":" in settings.host
    try:
        return socket.create_server(
            (settings.host, settings.port),
            family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
            backlog=LISTEN_BACKLOG,
            # The address :: accepts IPv4 too, whatever net.ipv6.bindv6only is.
            dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        exit_with_error(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; "
            f"choose another address with {ENV_PREFIX}HOST and {ENV_PREFIX}PORT (--host, --port)",
            exit_codes.INVALID_SETTINGS,
        )
