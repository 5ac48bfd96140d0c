from pathlib import Path

import pytest
import torch

import core
from core.device import require_dtype, usable_cores


def test_auto_takes_the_first_of_the_devices_that_are_there() -> None:
    assert str(core.resolve_device("auto")) == core.available_devices()[0]
    assert core.available_devices()[-1] == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "", "CPU", "cpu:1", "cuda:-1", "meta"])
def test_a_device_that_is_not_there_names_those_that_are(name: str) -> None:
    with pytest.raises(core.DeviceUnavailable) as caught:
        core.resolve_device(name)
    for device in core.available_devices():
        assert device in str(caught.value)
    assert caught.value.got == name


def test_every_device_is_described() -> None:
    assert [entry["device"] for entry in core.describe_devices()] == core.available_devices()


def test_mps_has_no_float64() -> None:
    require_dtype(torch.device("cpu"), torch.float64)
    require_dtype(torch.device("mps"), torch.float32)
    with pytest.raises(core.InvalidOption, match='use dtype "float32" or device "cpu"'):
        require_dtype(torch.device("mps"), torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_gives_the_cpus_answer_and_leaves_tf32_as_it_was() -> None:
    before = torch.backends.cudnn.allow_tf32
    image, kernel = torch.randn(200, 200), torch.randn(7, 7)
    on_cuda = core.correlate(image, kernel, device="cuda")
    torch.testing.assert_close(on_cuda.output.cpu(), core.correlate(image, kernel, device="cpu").output)
    assert on_cuda.device == "cuda:0"
    assert torch.backends.cudnn.allow_tf32 == before


def quota(folder: Path, text: str) -> Path:
    path = folder / "cpu.max"
    path.write_text(text)
    return path


def test_the_cores_are_those_that_the_container_may_use(tmp_path: Path) -> None:
    cores = usable_cores(tmp_path / "no such file")
    assert cores >= 1
    assert usable_cores(quota(tmp_path, "max 100000\n")) == cores
    assert usable_cores(quota(tmp_path, "100000 100000\n")) == 1
    assert usable_cores(quota(tmp_path, "50000 100000\n")) == 1
    assert usable_cores(quota(tmp_path, "99900000 100000\n")) == cores
    assert usable_cores(quota(tmp_path, "nonsense")) == cores
