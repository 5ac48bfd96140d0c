"""Ends of commands with an error: one line on stderr, or in the log, and an exit code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import structlog
import typer

from service import exit_codes
from service.configuration.settings import Settings, SettingsError, load_settings
from service.log import is_json_log


def exit_with_error(message: str, code: int) -> NoReturn:
    """Print the message, as a line of the log if that is JSON, and exit."""
    if is_json_log():
        structlog.get_logger("corr2d").error(message)
    else:
        typer.echo(f"corr2d: {message}", err=True)
    raise typer.Exit(code)


def load_settings_or_exit(flags: Mapping[str, object]) -> Settings:
    """Return the settings in force, or exit with an error."""
    try:
        return load_settings(**flags)
    except SettingsError as error:
        exit_with_error(str(error), exit_codes.INVALID_SETTINGS)


@contextmanager
def report_errors() -> Iterator[None]:
    """Report errors that the user can fix as one line on stderr, and exit."""
    from service.cli.error_messages import EXPECTED_ERRORS, describe_error

    try:
        yield
    except EXPECTED_ERRORS as error:
        message = describe_error(error)
        if message is None:
            raise
        exit_with_error(message, exit_codes.COMMAND_FAILED)
