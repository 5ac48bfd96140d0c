import gc
import subprocess
import sys

import pytest

from service.imports import without_garbage_collection


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
def test_a_command_collects_no_garbage_before_its_modules_are_loaded() -> None:
    code = """
import gc, sys
gc.callbacks.append(lambda phase, info: print(phase, "torch" in sys.modules and "core" not in sys.modules))
from service.cli.main import app
app(["kernels", "sobel_x"])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "start False" in output, "the callback works"
    assert "start True" not in output, "no collection while torch is imported"
