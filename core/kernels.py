"""The named kernels: `sobel_x`, `gaussian(2.0)`, `motion(9, 45)`, ...

All are defined for cross-correlation, without a flip. x points right and y points down, so a derivative in x is
positive at pixels whose right neighbours are brighter than their left ones.
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
"""Maximum side of a named kernel, in pixels; larger kernels have to be passed as arrays."""

MAX_KERNEL_NAME_CHARS = 200
"""Maximum length of a kernel name with its arguments, in characters."""

KERNEL_NAME_PATTERN = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\(([^()]*)\))?\s*")
"""A name, and optionally its arguments in parentheses."""

KERNEL_CACHE_BYTES = 1 << 25
"""Maximum memory of cached kernels, in bytes; a request resolves its kernel name more than once."""

Kernel = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KernelFamily:
    """A named kernel and its parameters: signature and example for messages, and `make`, which builds the array (h, w).

    `make` raises ValueError with the allowed range if an argument is invalid. `rank` is the rank of its kernels as
    matrices if it is known, otherwise None.
    """

    signature: str
    example: str
    description: str
    make: Callable[..., Kernel]
    required_arguments: int = 0
    optional_arguments: int = 0
    rank: int | None = None


class _KernelCache:
    """Cache of the most recently used kernels, limited in bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._max_bytes = limit
        self._lock = threading.Lock()
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()
        self._bytes = 0

    def get(self, text: str) -> Kernel | None:
        """Return the cached kernel of that name, or None."""
        with self._lock:
            if text in self._kernels:
                self._kernels.move_to_end(text)
            return self._kernels.get(text)

    def put(self, text: str, kernel: Kernel) -> None:
        """Add a kernel and evict the least recently used kernels above the limit."""
        with self._lock:
            if kernel.nbytes <= self._max_bytes and text not in self._kernels:
                self._kernels[text] = kernel
                self._bytes += kernel.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._kernels.popitem(last=False)[1].nbytes


_kernel_cache = _KernelCache(KERNEL_CACHE_BYTES)


def named_kernel(text: str) -> Kernel:
    """Return the kernel (h, w) of a name such as "sobel_x" or "gaussian(2.0)", as a read-only array.

    Raises UnknownKernel with the nearest names, or with the signature if the arguments do not match it.
    """
    kernel = _kernel_cache.get(text)
    if kernel is None:
        kernel = _build_named_kernel(text)
        kernel.setflags(write=False)
        _kernel_cache.put(text, kernel)
    return kernel


def _build_named_kernel(text: str) -> Kernel:
    call = KERNEL_NAME_PATTERN.fullmatch(text) if len(text) <= MAX_KERNEL_NAME_CHARS else None
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
            f'"{text[:60]}" does not match {family.signature}: {error}; for example "{family.example}"',
            field="kernel",
            got=text[:60],
            limit=family.signature,
        ) from error


def _build_finite(make: Callable[..., Kernel], arguments: list[float]) -> Kernel:
    with np.errstate(all="ignore"):
        try:
            kernel = make(*arguments)
        except ArithmeticError as error:
            raise ValueError("an argument is out of range") from error
    if not np.isfinite(kernel).all():
        raise ValueError("an argument is out of range")
    return kernel


def _parse_arguments(text: str, family: KernelFamily) -> list[float]:
    arguments = [float(word) for word in text.split(",")] if text.strip() else []
    if not family.required_arguments <= len(arguments) <= family.required_arguments + family.optional_arguments:
        raise ValueError(f"received {len(arguments)} argument{'' if len(arguments) == 1 else 's'}")
    return arguments


def box(n: float) -> Kernel:
    """Return the mean over n x n pixels."""
    side = _require_side("n", n)
    return np.full((side, side), 1 / side**2)


def gaussian(sigma: float, n: float | None = None) -> Kernel:
    """Return a Gaussian of standard deviation sigma (pixels), n x n, sum 1; by default n covers 4 sigma to each side.

    Truncation and normalization are those of scipy.ndimage.gaussian_filter.
    """
    line = _gaussian_1d(sigma, n)
    kernel: Kernel = np.outer(line, line)
    return kernel


