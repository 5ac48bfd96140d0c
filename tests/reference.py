"""Reference implementations: direct loops over the definitions, which the tests compare core with.

This module imports nothing from core.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUMPY_PAD_MODES = {
    "zeros": "constant",
    "constant": "constant",
    "replicate": "edge",
    "reflect": "reflect",
    "symmetric": "symmetric",
    "circular": "wrap",
}


def correlate_valid(image: NDArray[Any], kernel: NDArray[Any]) -> Floats:
    """Return Y[i, j] = sum over a, b of X[i + a, j + b] K[a, b] for one plane, in the dtype of the arrays."""
    h, w = kernel.shape
    output = np.zeros((image.shape[0] - h + 1, image.shape[1] - w + 1), np.result_type(image, kernel))
    for i in range(output.shape[0]):
        for j in range(output.shape[1]):
            for a in range(h):
                for b in range(w):
                    output[i, j] += image[i + a, j + b] * kernel[a, b]
    return output


def correlate_valid_by_windows(image: NDArray[Any], kernel: NDArray[Any]) -> Floats:
    """Return the same sums as `correlate_valid`, vectorized for larger images."""
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
    sums: Floats = np.einsum("ijab,ab->ij", windows, kernel)
    return sums


def compute_border(mode: str, size: int) -> tuple[int, int]:
    """Return the number of padding pixels before and after, along one axis."""
    return {"valid": (0, 0), "same": ((size - 1) // 2, size // 2), "full": (size - 1, size - 1)}[mode]


def pad(image: NDArray[Any], rows: tuple[int, int], columns: tuple[int, int], boundary: str, fill: float) -> Floats:
    """Pad one plane with numpy.pad."""
    if boundary == "constant":
        return np.pad(image, (rows, columns), "constant", constant_values=fill)
    padded: Floats = np.pad(image, (rows, columns), NUMPY_PAD_MODES[boundary])  # type: ignore[call-overload]
    return padded


def correlate(
    image: NDArray[Any], kernel: NDArray[Any], mode: str = "valid", boundary: str = "zeros", fill: float = 0.0
) -> Floats:
    """Correlate one plane: numpy.pad, then `correlate_valid`."""
    return correlate_valid(pad_for_mode(image, kernel.shape, mode, boundary, fill), kernel)


def pad_for_mode(
    image: NDArray[Any], kernel_size: tuple[int, ...], mode: str, boundary: str, fill: float = 0.0
) -> Floats:
    """Pad one plane for a mode."""
    rows, columns = (compute_border(mode, size) for size in kernel_size)
    return pad(image, rows, columns, boundary, fill)


def conv2d(
    images: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    boundary: str,
) -> Floats:
    """Return Conv2d of images (N, C, H, W) with weight (O, C/groups, h, w), by direct loops."""
    top, bottom, left, right = padding
    count, channels = images.shape[:2]
    filters, depth, h, w = weight.shape
    padded = np.stack(
        [
            np.stack([pad(images[n, c], (top, bottom), (left, right), boundary, 0.0) for c in range(channels)])
            for n in range(count)
        ]
    )
    rows = (padded.shape[2] - dilation[0] * (h - 1) - 1) // stride[0] + 1
    columns = (padded.shape[3] - dilation[1] * (w - 1) - 1) // stride[1] + 1
    output = np.zeros((count, filters, rows, columns))
    for n, o, i, j in np.ndindex(output.shape):
        first_channel = o // (filters // groups) * depth
        output[n, o, i, j] = bias[o]
        for c, a, b in np.ndindex(depth, h, w):
            row, column = i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]
            output[n, o, i, j] += padded[n, first_channel + c, row, column] * weight[o, c, a, b]
    return output


def run_d2l_loop(
    images: torch.Tensor, targets: torch.Tensor, kernel: torch.Tensor, learning_rate: float, steps: int
) -> tuple[list[float], torch.Tensor]:
    """Run the training loop of the d2l example: Conv2d without bias, sum of squares, gradient descent."""
    layer = torch.nn.Conv2d(1, 1, (kernel.shape[-2], kernel.shape[-1]), bias=False, dtype=kernel.dtype)
    layer.weight.data.copy_(kernel)
    history = []
    for _ in range(steps):
        loss = ((layer(images) - targets) ** 2).sum()
        layer.zero_grad()
        loss.backward()
        assert layer.weight.grad is not None
        layer.weight.data -= learning_rate * layer.weight.grad
        history.append(loss.item())
    return history, layer.weight.data
