"""Version of corr2d, which `pyproject.toml` reads too."""

VERSION = "0.2.0"
