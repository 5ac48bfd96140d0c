"""Application for Ray Serve: `serve run service.ray:app`, in a wheel `serve run corr2d.service.ray:app`.

The replicas run the application of service/asgi.py. docs/deployment.md describes the settings and the limits.
"""

import os

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.configuration.settings import Settings, load_settings
from service.middleware.ray_proxy import CALLBACK_VARIABLE, RETRY_AFTER_S

NAME = "corr2d"
"""Name of the deployment, by which a configuration file of Ray Serve refers to it."""

UNQUEUED_REQUESTS = 32
"""Maximum number of requests that Ray sends to a replica at a time, in addition to CORR2D_QUEUE.

This is more than a replica admits, so that the replica rejects the excess: neither the deadline nor the predicted wait
applies to requests that wait in Ray's router.
"""

TARGET_ONGOING_REQUESTS = 2
"""Number of requests per replica at which the autoscaler aims: as many as a replica computes at once."""

SHUTDOWN_MARGIN_S = 5
"""Seconds for a replica to stop, in addition to the deadline of its requests."""


class Arguments(BaseModel):
    """Arguments of `serve run`, as in `serve run service.ray:app min_replicas=2`, or `args` of a configuration file."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1, description="default: min_replicas, without autoscaling")
    num_cpus: float = Field(1, gt=0, description="CPU cores that Ray reserves for each replica")
    num_gpus: float = Field(0, ge=0, description="GPUs for each replica; several share a GPU with a fraction")


def app(arguments: Arguments) -> serve.Application:
    """Return the application for `serve run` and for configuration files.

    Its limits on requests follow from the settings in the environment. Raises SettingsError.
    """
    # `serve run` starts the cluster after this call, and the proxies of the cluster inherit the variable.
    os.environ.setdefault(CALLBACK_VARIABLE, f"{__package__}.middleware.ray_proxy.create_middlewares")
    settings = load_settings()
    max_replicas = max(arguments.min_replicas, arguments.max_replicas or 1)
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=settings.queue + UNQUEUED_REQUESTS,
        # Limit of each proxy. With 0, Ray would reject requests while a replica starts.
        max_queued_requests=max(1, settings.queue),
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=max_replicas,
            target_ongoing_requests=TARGET_ONGOING_REQUESTS,
        ),
        # The service logs each request.
        logging_config=LoggingConfig(enable_access_log=False),
        # Ray does not send further requests to a replica that stops.
        graceful_shutdown_timeout_s=settings.request_timeout_s + SHUTDOWN_MARGIN_S,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
    )
    return deployment(Replica).bind()


def create_app() -> FastAPI:
    """Return the application of a replica, in its process. Raises SettingsError."""
    from service.asgi import create_app as create_asgi_app

    application = create_asgi_app(settings_of_replica(load_settings()))
    application.add_middleware(DisconnectMiddleware)
    return application


class DisconnectMiddleware:
    """Middleware that receives `http.disconnect` instead of Ray's exceptions.

    Ray raises them if the request is cancelled, or its proxy ends, while messages of the client are fetched. Requests
    would fail with internal errors, although their clients have disconnected.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except (TaskCancelledError, RayActorError):
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_disconnect, send)


@serve.ingress(create_app)
class Replica:
    """Replica of the service, in a process of its own. Ray sends it requests once its warm-up has succeeded."""

    app: FastAPI
    """The application, which the class that `serve.ingress` creates provides."""

    def check_health(self) -> None:
        """Raise RuntimeError, with the reason, if the replica cannot compute: Ray replaces it."""
        from service.app_state import get_app_state

        readiness = get_app_state(self.app).readiness
        if readiness.device is None:
            raise RuntimeError(readiness.reason)


def settings_of_replica(settings: Settings) -> Settings:
    """Return the settings with the name of this replica, and with its threads and memory if these are not set.

    Its threads are the cores that Ray reserves for it. Its memory is what Ray reserves, otherwise the part of the
    machine's memory that corresponds to its cores.
    """
    from core import usable_cores, usable_memory
    from service.configuration.computed_settings import REQUEST_MEMORY_FRACTION
    from service.scheduling.admission import COMPUTE_MEMORY_FRACTION

    resources = ray.get_runtime_context().get_assigned_resources()
    cores = resources.get("CPU", 1.0)
    reserved = resources.get("memory") or usable_memory() * min(1.0, cores / usable_cores())
    memory_mb = max(REQUEST_MEMORY_FRACTION * reserved / 1e6, (settings.max_compute_mb or 0) / COMPUTE_MEMORY_FRACTION)
    return settings.model_copy(
        update={
            "replica": serve.get_replica_context().replica_tag,
            "workers": 1,
            "threads": settings.threads or max(1, int(cores)),
            "memory_mb": settings.memory_mb or memory_mb,
        }
    )
