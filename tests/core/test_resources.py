"""Tests of the cores and the memory that a process may use, with a file system in a temporary folder."""

from pathlib import Path

import pytest

from core.resources import usable_cores, usable_memory

CGROUP_V1_FILES = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def write_cgroups(root: Path, files: dict[str, str], membership: str | None = None) -> Path:
    """Write files of cgroups, and the list of those of this process."""
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if membership is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(membership)
    return root


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
    assert usable_cores(write_cgroups(tmp_path, files)) == (cores or without_quota)


def test_quota_between_two_cores_is_rounded_up(tmp_path: Path) -> None:
    without_quota = usable_cores(tmp_path / "none")
    assert usable_cores(write_cgroups(tmp_path, {"cpu.max": "150000 100000\n"})) == min(2, without_quota)


@pytest.mark.parametrize("files", [{"memory.max": "1000000\n"}, {"memory/memory.limit_in_bytes": "1000000\n"}])
def test_memory_follows_the_container_limit(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_memory(write_cgroups(tmp_path, files)) == 10**6


@pytest.mark.parametrize("files", [{"memory.max": "max\n"}, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}])
def test_without_a_limit_memory_is_the_machine_total(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_memory(write_cgroups(tmp_path, files)) == usable_memory(tmp_path / "none") > 10**8


SYSTEMD_LIST = "0::/system.slice/corr2d.service\n"
SLURM_V1_LIST = """\
5:memory:/slurm/uid_1000/job_7/step_0
4:cpu,cpuacct:/slurm/uid_1000/job_7/step_0
1:name=systemd:/system.slice/slurmd.service
0::/system.slice/slurmd.service
"""
JOB = "slurm/uid_1000/job_7"


@pytest.mark.parametrize(
    ("membership", "files", "memory"),
    [
        (SYSTEMD_LIST, {"system.slice/corr2d.service/memory.max": "3000000"}, 3_000_000),
        (
            SYSTEMD_LIST,
            {"system.slice/corr2d.service/memory.max": "max", "system.slice/memory.max": "2000000"},
            2_000_000,
        ),
        (
            SYSTEMD_LIST,
            {"system.slice/corr2d.service/memory.max": "3000000", "system.slice/memory.max": "4000000"},
            3_000_000,
        ),
        (SYSTEMD_LIST, {"user.slice/memory.max": "1000000", "memory.max": "2000000"}, 2_000_000),
        (SLURM_V1_LIST, {f"memory/{JOB}/memory.limit_in_bytes": "2000000"}, 2_000_000),
        (
            SLURM_V1_LIST,
            {
                f"memory/{JOB}/step_0/memory.limit_in_bytes": "9223372036854771712",
                f"memory/{JOB}/memory.limit_in_bytes": "2000000",
                "memory/slurm/memory.limit_in_bytes": "5000000",
            },
            2_000_000,
        ),
        # The path on the host, in a container without a cgroup namespace.
        ("9:memory:/docker/0123abcd\n", {"memory/memory.limit_in_bytes": "2000000"}, 2_000_000),
        ("0::/../job/step\n", {"job/step/memory.max": "2000000"}, 2_000_000),
        ("0::/\n", {"memory.max": "2000000"}, 2_000_000),
        ("nonsense\n\n", {"memory.max": "2000000"}, 2_000_000),
    ],
)
def test_memory_limits_of_all_ancestors_apply(
    tmp_path: Path, membership: str, files: dict[str, str], memory: int
) -> None:
    assert usable_memory(write_cgroups(tmp_path, files, membership)) == memory


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        (SYSTEMD_LIST, {"system.slice/cpu.max": "100000 100000", "system.slice/corr2d.service/cpu.max": "max 100000"}),
        (SLURM_V1_LIST, {f"cpu/{JOB}/cpu.cfs_quota_us": "100000", f"cpu/{JOB}/cpu.cfs_period_us": "100000"}),
    ],
)
def test_core_quotas_of_all_ancestors_apply(tmp_path: Path, membership: str, files: dict[str, str]) -> None:
    assert usable_cores(write_cgroups(tmp_path, files, membership)) == 1
