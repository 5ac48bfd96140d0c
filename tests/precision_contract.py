"""Random problems for the precision contract of docs/precision.md, and a check that an output satisfies it.

The reference is a direct sum in a wider dtype: float64 for float32, long double for float64.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core import ENGINES, Dtype, PaddingMode
from tests.engine_properties import (
    supports_boundary,
    supports_groups,
    supports_kernel_sizes,
    supports_layers,
    supports_planes,
    supports_steps,
)
from tests.reference import NUMPY_PAD_MODES

Array = NDArray[Any]

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}
OUTPUT_TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
WIDER_DTYPES = {"float32": np.float64, "float64": np.longdouble}
EXPONENT_RANGES = {"float32": (-38, 37), "float64": (-300, 300)}


@dataclass(frozen=True)
class Case:
    """A layer for one engine: images (N, C, H, W), weight (O, C / groups, h, w), and conv2d's options."""

    engine: str
    dtype: Dtype
    images: Array
    weight: Array
    options: dict[str, Any] = field(default_factory=lambda: {"groups": 1, "padding": (0, 0, 0, 0)})
    kinds: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments with which conv2d computes the case by this engine."""
        return {
            "input": self.images,
            "weight": self.weight,
            "dtype": self.dtype,
            "method": ENGINES[self.engine].METHOD,
            "engines": (self.engine,),
            **self.options,
        }


def draw_case(rng: np.random.Generator, engine: str, dtype: Dtype) -> Case:
    """Draw a random problem that the engine supports."""
    single = (rng.random() < 0.3 and supports_planes(engine)) if supports_layers(engine) else True
    groups = 1 if single or not supports_groups(engine) else int(rng.choice([1, 1, 2, 3]))
    many = 5 if supports_groups(engine) else 40
    depth, each = (1, 1) if single else (int(rng.integers(1, many)), int(rng.integers(1, many - 1)))
    if not supports_groups(engine):
        depth += 7
    options: dict[str, Any] = {"groups": groups, "padding": tuple(int(side) for side in rng.choice([0, 0, 1, 4], 4))}
    if supports_steps(engine) and not single:
        for name in ("stride", "dilation"):
            options[name] = tuple(int(step) for step in rng.choice([1, 1, 2, 3], 2))
    if any(options["padding"]):
        modes: tuple[PaddingMode, ...] = ("zeros", "replicate", "circular")
        options["padding_mode"] = str(rng.choice([mode for mode in modes if supports_boundary(engine, mode)]))
    most = 8 if not single else 34 if engine != "stencil" else 20
    kernel = int(rng.integers(1, most)), int(rng.integers(1, most))
    if not supports_kernel_sizes(engine):
        kernel = 3, 3
    down, across = options.get("dilation", (1, 1))
    sides = (
        int(rng.integers(20, 90)) + (kernel[0] - 1) * down,
        int(rng.integers(20, 90)) + (kernel[1] - 1) * across,
    )
    batch = int(rng.integers(1, 4))
    images, of_images = _draw_images(rng, (batch, groups * depth, *sides), dtype)
    low_rank = ENGINES[engine].METHOD == "separable"
    weight, of_weight = _draw_weight(rng, (groups * each, depth, *kernel), dtype, low_rank=low_rank)
    return Case(engine, dtype, images.astype(dtype), weight.astype(dtype), options, (of_images, of_weight))


def _draw_images(  # noqa: C901, PLR0912 - a case for each kind
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Dtype
) -> tuple[Array, str]:
    low, high = EXPONENT_RANGES[dtype]
    kinds = (
        *("noise", "positive", "offset", "scaled", "sparse", "one pixel", "integers", "small integers", "subnormal"),
        *("smooth", "constant", "checkerboard", "step", "unlike images", "unlike bands", "wide range", "corner"),
    )
    kind = str(rng.choice(kinds))
    noise = rng.normal(size=shape)
    rows, columns = np.indices(shape[2:])
    match kind:
        case "positive":
            values = rng.random(shape)
        case "offset":
            values = noise + rng.choice([-1, 1]) * 10 ** rng.uniform(0, 7)
        case "scaled":
            values = noise * 10.0 ** rng.uniform(low + 8, high - 8)
        case "sparse":
            values = noise * (rng.random(shape) < 0.01) * 10 ** rng.uniform(-3, 3)
        case "one pixel":
            values = np.zeros(shape)
            values[..., rng.integers(shape[2]), rng.integers(shape[3])] = 10 ** rng.uniform(-6, 6)
        case "integers":
            values = rng.integers(-65536, 65536, shape).astype(float)
        case "small integers":
            values = rng.integers(0, 256, shape).astype(float)
        case "subnormal":
            values = noise * float(np.finfo(dtype).tiny) * rng.choice([1e-2, 1e-5])
        case "smooth":
            values = 1e6 * (1 - np.exp(-((rows - 30) ** 2 + (columns - 20) ** 2) / 38.0**2)) + 0.1 * rng.random(shape)
        case "constant":
            values = np.full(shape, rng.normal())
        case "checkerboard":
            values = np.broadcast_to((-1.0) ** (rows + columns), shape) + 1e-3 * noise * rng.integers(2)
        case "step":
            values = 1e5 * np.sign(noise[:, :, :1]) + noise
        case "unlike images":
            values = rng.random(shape) * 10 ** rng.uniform(-6, 9, (shape[0], 1, 1, 1))
        case "unlike bands":
            values = rng.random(shape) * 10 ** rng.uniform(-3, 6, (shape[0], shape[1], 1, 1))
        case "wide range":
            values = noise * 10 ** rng.uniform(-12, 0, shape)
        case "corner":
            values = noise.copy()
            values[:, :, 0, -1] = 1e6
        case _:
            values = noise
    return values, kind


def _draw_weight(  # noqa: C901, PLR0912 - a case for each kind
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Dtype, *, low_rank: bool
) -> tuple[Array, str]:
    low, high = EXPONENT_RANGES[dtype]
    kinds = (
        *("noise", "positive", "smooth", "antisymmetric", "no sum", "sparse", "huge tap", "step", "integers"),
        *("one tap", "scaled", "ones", "unlike filters"),
    )
    kind = str(rng.choice(kinds))
    noise = rng.normal(size=shape)
    if low_rank:
        rank = int(rng.integers(1, min(4, *shape[2:]) + 1))
        noise = rng.normal(size=(*shape[:3], rank)) @ rng.normal(size=(*shape[:2], rank, shape[3]))
        kind = str(
            rng.choice(["noise", "smooth", "sparse", "huge tap", "integers", "one tap", "scaled", "ones", "step"])
        )
    rows, columns = np.indices(shape[2:])
    middle = (shape[2] - 1) / 2, (shape[3] - 1) / 2
    gaussian = np.exp(-((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2) / (0.3 * max(shape[2:])) ** 2)
    match kind:
        case "positive":
            values = rng.random(shape)
        case "smooth":
            values = np.broadcast_to(gaussian / gaussian.sum(), shape).copy()
        case "antisymmetric":
            values = noise - noise[..., ::-1, ::-1]
        case "no sum":
            values = noise - noise.mean((2, 3), keepdims=True)
        case "sparse":
            values = np.zeros(shape) if low_rank else noise * (rng.random(shape) < 0.05)
            values[..., rng.integers(shape[2]), rng.integers(shape[3])] = 1
        case "huge tap":
            values = np.full(shape, 1e-3) if low_rank else noise.copy()
            values[..., rng.integers(shape[2]), rng.integers(shape[3])] = 10 ** rng.uniform(2, 8)
        case "step":
            values = np.broadcast_to(np.where(columns < shape[3] // 2, -1.0, 1.0), shape).copy()
        case "integers":
            values = rng.integers(-9, 10, (*shape[:3], 1)) * rng.integers(-9, 10, (*shape[:2], 1, shape[3])).astype(
                float
            )
        case "one tap":
            values = np.zeros(shape)
            values[..., rng.integers(shape[2]), rng.integers(shape[3])] = rng.normal()
        case "scaled":
            values = noise * 10.0 ** rng.uniform(low + 8, high - 8)
        case "ones":
            values = np.ones(shape)
        case "unlike filters":
            values = noise * 10 ** rng.uniform(-6, 6, (shape[0], 1, 1, 1))
        case _:
            values = noise
    return values, kind


@dataclass(frozen=True)
class Expected:
    """Expected values in a wider dtype and sums of |x| |k|, (N, O, H, W); number of nonzero taps per filter, (O,)."""

    values: Array
    sums: Array
    taps: Array


def compute_expected(case: Case) -> Expected:
    """Compute the expected output by direct sums."""
    wide = WIDER_DTYPES[case.dtype]
    images, weight, options = case.images, case.weight, case.options
    top, bottom, left, right_ = options["padding"]
    mode = NUMPY_PAD_MODES[options.get("padding_mode", "zeros")]
    padded = np.pad(images.astype(wide), ((0, 0), (0, 0), (top, bottom), (left, right_)), mode)  # type: ignore[call-overload]
    (down, across), (dy, dx) = options.get("stride", (1, 1)), options.get("dilation", (1, 1))
    filters, depth, h, w = weight.shape
    rows = (padded.shape[2] - dy * (h - 1) - 1) // down + 1
    columns = (padded.shape[3] - dx * (w - 1) - 1) // across + 1
    values = np.zeros((len(images), filters, rows, columns), wide)
    sums = np.zeros(values.shape, wide)
    taps = weight.astype(wide)
    each = filters // options["groups"]
    with np.errstate(all="ignore"):
        for o, c, a, b in np.ndindex(weight.shape):
            if taps[o, c, a, b] != 0:
                channel = padded[:, o // each * depth + c, a * dy :: down, b * dx :: across][:, :rows, :columns]
                product = channel * taps[o, c, a, b]
                values[:, o] += product
                sums[:, o] += np.abs(product)
    return Expected(values, sums, (weight != 0).sum((1, 2, 3)))


def find_violation(case: Case, output: Array) -> str | None:
    """Return a message about the first violation of the contract in the output, or None."""
    truth, unit, numbers = compute_expected(case), UNIT_ROUNDOFF[case.dtype], np.finfo(case.dtype)
    # If partial sums can overflow, the result depends on the order of summation and is not checked.
    clear = truth.sums < float(numbers.max)
    if not np.isfinite(output[clear]).all():
        return "an output is not finite, but its expected value is"
    if (np.isfinite(output) & (np.abs(truth.values) > 2 * float(numbers.max))).any():
        return "an output is finite, but its expected value overflows"
    values, sums = np.where(clear, truth.values, 0), np.where(clear, truth.sums, 0)
    errors = np.abs(np.where(clear, output.astype(values.dtype), 0) - values)
    whole = all((part == np.rint(part)).all() for part in (case.images, case.weight))
    reach = float(np.abs(case.images).max()) * float(np.abs(case.weight).sum((1, 2, 3), dtype=np.float64).max())
    if whole and reach < 0.5 / unit and errors.any():
        return f"outputs of integers are off by up to {float(errors.max()):.3g}; they must be exact"
    taps = truth.taps.reshape(1, -1, 1, 1) + 1
    if ENGINES[case.engine].METHOD == "direct":
        bounds = taps * unit * sums
    else:
        largest, most = (each.max((2, 3), keepdims=True) for each in (np.abs(values), sums))
        roots = 4 * math.sqrt(math.prod(case.weight.shape[1:]))
        bounds = np.broadcast_to(OUTPUT_TOLERANCE[case.dtype] * largest + roots * unit * most, errors.shape)
    # Products below the smallest normal number have fewer digits in any order of summation.
    off = errors > bounds + taps * WIDER_DTYPES[case.dtype](numbers.smallest_subnormal)
    if off.any():
        position = tuple(int(index) for index in np.argwhere(off)[0])
        return (
            f"{int(off.sum())} outputs exceed the tolerance; the first, at {position}, is off by "
            f"{errors[position]:.3g}, allowed are {bounds[position]:.3g}"
        )
    return None
