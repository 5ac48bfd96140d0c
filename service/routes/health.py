"""GET /livez and GET /readyz."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from service.openapi import problems, traced
from service.readiness import Readiness

router = APIRouter(tags=["operations"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """A warm-up computation came out right on this device."""

    status: Literal["ready"] = "ready"
    device: str


@router.get("/livez", summary="Does the process answer?", responses=traced())
async def livez() -> Alive:
    """Always 200 while the process lives; looks at nothing else."""
    return Alive()


@router.get("/readyz", summary="Can it compute?", responses={**traced(), **problems(503)})
async def readyz(request: Request) -> Ready:
    """200 once a warm-up computation has come out right on the chosen device, 503 with the reason before."""
    readiness: Readiness = request.app.state.readiness
    return Ready(device=readiness.require())
