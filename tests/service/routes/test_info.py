"""Test of /info."""

import re

import pytest

import core
from service.configuration.settings import Settings
from tests.servers import SendFn


@pytest.mark.one_process("compares with the settings and the threads of a whole machine")
def test_info_lists_versions_devices_engines_and_limits(send: SendFn) -> None:
    info = send("GET", "/info").json()
    assert info["engines"] == {name: engine.METHOD for name, engine in core.ENGINES.items()}
    assert [device["device"] for device in info["devices"]] == core.available_devices()
    memory = 0.6 * core.usable_memory() / 1e6
    in_force = {
        "threads": core.usable_cores(),
        "memory_mb": pytest.approx(memory, abs=1),
        "max_compute_mb": pytest.approx(min(2000, memory / 2), abs=1),
    }
    assert info["settings"] == {**Settings(device="cpu").model_dump(), **in_force}
    assert info["threads"] == core.usable_cores()
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
