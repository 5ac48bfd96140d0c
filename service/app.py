"""The application: everything is built here, from settings, and nothing before."""

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio.to_thread
import structlog
import torch
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from core import ENGINES, Machine, usable_cores, usable_memory, use_one_blas_thread
from service import exit_codes
from service.api_keys import KeyRing
from service.log import exit_now
from service.metrics.counters import Metrics, SharedCounters
from service.middleware.auth import DOCS_ASSETS_PATH, APIKeyMiddleware, CrossOriginMiddleware, SecurityHeadersMiddleware
from service.middleware.request_log import RequestLogMiddleware
from service.openapi import extend_schema
from service.problems import PROBLEM_NAMES, add_error_handlers, respond_to_protocol_error
from service.readiness import Readiness, warm_up_service
from service.routes import conv2d, correlate, health, info, kernels, metrics, pages, train_kernel
from service.routes.raw_route import FastPathMiddleware
from service.scheduling.admission import COMPUTE_MEMORY_FRACTION, Admission
from service.scheduling.compute import Compute
from service.scheduling.pool import WorkerPool
from service.scheduling.threads import run_at_low_priority
from service.server.malloc import limit_malloc_arenas
from service.settings import Settings
from service.version import VERSION

API_DESCRIPTION = """\
Convolution as a service: post arrays, get back their 2-D cross-correlation, a Conv2d layer's output, or a kernel
learned from examples. Errors are `application/problem+json` and say what came, what is allowed and how to change it.
"""

COMPUTE_CONCURRENCY = 2
"""Computations at a time, each with all threads, where there are as many; beside them one more that is short.

Likewise bodies that are decoded and responses that are encoded, each in one thread.
"""

GIL_SWITCH_INTERVAL_S = 5e-4

REQUEST_MEMORY_FRACTION = 0.6
"""Of what the machine or the container has: for requests. The rest is for Python, torch and compiled code."""

DEFAULT_MAX_COMPUTE_MB = 2000

TELEMETRY_DISABLED: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


