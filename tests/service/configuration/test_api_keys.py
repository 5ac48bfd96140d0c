"""Tests of API keys from the setting and from a key file that changes."""

import os
import pickle
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import LogCapture

from service.app import create_app
from service.configuration.api_keys import InvalidKeys, KeyRing, read_keys
from service.configuration.settings import Settings
from tests.servers import serve_in_process
from tests.service.locked_app import ALICE_KEY, BOB_KEY, CAROL_KEY, WRONG_KEY


@pytest.fixture
def fast_key_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the key file for changes more often than in production."""
    monkeypatch.setattr("service.configuration.api_keys.KEY_FILE_CHECK_INTERVAL_S", 0.2)


def wait_for(right: Any) -> bool:
    deadline = time.monotonic() + 10
    while not right() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(right())


@pytest.mark.robustness(60)
def test_keys_of_both_sources_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(CAROL_KEY)
    ring = KeyRing(f"{ALICE_KEY},{BOB_KEY}", file)
    for key, right in (
        (ALICE_KEY, True),
        (BOB_KEY, True),
        (CAROL_KEY, True),
        (WRONG_KEY, False),
        ("", False),
        ("x" * 9999, False),
    ):
        assert (ring.find_name(key.encode()) is not None) is right


def test_keys_are_stored_as_hashes_only() -> None:
    ring = KeyRing(f"{ALICE_KEY},{BOB_KEY}", None)
    held = repr(vars(ring))
    assert ALICE_KEY not in held
    assert repr(sha256(ALICE_KEY.encode()).digest()) in held


def test_keys_rotate_while_the_service_runs(fast_key_polling: None, tmp_path: Path, log: LogCapture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\n{ALICE_KEY}  # Alice\n\t{BOB_KEY}\r\n")

    def may(key: str) -> bool:
        return send("GET", "/info", headers={"X-API-Key": key}).status_code == 200

    with serve_in_process(
        create_app(Settings(device="cpu", api_keys=SecretStr(CAROL_KEY), api_keys_file=file))
    ) as send:
        assert [may(key) for key in (ALICE_KEY, BOB_KEY, CAROL_KEY, WRONG_KEY)] == [True, True, True, False]
        file.write_text(f"{BOB_KEY}\n{WRONG_KEY}\n")
        assert wait_for(lambda: not may(ALICE_KEY))
        assert [may(key) for key in (BOB_KEY, CAROL_KEY, WRONG_KEY)] == [True, True, True]
        (tmp_path / "new").write_text(f"{ALICE_KEY}\n")
        (tmp_path / "new").replace(file)
        assert wait_for(lambda: may(ALICE_KEY))
        assert [may(key) for key in (BOB_KEY, CAROL_KEY, WRONG_KEY)] == [False, True, False]
    read = [line for line in log.entries if line["event"] == "API keys read again"]
    assert [line["keys"] for line in read] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "folder", "huge", "pipe"])
def test_last_valid_keys_are_kept_if_the_file_is_invalid(
    fast_key_polling: None, tmp_path: Path, log: LogCapture, damage: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE_KEY)
    ring = KeyRing(None, file)
    file.unlink()
    match damage:
        case "empty":
            file.write_text("# none\n")
        case "half":
            file.write_text(f"{BOB_KEY}\n{CAROL_KEY[:10]}")
        case "folder":
            file.mkdir()
        case "huge":
            file.write_text(f"{BOB_KEY}\n" * 50_000)
        case "pipe":
            os.mkfifo(file)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert ring.find_name(ALICE_KEY.encode())
        assert not ring.find_name(BOB_KEY.encode())
        time.sleep(0.05)
    (warning,) = log.entries
    assert warning["log_level"] == "warning"
    assert "the last ones stay" in warning["event"]
    assert BOB_KEY not in str(warning)
    assert CAROL_KEY[:10] not in str(warning)
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_text(BOB_KEY)
    assert wait_for(lambda: ring.find_name(BOB_KEY.encode()))
    assert not ring.find_name(ALICE_KEY.encode())


def test_key_file_being_written_is_read_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.configuration.api_keys.KEY_FILE_CHECK_INTERVAL_S", 0.5)
    file = tmp_path / "keys"
    file.write_text(ALICE_KEY)
    ring = KeyRing(None, file)
    time.sleep(0.6)
    half = CAROL_KEY[:18]
    file.write_text(half)
    assert not ring.find_name(half.encode())
    file.write_text(CAROL_KEY)
    assert not ring.find_name(half.encode())
    assert wait_for(lambda: ring.find_name(CAROL_KEY.encode()))
    assert not ring.find_name(half.encode())


def test_key_file_is_not_checked_on_every_request(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE_KEY)
    ring = KeyRing(None, file)
    file.unlink()
    start = time.monotonic()
    for _ in range(1000):
        ring.find_name(WRONG_KEY.encode())
    assert time.monotonic() - start < 0.9, "this machine is too busy for the measurement"
    assert ring.last_problem is None


def test_keys_have_the_names_of_their_entries(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{BOB_KEY}\nteam-b_2:{CAROL_KEY}  # Carol\n")
    ring = KeyRing(f"alice:{ALICE_KEY}, {WRONG_KEY}", file)
    names = {ALICE_KEY: "alice", WRONG_KEY: "key 2", BOB_KEY: "line 2", CAROL_KEY: "team-b_2"}
    for key, name in names.items():
        assert ring.find_name(key.encode()) == name
    assert ring.find_name(f"alice:{ALICE_KEY}".encode()) is None
    # Only the first colon separates.
    assert KeyRing(f"a:b:{ALICE_KEY}", None).find_name(f"b:{ALICE_KEY}".encode()) == "a"


@pytest.mark.parametrize(
    "entry", [f":{ALICE_KEY}", f"two words:{ALICE_KEY}", f"é:{ALICE_KEY}", f"{'n' * 65}:{ALICE_KEY}"]
)
def test_invalid_name_is_rejected_and_not_shown(entry: str) -> None:
    with pytest.raises(InvalidKeys, match="key 2 is not a valid key: the text before the first colon") as caught:
        KeyRing(f"{BOB_KEY},{entry}", None)
    assert ALICE_KEY not in str(caught.value)
    assert "words" not in str(caught.value)


def test_another_process_starts_with_the_last_valid_keys(tmp_path: Path, log: LogCapture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE_KEY}")
    ring = KeyRing(None, file)
    file.write_text("damaged")
    ring.reload()
    assert ring.last_problem is not None
    passed: KeyRing = pickle.loads(pickle.dumps(ring))  # noqa: S301 - it is ours
    assert passed.find_name(ALICE_KEY.encode()) == "alice"
    file.write_text(BOB_KEY)
    passed.reload()
    assert passed.find_name(BOB_KEY.encode()) == "line 1"
    assert passed.find_name(ALICE_KEY.encode()) is None
    assert [line["log_level"] for line in log.entries] == ["warning", "info"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no key"),
        (b"# only\n  # comments\n", "contains no key"),
        (b"too-short\n", "line 1 is not a valid key: a key has 16 to 256"),
        (f"{ALICE_KEY}\n{BOB_KEY} {CAROL_KEY}\n".encode(), "line 2 is not a valid key"),
        (f"{ALICE_KEY},{BOB_KEY}\n".encode(), "line 1 is not a valid key"),
        ("schlüssel-0123456789".encode(), "line 1 is not a valid key"),
        (b"\x00\xff" * 20, "line 1 is not a valid key"),
        (b"x" * 257, "line 1 is not a valid key"),
    ],
)
def test_key_file_without_keys_is_rejected_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(InvalidKeys, match=message):
        read_keys(file)


def test_bom_and_crlf_are_not_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"\ufeff{ALICE_KEY}\r\n{BOB_KEY}#x # Köln\r\n".encode())
    ring = KeyRing(None, file)
    assert ring.find_name(ALICE_KEY.encode())
    assert ring.find_name(f"{BOB_KEY}#x".encode())
