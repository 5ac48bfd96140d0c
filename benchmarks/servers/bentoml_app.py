"""The same correlation in BentoML, with one worker; BentoML converts nested lists to and from tensors."""

from typing import Annotated

import bentoml
import torch
from bentoml.validators import DType
from torch.nn import functional

Plane = Annotated[torch.Tensor, DType("float32")]


@bentoml.service(workers=1, traffic={"timeout": 600}, logging={"access": {"enabled": False}})
class Correlation:
    """A service with one endpoint."""

    @bentoml.api  # type: ignore[untyped-decorator]  # bentoml is not installed here
    async def correlate(self, input: Plane, kernel: Plane) -> Plane:
        """Compute on the event loop, which is faster than in a thread."""
        return functional.conv2d(input[None, None], kernel[None, None])[0, 0]
