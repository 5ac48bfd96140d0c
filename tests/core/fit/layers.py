"""Hypothesis strategies for layers and training examples; independent of core."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from tests.reference import Floats, pad


@dataclass(frozen=True)
class Layer:
    """Geometry of a convolution to fit; `padding` is (top, bottom, left, right)."""

    kernel_size: tuple[int, int]
    channels: int = 1
    filters: int = 1
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    bias: bool = False

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        return self.filters, self.channels // self.groups, *self.kernel_size

    @property
    def options(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias")
        return {name: getattr(self, name) for name in names}

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        padded = size[0] + top + bottom, size[1] + left + right
        rows, columns = (
            (padded[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1) // self.stride[axis] + 1
            for axis in (0, 1)
        )
        return rows, columns

    def windows(self, images: Floats, group: int = 0) -> Floats:
        """Return the window of every output of a group as a row, (N oh ow, C/groups h w)."""
        top, bottom, left, right = self.padding
        (rows, columns), (down, across) = self.output_size((images.shape[2], images.shape[3])), self.stride
        depth = self.channels // self.groups
        taps = []
        for channel in range(group * depth, (group + 1) * depth):
            planes = np.stack(
                [pad(image[channel], (top, bottom), (left, right), self.padding_mode, 0) for image in images]
            )
            for a in range(self.kernel_size[0]):
                for b in range(self.kernel_size[1]):
                    row, column = a * self.dilation[0], b * self.dilation[1]
                    seen = planes[:, row : row + (rows - 1) * down + 1 : down]
                    taps.append(seen[:, :, column : column + (columns - 1) * across + 1 : across].ravel())
        return np.stack(taps, 1)

    def output(self, images: Floats, kernel: Floats, bias: Floats | None = None) -> Floats:
        """Return the products of windows and filters, (N, O, oh, ow)."""
        per_group = self.filters // self.groups
        planes = [
            self.windows(images, filter_ // per_group) @ kernel[filter_].ravel()
            + (0 if bias is None else bias[filter_])
            for filter_ in range(self.filters)
        ]
        size = self.output_size((images.shape[2], images.shape[3]))
        return np.stack(planes, 1).reshape(len(images), *size, self.filters).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class FitCase:
    """A layer, and pairs of images (N, C, H, W), targets (N, O, oh, ow) and weights of the targets' shape or None."""

    layer: Layer
    pairs: list[tuple[Floats, Floats, Floats | None]]

    @property
    def weight(self) -> float:
        """Return the sum of the weights, the divisor of mean losses."""
        return float(sum(y.size if w is None else w.sum() for _, y, w in self.pairs))

    def squares(self, kernel: Floats, bias: Floats | None) -> float:
        """Return the weighted sum of squared residuals of a kernel."""
        residuals = [(self.layer.output(x, kernel, bias) - y) ** 2 * (1 if w is None else w) for x, y, w in self.pairs]
        return float(sum(residual.sum() for residual in residuals))


@st.composite
def layers(draw: st.DrawFn, *, plain: bool = False) -> Layer:
    """Draw a layer; if `plain`, without stride and dilation."""
    groups = draw(st.integers(1, 2))
    pairs = st.just((1, 1)) if plain else st.tuples(st.integers(1, 2), st.integers(1, 2))
    side = st.sampled_from([0, 0, 1, 2])
    return Layer(
        kernel_size=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        channels=groups * draw(st.integers(1, 2)),
        filters=groups * draw(st.integers(1, 3)),
        groups=groups,
        stride=draw(pairs),
        padding=draw(st.tuples(side, side, side, side)),
        dilation=draw(pairs),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@st.composite
def fit_cases(
    draw: st.DrawFn,
    *,
    plain: bool = False,
    weighted: bool = True,
    noises: tuple[float, ...] = (0.1, 1.0),
    largest: int = 12,
) -> FitCase:
    """Draw pairs of several sizes: random images, noisy targets made by a random kernel, and any kind of weights."""
    layer = draw(layers(plain=plain))
    side = st.integers(3, largest)
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    assume(all(min(layer.output_size(size)) >= 1 for size in sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kernel = rng.normal(size=layer.kernel_shape)
    bias = rng.normal(size=layer.filters) if layer.bias else None
    kinds = st.sampled_from(["none", "none", "a plane", "each value"]) if weighted else st.just("none")
    noise, kind = draw(st.sampled_from(noises)), draw(kinds)
    pairs: list[tuple[Floats, Floats, Floats | None]] = []
    for size in sizes:
        images = rng.normal(size=(draw(st.integers(1, 2)), layer.channels, *size)) + rng.normal()
        targets = layer.output(images, kernel, bias)
        targets = targets + noise * rng.normal(size=targets.shape)
        weights = None
        if kind != "none":
            drawn = rng.normal(size=targets.shape if kind == "each value" else targets.shape[2:])
            weights = np.broadcast_to(drawn.clip(min=0), targets.shape)
        pairs.append((images, targets, weights))
    fit_case = FitCase(layer, pairs)
    assume(fit_case.weight > 0)
    return fit_case
