"""The public names of core: complete in `__all__`, and documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import core
from core import torch_api

ROOT = Path(__file__).parents[2]


def imported_names(module: ModuleType) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }


def test_core_exports_exactly_its_public_names() -> None:
    assert imported_names(torch_api) == set(torch_api.__all__)
    assert imported_names(core) | set(torch_api.__all__) == set(core.__all__)
    assert core.__all__ == sorted(core.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    with pytest.raises(AttributeError, match="no attribute 'corelate'"):
        _ = core.corelate  # type: ignore[attr-defined]


def test_core_imports_torch_when_a_name_needs_it() -> None:
    light = [name for name in core.__all__ if name not in torch_api.__all__]
    code = f"""
import sys
import corr2d, core
for name in {light}:
    assert getattr(corr2d, name) is getattr(core, name)
assert "torch" not in sys.modules
from core.correlation import plan_correlate
assert core.plan_correlate is corr2d.plan_correlate is plan_correlate
assert core.correlate([[2]], [[3]]).output.tolist() == [[6]]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_verbs_and_types_are_documented() -> None:
    for name in core.__all__:
        thing = getattr(core, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), name


def test_fit_kernel_equals_fit_kernel_steps_run_to_the_end() -> None:
    assert inspect.signature(core.fit_kernel).parameters == inspect.signature(core.fit_kernel_steps).parameters
    assert inspect.signature(core.fit_kernel).return_annotation is core.FitResult


def test_no_file_contains_local_paths() -> None:
    forbidden = ["/work" + "/", "/opt" + "/wheels", "/root" + "/"]
    folders = ["benchmarks", "core", "docs", "service", "tests"]
    written = [path for folder in folders for suffix in ("py", "md") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    for path in [*written, *(ROOT / name for name in ("Makefile", "Dockerfile", "pyproject.toml", "constraints.txt"))]:
        assert not [word for word in forbidden if word in path.read_text()], path
