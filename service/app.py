"""ASGI application, created from the settings."""

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

from core import ENGINES, Machine, use_one_blas_thread
from service import exit_codes
from service.app_state import AppState, get_app_state, set_app_state
from service.configuration.api_keys import KeyRing
from service.configuration.computed_settings import compute_defaults, find_limit_settings
from service.configuration.settings import Settings
from service.log import exit_now
from service.metrics.counters import Metrics, SharedCounters
from service.middleware.auth import APIKeyMiddleware
from service.middleware.cors import CrossOriginMiddleware
from service.middleware.fast_path import FastPathMiddleware
from service.middleware.forwarded import ForwardedMiddleware
from service.middleware.head import HeadMiddleware
from service.middleware.request_log import RequestLogMiddleware
from service.middleware.security_headers import SecurityHeadersMiddleware
from service.openapi import extend_schema
from service.problems import PROBLEM_NAMES, add_error_handlers, respond_to_protocol_error
from service.readiness import Readiness, warm_up_service
from service.routes import conv2d, correlate, guide, health, info, kernels, metrics, pages, train_kernel
from service.routes.raw_route import RawRoute
from service.scheduling.admission import Admission
from service.scheduling.compute import Compute
from service.scheduling.pool import WorkerPool
from service.scheduling.threads import run_at_low_priority
from service.server.malloc import trim_regularly
from service.version import VERSION

API_DESCRIPTION = """\
Convolution as a service: send arrays, receive their 2-D cross-correlation, a Conv2d layer's output, or a kernel
learned from examples. Errors are `application/problem+json`; the detail gives the received value, the allowed values
and a fix.

[Try it on the page](./) · [Guide](guide)
"""

COMPUTE_CONCURRENCY = 2
"""Maximum number of concurrent long computations, if there are as many threads; each uses all threads. One short
computation may run in addition. The pool of codec jobs, which take one thread each, has the same limit."""

GIL_SWITCH_INTERVAL_S = 5e-4

TELEMETRY_DISABLED: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


def create_app(settings: Settings, table: SharedCounters | None = None, keys: KeyRing | None = None) -> FastAPI:
    """Return the application with these settings.

    Without `table`, its metrics are counted in a table of its own; without `keys`, the API keys are read. Call it once
    per process: it sets the number of torch threads, which is global.
    """
    has_telemetry = any(name.startswith("OTEL_") for name in os.environ)
    app = FastAPI(
        title="corr2d",
        version=VERSION,
        description=API_DESCRIPTION,
        lifespan=_lifespan,
        # Served by service/routes/pages.py.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Checking for a telemetry exporter takes longer, per request, than decoding a small body.
        telemetry=None if has_telemetry else TELEMETRY_DISABLED,
    )
    state = _create_state(settings, table)
    settings = state.settings
    set_app_state(app, state)
    # Each middleware wraps those added before it.
    app.add_middleware(HeadMiddleware)
    if not has_telemetry:
        # Not with telemetry: it names spans by the route that FastAPI finds.
        routes = (route for resource in (correlate, conv2d, train_kernel) for route in resource.router.routes)
        endpoints = {route.path: route.endpoint for route in routes if isinstance(route, RawRoute)}
        app.add_middleware(FastPathMiddleware, endpoints=endpoints)
    app.add_middleware(SecurityHeadersMiddleware)
    keys = keys or settings.read_api_keys()
    if keys is not None:
        app.add_middleware(APIKeyMiddleware, keys=keys)
    if settings.origins:
        app.add_middleware(
            CrossOriginMiddleware,
            origins=settings.origins,
            headers=settings.allowed_headers,
            credentials=settings.cors_credentials,
        )
    app.add_middleware(
        RequestLogMiddleware,
        metrics=state.metrics,
        protocol_error_app=respond_to_protocol_error,
        log_probes=settings.log_probes,
    )
    if settings.root_path is not None or settings.trusted_proxies is not None:
        app.add_middleware(ForwardedMiddleware, options=settings.proxy_options)
    add_error_handlers(app)
    for resource in (health, metrics, info, kernels, train_kernel, conv2d, correlate):
        # The routes themselves, not include_router: FastAPI resolves the routes of an included router at every
        # request. Placed before the routes of /docs, because routes are tried in order.
        app.router.routes[:0] = resource.router.routes
    app.router.routes += [*pages.router.routes, *guide.router.routes]
    requests = correlate.CorrelateRequest, conv2d.Conv2dRequest, train_kernel.TrainKernelRequest
    extend_schema(app, *requests, requires_api_key=settings.requires_api_key)
    return app


