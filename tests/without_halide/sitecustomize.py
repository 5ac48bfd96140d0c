# ruff: noqa: INP001
"""Hide Halide from a Python that has this folder on its PYTHONPATH, as on a platform that has no wheel of it."""

import sys

sys.modules["halide"] = None  # type: ignore[assignment]
