"""GET /info: what is running, on what, within which limits."""

from typing import Any

import torch
from fastapi import APIRouter, Request
from pydantic import BaseModel

from core import ENGINES, describe_devices
from service.openapi import traced
from service.version import VERSION

router = APIRouter(tags=["operations"])


class Device(BaseModel):
    """A device that requests may name; model and memory where torch can tell."""

    device: str
    model: str | None
    memory_bytes: int | None


class Info(BaseModel):
    """Versions, devices, engines, threads for one computation, and every setting in force."""

    version: str
    torch: str
    devices: list[Device]
    engines: dict[str, str]
    threads: int
    settings: dict[str, Any]


@router.get("/info", summary="Version, devices, engines and every limit in force", responses=traced())
async def info(request: Request) -> Info:
    """`engines` maps each engine to the `method` it works by."""
    return Info(
        version=VERSION,
        torch=torch.__version__,
        devices=[Device.model_validate(device) for device in describe_devices()],
        engines={name: engine.METHOD for name, engine in ENGINES.items()},
        threads=torch.get_num_threads(),
        settings=request.app.state.settings.model_dump(),
    )