def laplacian_of_gaussian(sigma: float) -> Kernel:
    """Return the Laplacian of a Gaussian of standard deviation sigma (pixels), shifted to sum 0.

    (r^2 - 2 sigma^2) / sigma^4 times the sum-1 Gaussian; Marr and Hildreth, "Theory of edge detection", 1980.
    """
    x = _centered_coordinates(sigma, None)
    line = _gaussian_1d(sigma, None)
    curved = (x**2 - sigma**2) / sigma**4 * line
    kernel: Kernel = np.stack([curved, line], 1) @ np.stack([line, curved])
    kernel -= kernel.mean()
    return kernel


def motion_blur(n: float, angle: float) -> Kernel:
    """Return the blur of a camera motion over n pixels (odd) at `angle` degrees, counter-clockwise from the x axis.

    The weight of a pixel is 1 minus its distance from the line, normalized to sum 1, as in MATLAB's fspecial("motion").
    """
    side = _require_side("n", n)
    if side % 2 == 0:
        raise ValueError(f"n must be odd, {side} is even")
    if not math.isfinite(angle):
        raise ValueError("angle must be finite")
    # Reduced to a half circle, in which sine and cosine of multiples of 90 degrees are accurate enough.
    radians = math.radians(angle % 180)
    sine, cosine, reach = math.sin(radians), math.cos(radians), side // 2
    # Pixels closer than 1 to the line: at most 6 in each column (or row, if the line is steeper than 45 degrees).
    along_axis = np.arange(-reach, reach + 1, dtype=np.float64)[:, None]
    slope = -sine / cosine if abs(cosine) > abs(sine) else -cosine / sine
    near = np.floor(slope * along_axis) + np.arange(-2, 4)
    x, y = (along_axis, near) if abs(cosine) > abs(sine) else (near, along_axis)
    beyond = np.maximum(np.abs(x * cosine - y * sine) - reach, 0)
    weight = np.maximum(1 - np.hypot(x * sine + y * cosine, beyond), 0)
    weight[(weight < 1e-12) | (np.abs(near) > reach)] = 0
    kernel = np.zeros((side, side))
    # Pixels outside the kernel have weight 0, so clipping their indices adds nothing.
    rows, columns = (np.clip(axis, -reach, reach).astype(np.intp) + reach for axis in (y, x))
    np.add.at(kernel, (rows, columns), weight / weight.sum())
    return kernel


def _gaussian_1d(sigma: float, n: float | None) -> Kernel:
    """Return a one-dimensional Gaussian, sum 1."""
    exponents = -0.5 * (_centered_coordinates(sigma, n) / sigma) ** 2
    # Shifted so that the largest is 0: for even n no pixel is at the centre, and a small sigma underflows everywhere.
    line: Kernel = np.exp(exponents - exponents.max())
    line /= line.sum()
    return line


def _centered_coordinates(sigma: float, n: float | None) -> Kernel:
    """Return the signed distances from the centre along one side, in pixels."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be above 0, not {sigma:g}")
    side = _require_side("n", 2 * int(4 * sigma + 0.5) + 1 if n is None else n)
    return np.arange(side, dtype=np.float64) - (side - 1) / 2


def _require_side(name: str, value: float) -> int:
    if value != value // 1 or not 1 <= value <= MAX_NAMED_KERNEL_SIDE:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_NAMED_KERNEL_SIDE}, not {value:g}")
    return int(value)


def named_kernel_rank(text: str) -> int | None:
    """Return the rank of a named kernel as a matrix if it is known, otherwise None. The name must be valid."""
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
    "edge_x": _fixed_kernel("edge_x", "difference of neighbours in x, the edge kernel of the d2l example", [[-1, 1]]),
    "motion": KernelFamily(
        "motion(n, angle)",
        "motion(9, 45)",
        "blur along n pixels (odd) at an angle in degrees",
        motion_blur,
        required_arguments=2,
    ),
}