def _create_state(given: Settings, table: SharedCounters | None) -> AppState:
    settings = compute_defaults(given)
    assert settings.threads is not None  # noqa: S101 - they are computed
    assert settings.memory_mb is not None  # noqa: S101
    metrics = Metrics(table, engines=ENGINES, reasons=PROBLEM_NAMES)
    metrics.queue_limit.set(settings.queue)
    machine = Machine(max(1, settings.threads // settings.workers))
    admission = Admission(int(1e6 * settings.memory_mb / settings.workers), settings.request_timeout_s)
    concurrency, queue_timeout_s = min(COMPUTE_CONCURRENCY, machine.threads), settings.queue_timeout_s
    # Every codec job belongs to a request that holds a slot of the compute pool, so this queue is never full.
    codecs = WorkerPool(
        admission,
        concurrency=concurrency,
        queue=settings.queue + concurrency + 1,
        queue_timeout_s=queue_timeout_s,
    )
    pool = WorkerPool(admission, concurrency=concurrency, queue=settings.queue, queue_timeout_s=queue_timeout_s)
    admission.queue = pool
    return AppState(
        settings=settings,
        limit_settings=find_limit_settings(given, settings),
        metrics=metrics,
        admission=admission,
        pool=pool,
        codecs=codecs,
        compute=Compute(settings, pool, codecs, machine),
        readiness=Readiness(),
    )


def create_worker_app(
    settings: Settings,
    table: SharedCounters | None = None,
    keys: KeyRing | None = None,
    *,
    starts_ready: bool = False,
) -> FastAPI:
    """Return the application for a process of its own, and configure the interpreter for it.

    starts_ready: startup awaits the warm-up, and fails if it fails, for servers that have no other health check.
    """
    # The event loop waits this long for the GIL, once for each thread that runs Python code.
    sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
    app = create_app(settings, table, keys)
    state = get_app_state(app)
    state.owns_process, state.starts_ready = True, starts_ready
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state = get_app_state(app)
    torch.set_num_threads(state.compute.machine.threads)
    use_one_blas_thread()
    warming = asyncio.create_task(_warm_up_in_background(state))
    if state.starts_ready or state.metrics.table.ready_workers():
        # If other workers serve, this one accepts connections once it is ready, so that no health check fails.
        await warming
    if state.starts_ready:
        state.readiness.require_device()
    tasks = [warming]
    if state.owns_process:
        tasks.append(asyncio.create_task(trim_regularly()))
    yield
    for task in tasks:
        task.cancel()
    state.readiness.mark_unavailable("the service is shutting down")
    state.metrics.ready.set(0)
    pools = (state.pool, state.codecs)
    for pool in pools:
        pool.close()
    if state.owns_process and any(pool.busy for pool in pools):
        # A computation past its deadline cannot be interrupted, and Python waits for its threads at exit.
        structlog.get_logger("corr2d").warning("exiting with an unfinished computation")
        exit_now(0)


async def _warm_up_in_background(state: AppState) -> None:
    log = structlog.get_logger("corr2d")
    try:
        # Outside the pool and its deadline: the first computation on a GPU may be slow.
        warming = partial(warm_up_service, state.settings.device, state.compute.machine)
        device, machine = await anyio.to_thread.run_sync(run_at_low_priority, warming)
    except Exception as error:
        # Every exception is reported here: no code awaits this task.
        state.readiness.mark_unavailable(f"the warm-up failed: {error}")
        log.exception("warm-up failed")
        if state.owns_process and not state.starts_ready:
            exit_now(exit_codes.WARM_UP_FAILED)
    else:
        state.compute.machine = machine
        if state.owns_process:
            # Loaded modules stay alive: excluding them keeps garbage collections, which delay requests, short.
            gc.collect()
            gc.freeze()
        state.readiness.mark_ready(device)
        state.metrics.ready.set(1)
        log.info("ready", device=device, threads=machine.threads)
