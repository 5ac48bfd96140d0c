"""Settings whose defaults depend on the machine: cores, memory of all requests, memory of one computation."""

from collections.abc import Mapping

from core import usable_cores, usable_memory
from service.configuration.settings import ENV_PREFIX, Settings
from service.scheduling.admission import COMPUTE_MEMORY_FRACTION

REQUEST_MEMORY_FRACTION = 0.6
"""Fraction of the memory of the machine or its control groups; the rest is for Python, torch and compiled code."""

DEFAULT_MAX_COMPUTE_MB = 2000


def compute_defaults(settings: Settings) -> Settings:
    """Return the settings with the defaults that depend on the machine in place of None."""
    megabytes = settings.memory_mb
    if megabytes is None:
        megabytes = max(
            REQUEST_MEMORY_FRACTION * usable_memory() / 1e6,
            settings.workers * (settings.max_compute_mb or 0) / COMPUTE_MEMORY_FRACTION,
        )
    largest = settings.max_compute_mb or min(
        DEFAULT_MAX_COMPUTE_MB, COMPUTE_MEMORY_FRACTION * megabytes / settings.workers
    )
    computed = {
        "threads": settings.threads or usable_cores(),
        "memory_mb": round(megabytes, 3),
        "max_compute_mb": round(largest, 3),
    }
    return settings.model_copy(update=computed)


def find_limit_settings(given: Settings, in_force: Settings) -> Mapping[str, str]:
    """Return the setting that limits each quantity of a computation, by the names of core.TooLarge.

    Its memory is limited by that of all requests, unless `max_compute_mb` is given or its default is smaller.
    """
    is_limited_by_requests = given.max_compute_mb is None and in_force.max_compute_mb != DEFAULT_MAX_COMPUTE_MB
    return {
        "memory": ENV_PREFIX + ("MEMORY_MB" if is_limited_by_requests else "MAX_COMPUTE_MB"),
        "compute": ENV_PREFIX + "MAX_COMPUTE_GFLOP",
        "time": ENV_PREFIX + "REQUEST_TIMEOUT_S",
    }
