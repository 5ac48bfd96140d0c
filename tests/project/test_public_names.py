"""The public names of core: complete in `__all__`, and documented."""

import ast
import inspect
from pathlib import Path

import core

ROOT = Path(__file__).parents[2]


def test_core_exports_exactly_its_public_names() -> None:
    imported = {
        alias.asname or alias.name
        for node in ast.parse(inspect.getsource(core)).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(core.__all__)
    assert core.__all__ == sorted(core.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


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
