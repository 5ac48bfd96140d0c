"""Cross-correlation, Conv2d and kernel fitting on numpy arrays and torch tensors; usable without the HTTP service.

>>> import corr2d
>>> corr2d.correlate([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]]).output
tensor([[19., 25.],
        [37., 43.]])

The public names are those of the package `core`. In a wheel, `core` and `service` are the subpackages `corr2d.core` and
`corr2d.service` (hatch_build.py); in a checkout and an editable install, they are top-level packages.
"""

from typing import TYPE_CHECKING, Any

from corr2d.checkout import check_package_names

check_package_names()

from service.version import VERSION  # noqa: E402 - after the check

if TYPE_CHECKING:
    from core import *  # noqa: F403

__version__ = VERSION

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Return a public name of core, which is imported on first use."""
        import core

        if name not in core.__all__:
            raise AttributeError(f"module 'corr2d' has no attribute {name!r}")
        return getattr(core, name)


def __dir__() -> list[str]:
    import core

    return sorted([*core.__all__, "__version__"])
