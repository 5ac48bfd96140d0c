"""GET /livez and GET /readyz."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from service.openapi import problem_docs, success_docs
from service.readiness import Readiness

router = APIRouter(tags=["operations"])


class LivenessStatus(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class ReadinessStatus(BaseModel):
    """A warm-up computation came out right on this device."""

    status: Literal["ready"] = "ready"
    device: str


@router.get("/livez", summary="Does the process answer?", responses=success_docs())
async def livez() -> LivenessStatus:
    """Always 200 while the process lives; looks at nothing else."""
    return LivenessStatus()


@router.get("/readyz", summary="Can it compute?", responses={**success_docs(), **problem_docs(503)})
async def readyz(request: Request) -> ReadinessStatus:
    """200 once a warm-up computation has come out right on the chosen device, 503 with the reason before."""
    readiness: Readiness = request.app.state.readiness
    return ReadinessStatus(device=readiness.require_device())
