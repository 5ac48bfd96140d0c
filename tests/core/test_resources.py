from pathlib import Path

import pytest

from core.resources import usable_cores, usable_memory

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
