import pytest
import torch

import core
from core.device import require_dtype_support


def test_auto_selects_the_first_available_device() -> None:
    assert str(core.resolve_device("auto")) == core.available_devices()[0]
    assert core.available_devices()[-1] == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "", "CPU", "cpu:1", "cuda:-1", "meta"])
def test_missing_device_error_lists_available_devices(name: str) -> None:
    with pytest.raises(core.DeviceUnavailable) as caught:
        core.resolve_device(name)
    for device in core.available_devices():
        assert device in str(caught.value)
    assert caught.value.got == name


def test_every_device_is_described() -> None:
    assert [entry["device"] for entry in core.describe_devices()] == core.available_devices()


def test_mps_has_no_float64() -> None:
    require_dtype_support(torch.device("cpu"), "float64")
    require_dtype_support(torch.device("mps"), "float32")
    with pytest.raises(core.InvalidOption, match='use dtype "float32" or device "cpu"'):
        require_dtype_support(torch.device("mps"), "float64")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_matches_the_cpu_and_keeps_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    image, kernel = torch.randn(200, 200), torch.randn(7, 7)
    on_cuda = core.correlate(image, kernel, device="cuda")
    torch.testing.assert_close(on_cuda.output.cpu(), core.correlate(image, kernel, device="cpu").output)
    assert on_cuda.device == "cuda:0"
    assert torch.backends.cudnn.allow_tf32 == before
