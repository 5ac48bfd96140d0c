"""The same correlation in BentoML: one worker, its own tensors from and to nested lists."""

from typing import Annotated

import bentoml
import torch
from bentoml.validators import DType
from torch.nn import functional

Plane = Annotated[torch.Tensor, DType("float32")]


@bentoml.service(workers=1, traffic={"timeout": 600}, logging={"access": {"enabled": False}})
class Correlation:
    """One endpoint."""

    @bentoml.api  # type: ignore[untyped-decorator]  # bentoml is not installed here
    async def correlate(self, input: Plane, kernel: Plane) -> Plane:
        """On the event loop: a thread costs more than it gains."""
        return functional.conv2d(input[None, None], kernel[None, None])[0, 0]
