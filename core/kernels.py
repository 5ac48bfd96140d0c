"""The named kernels: `sobel_x`, `gaussian(2.0)`, `motion(9, 45)`, ...

All are written for cross-correlation: laid on the image as they stand, nothing is flipped. x runs to the right and y
down, so a derivative in x is positive where the picture gets brighter to the right.
"""

import difflib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import UnknownKernel

MAX_NAMED_KERNEL_SIDE = 1023
"""The largest side of a kernel that a name may ask for; a larger one is sent as an array."""

MAX_KERNEL_NAME_CHARS = 200
"""The longest name that is looked at."""

KERNEL_CACHE_BYTES = 1 << 25
"""The most memory of kernels that are kept: a request resolves its name more than once."""

Kernel = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KernelFamily:
    """A name with its arguments: `signature` for reading, `example` for trying, `make` for the numbers (h, w).

    `rank` is that of its kernels as matrices, if it is low.
    """

    signature: str
    example: str
    description: str
    make: Callable[..., Kernel]
    required_arguments: int = 0
    optional_arguments: int = 0
    rank: int | None = None


class _KernelCache:
    """The kernels made last, up to a number of bytes. Safe to use from any thread."""

    def __init__(self, limit: int) -> None:
        self._max_bytes = limit
        self._lock = threading.Lock()
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()
        self._bytes = 0

    def get(self, text: str) -> Kernel | None:
        """The kernel of that name, if it is kept."""
        with self._lock:
            if text in self._kernels:
                self._kernels.move_to_end(text)
            return self._kernels.get(text)

    def put(self, text: str, kernel: Kernel) -> None:
        """Keep a kernel, and drop those that were used longest ago if there are too many bytes."""
        with self._lock:
            if kernel.nbytes <= self._max_bytes and text not in self._kernels:
                self._kernels[text] = kernel
                self._bytes += kernel.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._kernels.popitem(last=False)[1].nbytes


_kernel_cache = _KernelCache(KERNEL_CACHE_BYTES)


def named_kernel(text: str) -> Kernel:
    """Return the kernel (h, w) of a name such as "sobel_x" or "gaussian(2.0)", as an array that cannot be written to.

    Raises UnknownKernel with the nearest names, or with the signature where the arguments do not fit it.
    """
    kernel = _kernel_cache.get(text)
    if kernel is None:
        kernel = _build_named_kernel(text)
        kernel.setflags(write=False)
        _kernel_cache.put(text, kernel)
    return kernel


