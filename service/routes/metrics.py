"""GET /metrics: metrics for Prometheus."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.app_state import get_app_state
from service.metrics.prometheus import METRICS_MEDIA_TYPES, render_metrics
from service.negotiation import collect_headers
from service.version import VERSION

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "All metrics, summed over the workers",
            "content": {media_type: {"schema": {"type": "string"}} for media_type in METRICS_MEDIA_TYPES},
        }
    },
)
async def metrics(request: Request) -> Response:
    """Return the metrics in the Prometheus text format, or as OpenMetrics if Accept prefers it."""
    accept = collect_headers(request.scope).get(b"accept")
    state = get_app_state(request.app)
    # The server of `corr2d serve` updates the gauges of all workers; other servers do not.
    state.update_gauges()
    # Rendering takes milliseconds, and many clients may ask at once.
    async with state.metrics_lock:
        text, media_type = await asyncio.to_thread(
            render_metrics, state.metrics, VERSION, accept, replica=state.settings.replica
        )
    return Response(text, headers={"Content-Type": media_type})
