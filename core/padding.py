"""Padding of images: numpy.pad's semantics on tensors, for borders of any width."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.problem import Boundary
from core.shapes import Pair, Sides


def pad(images: Tensor, padding: Sides, boundary: Boundary, fill_value: float = 0.0) -> Tensor:
    """Return the images (..., H, W) with a border of (top, bottom, left, right) pixels around every plane.

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
    height, width = images.shape[-2:]
    return extract_window(images, (-top, height + bottom), (-left, width + right), boundary, fill_value)


def extract_window(images: Tensor, rows: Pair, columns: Pair, boundary: Boundary, fill_value: float = 0.0) -> Tensor:
    """Return a window of the images; pixels outside them are filled as by `pad`.

    `rows` and `columns` are half-open ranges in coordinates of the images; they may extend beyond them.
    """
    height, width = images.shape[-2:]
    if rows[0] >= 0 and rows[1] <= height and columns[0] >= 0 and columns[1] <= width:
        return images[..., slice(*rows), slice(*columns)]
    if boundary not in ("zeros", "constant"):
        if rows != (0, height):
            images = images.index_select(-2, _source_indices(height, rows, boundary, images.device))
        if columns != (0, width):
            images = images.index_select(-1, _source_indices(width, columns, boundary, images.device))
        return images
    top, bottom = (min(max(0, row), height) for row in rows)
    left, right = (min(max(0, column), width) for column in columns)
    border = left - columns[0], columns[1] - right, top - rows[0], rows[1] - bottom
    inside = images[..., top:bottom, left:right]
    if not any(border):
        return inside
    if images.device.type != "cpu" or images.requires_grad:
        return functional.pad(inside, border, value=fill_value)
    # torch would copy a large image with several threads, which wait for each other if other programs use the cores.
    window = np.empty((*images.shape[:-2], rows[1] - rows[0], columns[1] - columns[0]), inside.numpy().dtype)
    first_row, first_column = border[2], border[0]
    last_row, last_column = first_row + bottom - top, first_column + right - left
    window[..., :first_row, :] = window[..., last_row:, :] = fill_value
    window[..., first_row:last_row, :first_column] = window[..., first_row:last_row, last_column:] = fill_value
    window[..., first_row:last_row, first_column:last_column] = inside.numpy()
    return torch.from_numpy(window)


def _source_indices(size: int, positions: Pair, boundary: Boundary, device: torch.device) -> Tensor:
    """Return, for every position inside or outside a line of pixels, the index of the pixel that it repeats.

    Reflection is periodic: the period is 2 * size pixels if the end pixels are doubled (symmetric), and 2 * size - 2 if
    they are not (reflect). numpy.pad's repeated reflection is the same map.
    """
    position = torch.arange(*positions, device=device)
    if boundary == "replicate" or size == 1:
        return position.clamp(0, size - 1)
    if boundary == "circular":
        return position % size
    doubled_ends = 1 if boundary == "symmetric" else 0
    period = 2 * size - 2 + 2 * doubled_ends
    position = position % period
    return torch.minimum(position, period - doubled_ends - position)
