"""What stands outside an image: numpy.pad's semantics on tensors, for a border of any width."""

import torch
from torch import Tensor
from torch.nn import functional

from core.shapes import Boundary, Sides


def pad(images: Tensor, padding: Sides, boundary: Boundary, fill_value: float = 0.0) -> Tensor:
    """The images (..., H, W) with a border of (top, bottom, left, right) pixels around every plane.

    | boundary  | outside `a b c d` | numpy.pad |
    | --------- | ----------------- | --------- |
    | zeros     | 0 0 0             | constant  |
    | constant  | v v v             | constant  |
    | replicate | a a a             | edge      |
    | reflect   | d c b             | reflect   |
    | symmetric | c b a             | symmetric |
    | circular  | b c d             | wrap      |
    """
    top, bottom, left, right = padding
    if not any(padding):
        return images
    if boundary in ("zeros", "constant"):
        return functional.pad(images, (left, right, top, bottom), value=fill_value)
    height, width = images.shape[-2:]
    rows = _source(height, top, bottom, boundary, images.device)
    columns = _source(width, left, right, boundary, images.device)
    return images.index_select(-2, rows).index_select(-1, columns)


def _source(size: int, before: int, after: int, boundary: Boundary, device: torch.device) -> Tensor:
    """For every position of a bordered line, the pixel of the line that it repeats.

    Reflection is periodic: a line read forth and back repeats after 2 * size pixels where its ends are doubled
    (symmetric), after 2 * size - 2 where they are not (reflect); numpy.pad's repeated reflection is the same map.
    """
    position = torch.arange(-before, size + after, device=device)
    if boundary == "replicate" or size == 1:
        return position.clamp(0, size - 1)
    if boundary == "circular":
        return position % size
    doubled_ends = 1 if boundary == "symmetric" else 0
    period = 2 * size - 2 + 2 * doubled_ends
    position = position % period
    return torch.minimum(position, period - doubled_ends - position)
