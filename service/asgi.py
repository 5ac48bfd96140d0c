"""Application for any ASGI server, with the settings of the environment.

For example `uvicorn --factory service.asgi:create_app`.
"""

import sys

from fastapi import FastAPI

from service import exit_codes
from service.configuration.settings import Settings, SettingsError, load_settings
from service.imports import without_garbage_collection
from service.log import configure_logging
from service.server.malloc import limit_malloc_arenas


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application with these settings, by default those of the environment, and configure its process.

    The startup of the application waits for the warm-up. The limits on connections belong to the server of
    `corr2d serve` and do not apply. An invalid environment variable ends the process with one line and exit code 3.
    """
    # Before torch is loaded.
    limit_malloc_arenas()
    settings = settings or _load_settings_or_exit()
    configure_logging(settings.log_format, settings.replica)
    with without_garbage_collection():
        from service.app import create_worker_app

    return create_worker_app(settings, starts_ready=True)


def _load_settings_or_exit() -> Settings:
    try:
        return load_settings()
    except SettingsError as error:
        sys.stderr.write(f"corr2d: {error}\n")
        sys.exit(exit_codes.INVALID_SETTINGS)
