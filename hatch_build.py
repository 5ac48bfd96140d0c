"""Build hook of the wheel: put `core`, `service` and the pages of `docs` inside the package `corr2d`.

The top-level names `core` and `service` are so common that other distributions contain them, too, and pip lets one
overwrite the other. In the wheel, they are therefore `corr2d.core` and `corr2d.service`, and every import of them is
rewritten. Editable installs use the checkout as it is.
"""

import ast
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGES = ("core", "service")

FROM_IMPORT = re.compile(r"^(\s*(?:>>> )?from )(core|service)(?=[. ])", re.MULTILINE)
PLAIN_IMPORT = re.compile(r"^(\s*(?:>>> )?import )(core|service)$", re.MULTILINE)
MODULE_NAME = re.compile(r'"(core|service)((?:\.\w+)+)"')
"""A module that is named in a string, as for `python -m`."""


def rewrite_imports(source: str) -> str:
    """Return the source code of a module with imports of `core` and `service` from `corr2d`.

    Raises ValueError if an import of them remains.
    """
    source = FROM_IMPORT.sub(r"\1corr2d.\2", source)
    source = PLAIN_IMPORT.sub(r"\1corr2d.\2 as \2", source)
    source = MODULE_NAME.sub(r'"corr2d.\1\2"', source)
    for node in ast.walk(ast.parse(source)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in PACKAGES for name in names):
            raise ValueError(
                f"line {node.lineno}: this form of import is not supported in the wheel: {ast.unparse(node)}"
            )
    return source


class WheelPackages(BuildHookInterface):
    """Builder of the packages of the wheel in a temporary folder."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Copy the packages, rewrite their imports, and add them to the wheel."""
        if version == "editable":
            return
        root = Path(self.root)
        self.folder = Path(tempfile.mkdtemp())
        ignore = shutil.ignore_patterns("__pycache__")
        package = shutil.copytree(root / "corr2d", self.folder / "corr2d", ignore=ignore)
        for name in PACKAGES:
            shutil.copytree(root / name, package / name, ignore=ignore)
        for path in package.rglob("*.py"):
            path.write_text(rewrite_imports(path.read_text("utf-8")), "utf-8")
        shutil.copytree(root / "docs", package / "docs", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        build_data["force_include"][str(package)] = "corr2d"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the temporary folder."""
        if version != "editable":
            shutil.rmtree(self.folder)
