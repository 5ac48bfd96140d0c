"""Sizes of kernels, outputs and padding, computed from plain integers."""

from typing import Literal

Mode = Literal["valid", "same", "full"]
Operation = Literal["correlate", "convolve"]

Pair = tuple[int, int]
"""Rows, columns."""

Sides = tuple[int, int, int, int]
"""Top, bottom, left, right."""


def dilated_size(size: int, dilation: int) -> int:
    """Return the number of pixels that `size` taps span if they are `dilation` pixels apart."""
    return dilation * (size - 1) + 1


def mode_padding(mode: Mode, operation: Operation, kernel_size: Pair) -> Sides:
    """Return the padding of a mode: none for "valid", size - 1 on every side for "full".

    In "same", size - 1 is split between both sides. If it is odd, "correlate" pads one pixel more after the image, as
    torch and TensorFlow do; "convolve" pads one pixel more before it, so that "same" is the centre of "full" as in
    scipy.signal.convolve2d and MATLAB's conv2.
    """
    h, w = kernel_size
    if mode == "valid":
        return 0, 0, 0, 0
    if mode == "full":
        return h - 1, h - 1, w - 1, w - 1
    if operation == "convolve":
        return h // 2, (h - 1) // 2, w // 2, (w - 1) // 2
    return (h - 1) // 2, h // 2, (w - 1) // 2, w // 2


def same_padding(size: Pair, kernel_size: Pair, stride: Pair, dilation: Pair) -> Sides:
    """Return TensorFlow's "same" padding: ceil(size / stride) outputs per axis, an odd padding pixel after the image.

    With stride 1 this is torch's rule. https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    sides: list[int] = []
    for pixels, taps, step, apart in zip(size, kernel_size, stride, dilation, strict=True):
        outputs = -(-pixels // step)
        total = max((outputs - 1) * step + dilated_size(taps, apart) - pixels, 0)
        sides += [total // 2, total - total // 2]
    top, bottom, left, right = sides
    return top, bottom, left, right
