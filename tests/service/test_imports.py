import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.imports import without_garbage_collection

ROOT = Path(__file__).parents[2]


def fail_to_import() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
        raise ImportError


def test_garbage_collection_pauses_for_imports_and_continues_after_errors() -> None:
    assert gc.isenabled()
    try:
        with pytest.raises(ImportError):
            fail_to_import()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.slow
def test_a_command_collects_no_garbage_while_its_modules_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "input.json").write_text("[[1, 2], [3, 4]]")
    code = """
import gc, sys

def report(phase, info):
    api = sys.modules.get("core.torch_api")
    print(phase, "torch" in sys.modules and not hasattr(api, "__all__"))

gc.callbacks.append(report)
from service.cli.main import app
app(["correlate", "input.json", "--kernel", "[[1]]"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert "start False" in output, "the callback works"
    assert "start True" not in output, "no collection while torch is imported"


@pytest.mark.parametrize("arguments", [["kernels"], ["kernels", "sobel_x"], ["version"], ["config"], ["kernels", "no"]])
def test_commands_without_arrays_do_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from service.cli.main import app
app({arguments}, standalone_mode=False)
assert "torch" not in sys.modules and "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
