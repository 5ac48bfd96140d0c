"""The names under which corr2d is installed, and its wheel."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import httpx
import pytest

import core
import corr2d
from tests.servers import wait_until_ready

ROOT = Path(__file__).parents[2]

OTHER_PROJECT = """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "service"
version = "1.0"

[tool.hatch.build.targets.wheel]
packages = ["core", "service"]
"""
"""A distribution with the two top-level packages of this repository."""

FIT = """
import core, service
assert core.__all__ == service.__all__ == ["other"]

import corr2d
fit = corr2d.fit_kernel([[1, 2, 0], [3, 4, 1]], [[1, -2], [1, -3]], kernel_size=(1, 2), solver="exact")
assert corr2d.correlate([[1, 2], [3, 4]], [[1]]).output.tolist() == [[1, 2], [3, 4]]
print(corr2d.__version__, fit.status)
"""


def write_other_packages(folder: Path) -> None:
    for name in ("core", "service"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text('__all__ = ["other"]\n')


def build_wheel(project: Path, folder: Path) -> Path:
    """Return the wheel of a project; skip the test if the build backend cannot be downloaded."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(project)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in process.stderr:
        pytest.skip("the build backend hatchling cannot be downloaded")
    assert process.returncode == 0, process.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_corr2d_exports_the_public_names_of_core() -> None:
    assert dir(corr2d) == sorted([*core.__all__, "__version__"])
    assert corr2d.correlate is core.correlate
    with pytest.raises(AttributeError, match="no attribute 'corelate'"):
        _ = corr2d.corelate  # type: ignore[attr-defined]


def test_another_package_named_service_is_reported(tmp_path: Path) -> None:
    write_other_packages(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "corr2d", "version"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    message = process.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: the name 'core' belongs to {tmp_path / 'core' / '__init__.py'}")
    assert "install corr2d as a wheel" in message


@pytest.mark.slow
def test_wheel_works_next_to_packages_named_core_and_service(tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_other_packages(other)
    (other / "pyproject.toml").write_text(OTHER_PROJECT)
    wheels = [build_wheel(ROOT, tmp_path / "wheel"), build_wheel(other, tmp_path / "other_wheel")]

    files = zipfile.ZipFile(wheels[0]).namelist()
    assert {name.split("/")[0] for name in files} == {"corr2d", f"corr2d-{corr2d.__version__}.dist-info"}
    assert {"corr2d/py.typed", "corr2d/service/routes/favicon.ico"} <= set(files)
    listed = subprocess.run(
        ["git", "ls-files", "core", "service"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert {f"corr2d/{name}" for name in listed.stdout.splitlines()} <= set(files)
    assert {"corr2d/docs/README.md", "corr2d/docs/images/camera.png"} <= set(files)

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", environment], check=True)
    # The dependencies; the files *.pth in that folder, such as that of an editable install of corr2d, have no effect.
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = str(environment / "bin" / "python")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *map(str, wheels)]
    subprocess.run(install, check=True, env=variables)

    folder = tmp_path / "folder"
    folder.mkdir()
    process = subprocess.run(
        [python, "-c", FIT], capture_output=True, text=True, check=False, cwd=folder, env=variables
    )
    assert process.stdout == f"{corr2d.__version__} converged\n", process.stderr

    command = [str(environment / "bin" / "corr2d"), "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder, env=variables
    ) as server:
        assert server.stdout is not None
        address = re.search(r"listens on (http://[\d.:]+)", server.stdout.readline())
        assert address
        with httpx.Client(base_url=address[1], timeout=60) as client:
            wait_until_ready(client.request)
            body = {"input": [[1, 2, 0], [3, 4, 1]], "target": [[1, -2], [1, -3]], "solver": "exact"}
            assert client.post("/train-kernel", json=body).status_code == 200
            for path in ("/", "/guide", "/guide/guide.css", "/guide/images/camera.png", "/favicon.ico"):
                assert client.get(path).status_code == 200, path
            assert client.get("/info").json()["version"] == corr2d.__version__
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
