from pathlib import Path

import pytest
import torch

import core
from core.device import require_dtype_support, usable_cores, usable_memory


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


CGROUP_V1_FILES = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def write_cgroup(folder: Path, files: dict[str, str]) -> Path:
    (folder / "cpu").mkdir()
    (folder / "memory").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu.max": "99900000 100000\n"}, None),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        (dict(zip(CGROUP_V1_FILES, ("-1\n", "100000\n"), strict=True)), None),
        (dict(zip(CGROUP_V1_FILES, ("50000\n", "100000\n"), strict=True)), 1),
    ],
)
def test_cores_follow_the_container_limit(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    without_quota = usable_cores(tmp_path / "none")
    assert without_quota >= 1
    assert usable_cores(write_cgroup(tmp_path, files)) == (cores or without_quota)


def test_quota_between_two_cores_is_rounded_up(tmp_path: Path) -> None:
    without_quota = usable_cores(tmp_path / "none")
    assert usable_cores(write_cgroup(tmp_path, {"cpu.max": "150000 100000\n"})) == min(2, without_quota)


@pytest.mark.parametrize("files", [{"memory.max": "1000000\n"}, {"memory/memory.limit_in_bytes": "1000000\n"}])
def test_memory_follows_the_container_limit(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_memory(write_cgroup(tmp_path, files)) == 10**6


@pytest.mark.parametrize("files", [{"memory.max": "max\n"}, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}])
def test_without_a_limit_memory_is_the_machine_total(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_memory(write_cgroup(tmp_path, files)) == usable_memory(tmp_path / "none") > 10**8
