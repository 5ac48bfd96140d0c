"""GET /info: what is running, on what, within which limits."""

from typing import Any

import torch
from fastapi import APIRouter, Request
from pydantic import BaseModel

from core import ENGINES, describe_devices
from service.openapi import success_docs
from service.version import VERSION

router = APIRouter(tags=["operations"])


class DeviceInfo(BaseModel):
    """A device that requests may name; model and memory where torch can tell."""

    device: str
    model: str | None
    memory_bytes: int | None


class ServiceInfo(BaseModel):
    """Versions, devices, engines, threads for one computation, and every setting in force."""

    version: str
    torch: str
    devices: list[DeviceInfo]
    engines: dict[str, str]
    threads: int
    settings: dict[str, Any]


@router.get("/info", summary="Version, devices, engines and every limit in force", responses=success_docs())
async def info(request: Request) -> ServiceInfo:
    """`engines` maps each engine to the `method` it works by."""
    return ServiceInfo(
        version=VERSION,
        torch=torch.__version__,
        devices=[DeviceInfo.model_validate(device) for device in describe_devices()],
        engines={name: engine.METHOD for name, engine in ENGINES.items()},
        threads=torch.get_num_threads(),
        settings=request.app.state.settings.model_dump(),
    )