def _build_named_kernel(text: str) -> Kernel:
    call = re.fullmatch(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*", text) if len(text) <= MAX_KERNEL_NAME_CHARS else None
    name = call[1] if call else text[:60]
    family = KERNELS.get(name)
    if call is None or family is None:
        near = difflib.get_close_matches(name, KERNELS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(KERNELS[other].example for other in near)}?" if near else ""
        raise UnknownKernel(
            f'"{text[:60]}" is not a named kernel{hint}', field="kernel", got=text[:60], limit=", ".join(KERNELS)
        )
    try:
        return _build_finite(family.make, _parse_arguments(call[2] or "", family))
    except ValueError as error:
        raise UnknownKernel(
            f'"{text[:60]}" does not fit {family.signature} ({error}); for example "{family.example}"',
            field="kernel",
            got=text[:60],
            limit=family.signature,
        ) from error


def _build_finite(make: Callable[..., Kernel], arguments: list[float]) -> Kernel:
    with np.errstate(all="ignore"):
        try:
            kernel = make(*arguments)
        except ArithmeticError as error:
            raise ValueError("its numbers are out of range") from error
    if not np.isfinite(kernel).all():
        raise ValueError("its numbers are out of range")
    return kernel


def _parse_arguments(text: str, family: KernelFamily) -> list[float]:
    arguments = [float(word) for word in text.split(",")] if text.strip() else []
    if not family.required_arguments <= len(arguments) <= family.required_arguments + family.optional_arguments:
        raise ValueError(f"it has {len(arguments)} arguments")
    return arguments


def box(n: float) -> Kernel:
    """The mean over n x n pixels."""
    side = _require_side("n", n)
    return np.full((side, side), 1 / side**2)


def gaussian(sigma: float, n: float | None = None) -> Kernel:
    """A Gaussian of standard deviation sigma (pixels), n x n, sum 1; n covers 4 sigma to each side unless given.

    The cut and the normalisation are scipy.ndimage.gaussian_filter's.
    """
    line = _gaussian_1d(sigma, n)
    kernel: Kernel = np.outer(line, line)
    return kernel


def laplacian_of_gaussian(sigma: float) -> Kernel:
    """The Laplacian of a Gaussian of standard deviation sigma (pixels), shifted to sum 0.

    (r^2 - 2 sigma^2) / sigma^4 times the sum-1 Gaussian; Marr and Hildreth, "Theory of edge detection", 1980.
    """
    x = _centered_coordinates(sigma, None)
    line = _gaussian_1d(sigma, None)
    curved = (x**2 - sigma**2) / sigma**4 * line
    kernel: Kernel = np.stack([curved, line], 1) @ np.stack([line, curved])
    kernel -= kernel.mean()
    return kernel


def motion_blur(n: float, angle: float) -> Kernel:
    """The blur of a camera moved n pixels (odd) at `angle` degrees, counter-clockwise from the x axis; sum 1.

    A pixel weighs 1 minus its distance from the line, as in MATLAB's fspecial("motion").
    """
    side = _require_side("n", n)
    if side % 2 == 0:
        raise ValueError(f"n must be odd, {side} is even")
    if not math.isfinite(angle):
        raise ValueError("angle must be finite")
    # The angle is turned within one half circle, where sine and cosine of the right angles are exact enough.
    radians = math.radians(angle % 180)
    sine, cosine, reach = math.sin(radians), math.cos(radians), side // 2
    # Pixels nearer than 1 to the line: at most 6 in each column of a flat one, in each row of a steep one.
    along_axis = np.arange(-reach, reach + 1, dtype=np.float64)[:, None]
    slope = -sine / cosine if abs(cosine) > abs(sine) else -cosine / sine
    near = np.floor(slope * along_axis) + np.arange(-2, 4)
    x, y = (along_axis, near) if abs(cosine) > abs(sine) else (near, along_axis)
    beyond = np.maximum(np.abs(x * cosine - y * sine) - reach, 0)
    weight = np.maximum(1 - np.hypot(x * sine + y * cosine, beyond), 0)
    weight[(weight < 1e-12) | (np.abs(near) > reach)] = 0
    kernel = np.zeros((side, side))
    # What lies outside weighs nothing.
    rows, columns = (np.clip(axis, -reach, reach).astype(np.intp) + reach for axis in (y, x))
    np.add.at(kernel, (rows, columns), weight / weight.sum())
    return kernel


def _gaussian_1d(sigma: float, n: float | None) -> Kernel:
    """A Gaussian along one side, sum 1."""
    exponents = -0.5 * (_centered_coordinates(sigma, n) / sigma) ** 2
    # Its largest is 0 at least where a pixel is the centre; an even n has none, and a small sigma nothing else.
    line: Kernel = np.exp(exponents - exponents.max())
    line /= line.sum()
    return line


def _centered_coordinates(sigma: float, n: float | None) -> Kernel:
    """The distances from the centre along one side, in pixels."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be above 0, not {sigma:g}")
    side = _require_side("n", 2 * int(4 * sigma + 0.5) + 1 if n is None else n)
    return np.arange(side, dtype=np.float64) - (side - 1) / 2


def _require_side(name: str, value: float) -> int:
    if value != value // 1 or not 1 <= value <= MAX_NAMED_KERNEL_SIDE:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_NAMED_KERNEL_SIDE}, not {value:g}")
    return int(value)


def named_kernel_rank(text: str) -> int | None:
    """The rank of a named kernel as a matrix, if it is low. The name is one that `named_kernel` takes."""
    return KERNELS[text.partition("(")[0].strip()].rank


def _fixed_kernel(name: str, description: str, rows: list[list[float]]) -> KernelFamily:
    kernel = np.array(rows, dtype=np.float64)
    return KernelFamily(name, name, description, kernel.copy, rank=int(np.linalg.matrix_rank(kernel)))


KERNELS: dict[str, KernelFamily] = {
    "identity": _fixed_kernel("identity", "the image itself", [[1]]),
    "box": KernelFamily("box(n)", "box(3)", "mean over n x n pixels", box, required_arguments=1, rank=1),
    "gaussian": KernelFamily(
        "gaussian(sigma[, n])",
        "gaussian(1.0)",
        "Gaussian blur of standard deviation sigma pixels, n x n (4 sigma to each side unless given)",
        gaussian,
        required_arguments=1,
        optional_arguments=1,
        rank=1,
    ),
    "sobel_x": _fixed_kernel("sobel_x", "derivative in x, smoothed in y", [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]),
    "sobel_y": _fixed_kernel("sobel_y", "derivative in y, smoothed in x", [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]),
    "prewitt_x": _fixed_kernel("prewitt_x", "derivative in x, averaged in y", [[-1, 0, 1], [-1, 0, 1], [-1, 0, 1]]),
    "prewitt_y": _fixed_kernel("prewitt_y", "derivative in y, averaged in x", [[-1, -1, -1], [0, 0, 0], [1, 1, 1]]),
    "scharr_x": _fixed_kernel("scharr_x", "derivative in x, rotation-optimal", [[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]]),
    "scharr_y": _fixed_kernel("scharr_y", "derivative in y, rotation-optimal", [[-3, -10, -3], [0, 0, 0], [3, 10, 3]]),
    "laplacian": _fixed_kernel("laplacian", "sum of second derivatives", [[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
    "laplacian_diagonal": _fixed_kernel(
        "laplacian_diagonal", "second derivatives, diagonals included", [[1, 1, 1], [1, -8, 1], [1, 1, 1]]
    ),
    "log": KernelFamily(
        "log(sigma)", "log(1.0)", "Laplacian of a Gaussian, sum 0", laplacian_of_gaussian, required_arguments=1, rank=3
    ),
    "sharpen": _fixed_kernel("sharpen", "the image minus its Laplacian", [[0, -1, 0], [-1, 5, -1], [0, -1, 0]]),
    "emboss": _fixed_kernel("emboss", "relief lit from the lower right", [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]),
    "edge_x": _fixed_kernel("edge_x", "difference of neighbours in x, the lesson's edge kernel", [[-1, 1]]),
    "motion": KernelFamily(
        "motion(n, angle)",
        "motion(9, 45)",
        "blur along n pixels (odd) at an angle in degrees",
        motion_blur,
        required_arguments=2,
    ),
}
