"""State of the application: the objects that exist once per process."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.applications import Starlette

from service.configuration.settings import Settings
from service.metrics.counters import Metrics
from service.readiness import Readiness
from service.scheduling.admission import Admission
from service.scheduling.compute import Compute
from service.scheduling.pool import WorkerPool


@dataclass(slots=True, eq=False)
class AppState:
    """State of the application, on which all requests of a process depend."""

    settings: Settings
    """Settings, with computed defaults."""

    limit_settings: Mapping[str, str]
    """Name of the setting that limits each quantity of a computation: memory, compute and time."""

    metrics: Metrics
    admission: Admission

    pool: WorkerPool
    """Pool of the computations."""

    codecs: WorkerPool
    """Pool of decoding and encoding."""

    compute: Compute
    readiness: Readiness

    owns_process: bool = False
    """True if the application may change and end its process, because no other application runs in it."""

    starts_ready: bool = False
    """True if startup awaits the warm-up, and fails if it fails."""

    accepts_buffers: bool = False
    """True if the server sends any buffer. ASGI specifies bytes, and other servers may depend on that."""

    metrics_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock of the thread that renders /metrics: there is one at a time."""

    @property
    def max_body_bytes(self) -> int:
        """Maximum size of a request body, also of a decompressed one."""
        return int(self.settings.max_body_mb * 1e6)

    def update_gauges(self) -> None:
        """Set the gauges of /metrics that follow the pool and the memory."""
        self.metrics.computations.set(self.pool.running)
        self.metrics.queue_depth.set(self.pool.depth)
        self.metrics.memory_used.set(self.admission.used)
        self.metrics.memory_limit.set(self.admission.memory)


def set_app_state(app: Starlette, state: AppState) -> None:
    """Store the state in the application."""
    app.state.corr2d = state


def get_app_state(app: Starlette) -> AppState:
    """Return the state of an application that create_app has made."""
    state: AppState = app.state.corr2d
    return state
