"""Tests of the client address, prefix, scheme and host that trusted proxies report."""

import re
from typing import Any

import pytest

from service.configuration.settings import Settings, SettingsError, load_settings
from service.server.forwarding import MAX_FORWARDED_HOPS, ProxyOptions, is_valid_prefix, parse_trusted_proxies

PROXIES = parse_trusted_proxies("127.0.0.1, 10.0.0.0/8, 2001:db8::/32")


def apply(
    *headers: tuple[str, str],
    path: str = "/correlate",
    peer: str | None = "127.0.0.1",
    options: ProxyOptions = ProxyOptions(trusted=PROXIES),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Return the scope of a request with these headers after the options have been applied."""
    fields = [(b"host", b"internal:8000"), *((name.encode(), value.encode("latin-1")) for name, value in headers)]
    scope = {
        "type": "http",
        "client": None if peer is None else (peer, 4711),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "headers": fields,
    }
    options.apply(scope)
    return scope


def find_client(*values: str, peer: str | None = "127.0.0.1", options: ProxyOptions | None = None) -> str:
    headers = [("x-forwarded-for", value) for value in values]
    client: str = apply(*headers, peer=peer, options=options or ProxyOptions(trusted=PROXIES))["client"][0]
    return client


@pytest.mark.parametrize(
    ("values", "client"),
    [
        (["192.0.2.7"], "192.0.2.7"),
        (["6.6.6.6, 192.0.2.7"], "192.0.2.7"),
        (["6.6.6.6, 192.0.2.7, 10.1.2.3"], "192.0.2.7"),
        (["6.6.6.6", "192.0.2.7", "10.1.2.3, 10.1.2.4"], "192.0.2.7"),
        (["10.1.2.3, 10.1.2.4"], "10.1.2.3"),
        (["192.0.2.7:1234"], "192.0.2.7"),
        (["2a00::1"], "2a00::1"),
        (["[2a00::1]:1234"], "2a00::1"),
        (["192.0.2.7,[2001:db8::1]"], "192.0.2.7"),
        (["::ffff:192.0.2.7"], "192.0.2.7"),
    ],
)
def test_client_is_the_rightmost_untrusted_address(values: list[str], client: str) -> None:
    assert find_client(*values) == client


@pytest.mark.parametrize("value", ["", "unknown", "_hidden", "6.6.6.6, nonsense", "6.6.6.6,", "1.2.3", "[::1", "é"])
def test_invalid_address_ends_the_search(value: str) -> None:
    assert find_client(value) == "127.0.0.1"
    assert find_client(f"{value}, 10.1.2.3") == "10.1.2.3"


def test_only_the_last_hops_are_checked() -> None:
    assert find_client("192.0.2.7" + ", 10.0.0.1" * (MAX_FORWARDED_HOPS - 1)) == "192.0.2.7"
    assert find_client("192.0.2.7" + ", 10.0.0.1" * 5000) == "10.0.0.1"


FORGED_HEADERS = (
    ("x-forwarded-for", "6.6.6.6"),
    ("x-forwarded-host", "evil.example"),
    ("x-forwarded-prefix", "/evil"),
    ("x-forwarded-proto", "https"),
)


@pytest.mark.parametrize("peer", ["192.0.2.7", "2a00::1", None])
def test_headers_of_untrusted_peers_are_ignored(peer: str | None) -> None:
    assert apply(*FORGED_HEADERS, peer=peer) == apply(*FORGED_HEADERS, peer=peer, options=ProxyOptions())
    scope = apply(*FORGED_HEADERS, peer=peer)
    assert (scope["scheme"], scope["path"], scope["root_path"]) == ("http", "/correlate", "")
    assert scope["client"] == (None if peer is None else (peer, 4711))
    assert (b"host", b"internal:8000") in scope["headers"]


@pytest.mark.parametrize("peer", ["127.0.0.1", "::ffff:127.0.0.1", "10.9.9.9", "2001:db8::7"])
def test_headers_of_trusted_peers_are_used(peer: str) -> None:
    scope = apply(*FORGED_HEADERS, peer=peer)
    assert (scope["scheme"], scope["path"], scope["root_path"]) == ("https", "/evil/correlate", "/evil")
    assert scope["client"] == ("6.6.6.6", 0)
    assert [value for name, value in scope["headers"] if name == b"host"] == [b"evil.example"]


def test_unix_socket_is_trusted_only_if_listed() -> None:
    options = ProxyOptions(trusted=parse_trusted_proxies("unix"))
    assert find_client("192.0.2.7", peer=None, options=options) == "192.0.2.7"
    assert find_client("192.0.2.7", peer="127.0.0.1", options=options) == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-forwarded-proto", "gopher"),
        ("x-forwarded-proto", "https, http"),
        ("x-forwarded-host", "two words"),
        ("x-forwarded-host", "evil/path"),
        ("x-forwarded-host", ""),
        ("x-forwarded-prefix", "evil"),
        ("x-forwarded-prefix", "//evil.example"),
        ("x-forwarded-prefix", "/a/../b"),
    ],
)
def test_invalid_header_is_ignored(name: str, value: str) -> None:
    assert apply((name, value)) == apply() | {"headers": apply((name, value))["headers"]}


def test_repeated_header_is_ignored() -> None:
    assert apply(("x-forwarded-prefix", "/a"), ("x-forwarded-prefix", "/a"))["root_path"] == ""


@pytest.mark.parametrize("prefix", ["/corr2d", "/api/v1/corr2d", "/~me", "/a.b", "/..."])
def test_valid_prefix_is_accepted(prefix: str) -> None:
    assert Settings(root_path=prefix).proxy_options.root_path == prefix


@pytest.mark.parametrize(
    "prefix",
    ["", "/", "corr2d", "/corr2d/", "//corr2d", "/a//b", "/..", "/a/./b", "/a b", "/é", "/%41", "/a\n", "/a?b"],
)
def test_invalid_prefix_is_rejected(prefix: str) -> None:
    assert not is_valid_prefix(prefix)
    with pytest.raises(SettingsError, match="not a valid path prefix: use segments of letters") as caught:
        load_settings(root_path=prefix)
    assert "\n" not in str(caught.value)


def test_long_prefix_is_rejected() -> None:
    assert not is_valid_prefix("/" + "a" * 1000)


@pytest.mark.parametrize(
    ("path", "full_path"),
    [
        ("/corr2d/correlate", "/corr2d/correlate"),
        ("/correlate", "/corr2d/correlate"),
        ("/corr2d", "/corr2d/"),
        ("/corr2d/", "/corr2d/"),
        ("/", "/corr2d/"),
        ("/corr2dx", "/corr2d/corr2dx"),
    ],
)
def test_prefix_is_added_unless_the_path_has_it(path: str, full_path: str) -> None:
    for options in (ProxyOptions("/corr2d"), ProxyOptions(trusted=PROXIES)):
        scope = apply(("x-forwarded-prefix", "/corr2d"), path=path, options=options)
        assert (scope["root_path"], scope["path"]) == ("/corr2d", full_path)
        # As in the request, if that has the prefix without a slash.
        assert scope["raw_path"] == (path if path == "/corr2d" else full_path).encode()


def test_setting_takes_precedence_over_the_header() -> None:
    scope = apply(("x-forwarded-prefix", "/evil"), options=ProxyOptions("/corr2d", PROXIES))
    assert (scope["root_path"], scope["path"]) == ("/corr2d", "/corr2d/correlate")


@pytest.mark.parametrize(
    ("proxies", "message"),
    [
        ("localhost", "'localhost' is not valid: use an address such as 10.0.0.7"),
        ("10.0.0.1/8", "'10.0.0.1/8' has bits set to the right of its mask"),
        ("10.0.0.1,", "'' is not valid"),
        ("*", "'*' is not valid"),
        ("unix", "CORR2D_TRUSTED_PROXIES contains unix, which requires CORR2D_UDS"),
    ],
)
def test_invalid_trusted_proxies_are_rejected(proxies: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_settings(trusted_proxies=proxies)