def create_app(settings: Settings, table: SharedCounters | None = None) -> FastAPI:
    """The service with these settings, counting in that table, or in one of its own.

    Call it once a process: the threads that torch may use belong to the process.
    """
    threads = settings.threads or usable_cores()
    has_telemetry = any(name.startswith("OTEL_") for name in os.environ)
    app = FastAPI(
        title="corr2d",
        version=VERSION,
        description=API_DESCRIPTION,
        lifespan=_lifespan,
        # Ours is in service/routes/pages.py.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Asking for each request whether anybody listens takes longer than decoding a small one.
        telemetry=None if has_telemetry else TELEMETRY_DISABLED,
    )
    settings, memory = _resolve_memory_settings(settings)
    app.state.settings = settings
    app.state.metrics = Metrics(table, engines=ENGINES, reasons=PROBLEM_NAMES)
    app.state.metrics.queue_limit.set(settings.queue)
    machine = Machine(max(1, threads // settings.workers))
    app.state.admission = Admission(memory, settings.request_timeout_s)
    concurrency, queue_timeout_s = min(COMPUTE_CONCURRENCY, machine.threads), settings.queue_timeout_s
    # Whoever decodes or encodes has a place among those that are computed or wait: the queue of codecs needs no other.
    app.state.codecs = WorkerPool(
        app.state.admission,
        concurrency=concurrency,
        queue=settings.queue + concurrency + 1,
        queue_timeout_s=queue_timeout_s,
    )
    app.state.pool = WorkerPool(
        app.state.admission, concurrency=concurrency, queue=settings.queue, queue_timeout_s=queue_timeout_s
    )
    app.state.admission.queue = app.state.pool
    app.state.compute = Compute(settings, app.state.pool, app.state.codecs, machine)
    app.state.max_body = int(settings.max_body_mb * 1e6)
    app.state.readiness = Readiness()
    app.state.owns_process = False
    # Each outside of those above it.
    app.add_middleware(SecurityHeadersMiddleware)
    if not has_telemetry:
        # Spans are named by the route that FastAPI finds.
        app.add_middleware(FastPathMiddleware, routers=[correlate.router, conv2d.router, train_kernel.router])
    if settings.requires_api_key:
        listed = settings.api_keys.get_secret_value() if settings.api_keys else None
        app.add_middleware(APIKeyMiddleware, keys=KeyRing(listed, settings.api_keys_file))
    if settings.origins:
        app.add_middleware(CrossOriginMiddleware, origins=settings.origins, credentials=settings.cors_credentials)
    app.add_middleware(RequestLogMiddleware, metrics=app.state.metrics, protocol_error_app=respond_to_protocol_error)
    add_error_handlers(app)
    for resource in (health, metrics, info, kernels, train_kernel, conv2d, correlate):
        # Their routes, not include_router: FastAPI looks an included router's routes up anew for every request. And
        # before those of /docs, for they are tried in turn.
        app.router.routes[:0] = resource.router.routes
    app.router.routes += pages.router.routes
    app.mount(DOCS_ASSETS_PATH, pages.DocsAssets())
    requests = correlate.CorrelateRequest, conv2d.Conv2dRequest, train_kernel.TrainKernelRequest
    extend_schema(app, *requests, requires_api_key=settings.requires_api_key)
    return app


def _resolve_memory_settings(settings: Settings) -> tuple[Settings, int]:
    """The settings with those of memory settled, and the bytes that the requests of one worker may take."""
    megabytes = settings.memory_mb
    if megabytes is None:
        megabytes = max(
            REQUEST_MEMORY_FRACTION * usable_memory() / 1e6,
            settings.workers * (settings.max_compute_mb or 0) / COMPUTE_MEMORY_FRACTION,
        )
    worker_megabytes = megabytes / settings.workers
    largest = settings.max_compute_mb or min(DEFAULT_MAX_COMPUTE_MB, COMPUTE_MEMORY_FRACTION * worker_megabytes)
    resolved = {"memory_mb": round(megabytes, 3), "max_compute_mb": round(largest, 3)}
    return settings.model_copy(update=resolved), int(1e6 * worker_megabytes)


def create_worker_app(settings: Settings, table: SharedCounters) -> FastAPI:
    """The service as the only application of a process."""
    limit_malloc_arenas()
    # The event loop waits that long for Python's lock, for each thread that computes in Python.
    sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
    app = create_app(settings, table)
    app.state.owns_process = True
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    torch.set_num_threads(app.state.compute.machine.threads)
    use_one_blas_thread()
    warming = asyncio.create_task(_warm_up_in_background(app))
    yield
    warming.cancel()
    app.state.readiness.mark_unavailable("the service is going down")
    app.state.metrics.ready.set(0)
    pools: tuple[WorkerPool, ...] = (app.state.pool, app.state.codecs)
    for pool in pools:
        pool.close()
    if app.state.owns_process and any(pool.busy for pool in pools):
        # A computation past its deadline cannot be interrupted, and Python would wait for its thread before it ends.
        structlog.get_logger("corr2d").warning("leaving a computation unfinished")
        exit_now(0)


async def _warm_up_in_background(app: FastAPI) -> None:
    log = structlog.get_logger("corr2d")
    try:
        # Beside the pool, and without its deadline: the first computation on a GPU may take its time.
        warming = partial(warm_up_service, app.state.settings.device, app.state.compute.machine)
        device, machine = await anyio.to_thread.run_sync(run_at_low_priority, warming)
    except Exception as error:
        # Whatever it is, it must not go unseen: nobody waits for this task.
        app.state.readiness.mark_unavailable(f"the warm-up failed: {error}")
        log.exception("warm-up failed")
        if app.state.owns_process:
            exit_now(exit_codes.WARM_UP_FAILED)
    else:
        app.state.compute.machine = machine
        if app.state.owns_process:
            # What is loaded by now stays: to look through it for garbage again and again would hold up requests.
            gc.collect()
            gc.freeze()
        app.state.readiness.mark_ready(device)
        app.state.metrics.ready.set(1)
        log.info("ready", device=device, threads=machine.threads)
