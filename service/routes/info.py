"""GET /info: versions, devices, engines and settings."""

from typing import Any

import torch
from fastapi import APIRouter, Request
from pydantic import BaseModel

from core import ENGINES, describe_devices
from service.app_state import get_app_state
from service.openapi import success_docs
from service.version import VERSION

router = APIRouter(tags=["operations"])


class DeviceInfo(BaseModel):
    """Device that requests can select; model and memory are null if torch does not report them."""

    device: str
    model: str | None
    memory_bytes: int | None


class ServiceInfo(BaseModel):
    """Versions, devices, engines, threads per computation, and all settings in force."""

    version: str
    torch: str
    devices: list[DeviceInfo]
    engines: dict[str, str]
    threads: int
    settings: dict[str, Any]


@router.get(
    "/info", operation_id="info", summary="Version, devices, engines and every limit in force", responses=success_docs()
)
async def info(request: Request) -> ServiceInfo:
    """Return versions, devices, engines and settings; `engines` maps each engine to its `method`."""
    state = get_app_state(request.app)
    return ServiceInfo(
        version=VERSION,
        torch=torch.__version__,
        devices=[DeviceInfo.model_validate(device) for device in describe_devices()],
        engines={name: engine.METHOD for name, engine in ENGINES.items()},
        threads=state.compute.machine.threads,
        settings=state.settings.model_dump(),
    )
