"""GET /metrics: how the service fares, for Prometheus."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.metrics.prometheus import METRICS_MEDIA_TYPES, render_metrics
from service.negotiation import collect_headers
from service.version import VERSION

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    summary="How the service fares, for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Every number that there is, of all workers together",
            "content": {media_type: {"schema": {"type": "string"}} for media_type in METRICS_MEDIA_TYPES},
        }
    },
)
async def metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics where Accept asks for it."""
    text, media_type = render_metrics(request.app.state.metrics, VERSION, collect_headers(request.scope).get(b"accept"))
    return Response(text, headers={"Content-Type": media_type})
