"""GET /kernels: the named kernels."""

from fastapi import APIRouter
from pydantic import BaseModel

from core import KERNELS, named_kernel
from service.openapi import make_link, success_docs

router = APIRouter(tags=["convolution"])


LINKS = {
    "correlate": make_link(
        "/correlate",
        "correlate an image with a named kernel, here the first one",
        parameters={"kernel": "$response.body#/kernels/0/example"},
    ),
}


class NamedKernel(BaseModel):
    """Kernel that a request can give by name."""

    name: str
    signature: str
    description: str
    example: str
    kernel: list[list[float]]


class NamedKernels(BaseModel):
    """All named kernels; `kernel` contains the entries of `example`."""

    kernels: list[NamedKernel]


@router.get("/kernels", operation_id="kernels", summary="The named kernels", responses=success_docs(LINKS))
async def kernels() -> NamedKernels:
    """Return every kernel name for /correlate, with its arguments and the entries of an example."""
    return NamedKernels(
        kernels=[
            NamedKernel(
                name=name,
                signature=family.signature,
                description=family.description,
                example=family.example,
                kernel=named_kernel(family.example).tolist(),
            )
            for name, family in KERNELS.items()
        ]
    )
