"""GET /kernels: the named kernels."""

from fastapi import APIRouter
from pydantic import BaseModel

from core import KERNELS, named_kernel
from service.openapi import make_link, success_docs

router = APIRouter(tags=["convolution"])


LINKS = {
    "correlate": make_link(
        "/correlate",
        "a named kernel, here the first of them, laid on an image",
        parameters={"kernel": "$response.body#/kernels/0/example"},
    ),
}


class NamedKernel(BaseModel):
    """A kernel that a request may name instead of sending it."""

    name: str
    signature: str
    description: str
    example: str
    kernel: list[list[float]]


class NamedKernels(BaseModel):
    """All of them; `kernel` holds the numbers of `example`."""

    kernels: list[NamedKernel]


@router.get("/kernels", summary="The named kernels", responses=success_docs(LINKS))
async def kernels() -> NamedKernels:
    """Every name that `kernel` of /correlate takes, with its arguments and the numbers of an example."""
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
