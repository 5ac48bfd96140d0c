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

from core import ENGINES, Machine, usable_cores, usable_memory
from service import exit_codes
from service.admission import SHARE_OF_A_COMPUTATION
from service.allocator import keep_little
from service.compute import Compute
from service.doors import ASSETS, BrowserHeaders, CrossOrigin, Locked
from service.keys import KeyRing
from service.log import exit_now
from service.metrics import Metrics, Table
from service.openapi import describe
from service.pool import ComputePool
from service.problems import REASONS, add_error_handlers, answer_given_up
from service.readiness import Readiness, warm_up
from service.request_log import RequestLog
from service.routes import conv2d, correlate, health, info, kernels, metrics, pages, train_kernel
from service.routes.array_route import ShortWay
from service.settings import Settings
from service.threads import standing_back
from service.version import VERSION

DESCRIPTION = """\
Convolution as a service: post arrays, get back their 2-D cross-correlation, a Conv2d layer's output, or a kernel
learned from examples. Errors are `application/problem+json` and say what came, what is allowed and how to change it.
"""

LANES = 2
"""Computations at a time, each with all threads, where there are as many; beside them one more that is short."""

SWITCH_S = 5e-4

SHARE_OF_MEMORY = 0.6
"""Of what the machine or the container has: for requests. The rest is for Python, torch and compiled code."""

LARGEST_COMPUTATION_MB = 2000

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


def create_app(settings: Settings, table: Table | None = None) -> FastAPI:
    """The service with these settings, counting in that table, or in one of its own.

    Call it once a process: the threads that torch may use belong to the process.
    """
    threads = settings.threads or usable_cores()
    traced = any(name.startswith("OTEL_") for name in os.environ)
    app = FastAPI(
        title="corr2d",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=_lifespan,
        # Ours is in service/routes/pages.py.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Asking for each request whether anybody listens takes longer than decoding a small one.
        telemetry=None if traced else NO_TELEMETRY,
    )
    settings, memory = _within_memory(settings)
    app.state.settings = settings
    app.state.metrics = Metrics(table, engines=ENGINES, reasons=REASONS)
    app.state.metrics.queue_limit.set(settings.queue)
    machine = Machine(max(1, threads // settings.workers))
    app.state.pool = ComputePool(
        lanes=min(LANES, machine.threads),
        queue=settings.queue,
        memory=memory,
        queue_timeout_s=settings.queue_timeout_s,
        timeout_s=settings.request_timeout_s,
    )
    app.state.codec_threads = anyio.CapacityLimiter(machine.threads)
    app.state.compute = Compute(settings, app.state.pool, machine, app.state.codec_threads)
    app.state.max_body = int(settings.max_body_mb * 1e6)
    app.state.readiness = Readiness()
    app.state.process_is_ours = False
    # Each outside of those above it.
    app.add_middleware(BrowserHeaders)
    if not traced:
        # Spans are named by the route that FastAPI finds.
        app.add_middleware(ShortWay, routers=[correlate.router, conv2d.router, train_kernel.router])
    if settings.locked:
        listed = settings.api_keys.get_secret_value() if settings.api_keys else None
        app.add_middleware(Locked, keys=KeyRing(listed, settings.api_keys_file))
    if settings.origins:
        app.add_middleware(CrossOrigin, origins=settings.origins, credentials=settings.cors_credentials)
    app.add_middleware(RequestLog, metrics=app.state.metrics, given_up=answer_given_up)
    add_error_handlers(app)
    for resource in (health, metrics, info, kernels, train_kernel, conv2d, correlate):
        # Their routes, not include_router: FastAPI looks an included router's routes up anew for every request. And
        # before those of /docs, for they are tried in turn.
        app.router.routes[:0] = resource.router.routes
    app.router.routes += pages.router.routes
    app.mount(ASSETS, pages.Assets())
    requests = correlate.CorrelateRequest, conv2d.Conv2dRequest, train_kernel.TrainKernelRequest
    describe(app, *requests, locked=settings.locked)
    return app


def _within_memory(settings: Settings) -> tuple[Settings, int]:
    """The settings with those of memory settled, and the bytes that the requests of one worker may take."""
    megabytes = settings.memory_mb
    if megabytes is None:
        megabytes = max(
            SHARE_OF_MEMORY * usable_memory() / 1e6,
            settings.workers * (settings.max_compute_mb or 0) / SHARE_OF_A_COMPUTATION,
        )
    each = megabytes / settings.workers
    largest = settings.max_compute_mb or min(LARGEST_COMPUTATION_MB, SHARE_OF_A_COMPUTATION * each)
    settled = {"memory_mb": round(megabytes, 3), "max_compute_mb": round(largest, 3)}
    return settings.model_copy(update=settled), int(1e6 * each)


def create_worker_app(settings: Settings, table: Table) -> FastAPI:
    """The service as the only application of a process."""
    keep_little()
    # The event loop waits that long for Python's lock, for each thread that computes in Python.
    sys.setswitchinterval(SWITCH_S)
    app = create_app(settings, table)
    app.state.process_is_ours = True
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    torch.set_num_threads(app.state.compute.machine.threads)
    warming = asyncio.create_task(_become_ready(app))
    yield
    warming.cancel()
    app.state.readiness.failed("the service is going down")
    app.state.metrics.ready.set(0)
    app.state.pool.close()
    if app.state.process_is_ours and app.state.pool.busy:
        # A computation past its deadline cannot be interrupted, and Python would wait for its thread before it ends.
        structlog.get_logger("corr2d").warning("leaving a computation unfinished")
        exit_now(0)


async def _become_ready(app: FastAPI) -> None:
    log = structlog.get_logger("corr2d")
    try:
        # Beside the pool, and without its deadline: the first computation on a GPU may take its time.
        warming = partial(warm_up, app.state.settings.device, app.state.compute.machine)
        device, machine = await anyio.to_thread.run_sync(standing_back, warming)
    except Exception as error:
        # Whatever it is, it must not go unseen: nobody waits for this task.
        app.state.readiness.failed(f"the warm-up failed: {error}")
        log.exception("warm-up failed")
        if app.state.process_is_ours:
            exit_now(exit_codes.BROKEN)
    else:
        app.state.compute.machine = machine
        if app.state.process_is_ours:
            # What is loaded by now stays: to look through it for garbage again and again would hold up requests.
            gc.collect()
            gc.freeze()
        app.state.readiness.ready(device)
        app.state.metrics.ready.set(1)
        log.info("ready", device=device, threads=machine.threads)
