"""Check of the top-level names that corr2d uses in a checkout."""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("core", "service")
"""Packages next to `corr2d` in a checkout and in an editable install, and inside `corr2d` in a wheel."""


def check_package_names() -> None:
    """Raise ImportError if `core` or `service` is another package than that of this checkout.

    Packages of the current folder, of PYTHONPATH and of site-packages come before those of an editable install.
    """
    folder = Path(__file__).resolve().parent
    if all((folder / name).is_dir() for name in PACKAGES):
        return
    for name in PACKAGES:
        spec, expected = find_spec(name), folder.parent / name / "__init__.py"
        found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != expected:
            raise ImportError(
                f"the name {name!r} belongs to {found or 'another package'}, but this checkout of corr2d needs it for "
                f"{expected}: remove the other package from this environment, or install corr2d as a wheel "
                f"(pip install {folder.parent}), in which the packages are inside corr2d"
            )
