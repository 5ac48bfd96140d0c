"""GET /livez and GET /readyz."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from service.app_state import get_app_state
from service.openapi import problem_docs, success_docs

router = APIRouter(tags=["operations"])


class LivenessStatus(BaseModel):
    """Response of a running process."""

    status: Literal["alive"] = "alive"


class ReadinessStatus(BaseModel):
    """Device on which the warm-up computation succeeded."""

    status: Literal["ready"] = "ready"
    device: str


@router.get("/livez", operation_id="livez", summary="Liveness: is the process running?", responses=success_docs())
async def livez() -> LivenessStatus:
    """Return 200 while the process runs, without further checks."""
    return LivenessStatus()


@router.get(
    "/readyz",
    operation_id="readyz",
    summary="Readiness: can the service compute?",
    responses={**success_docs(), **problem_docs(503)},
)
async def readyz(request: Request) -> ReadinessStatus:
    """Return 200 after a successful warm-up computation on the configured device, otherwise 503 with the reason."""
    readiness = get_app_state(request.app).readiness
    return ReadinessStatus(device=readiness.require_device())
