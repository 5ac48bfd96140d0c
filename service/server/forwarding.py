"""Requests through a proxy: the path prefix of the service, and the X-Forwarded-* headers of trusted proxies."""

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from service.server.request_checks import HOST_PATTERN

UNIX_PEER = "unix"
"""Name of the clients that connect to a Unix socket, in CORR2D_TRUSTED_PROXIES."""

PREFIX_PATTERN = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")
"""Path prefix: segments of unreserved characters (RFC 3986, 2.3), so that no encoding changes them."""

MAX_PREFIX_CHARS = 200

MAX_FORWARDED_HOPS = 32
"""Number of addresses in X-Forwarded-For that are checked, from the right."""

FORWARDED_HEADERS = frozenset({b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-prefix", b"x-forwarded-proto"})

ADDRESS_WITH_PORT_PATTERN = re.compile(r"(?P<v4>[0-9.]+):[0-9]{1,5}|\[(?P<v6>[0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")
"""Forms in which some proxies write addresses into X-Forwarded-For."""

Address = IPv4Address | IPv6Address
Headers = Iterable[tuple[bytes, bytes]]

Scope = MutableMapping[str, Any]
"""ASGI scope of a request; as in starlette.types, which commands that read the settings do not load."""


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """Addresses whose X-Forwarded-* headers are used. `has_unix_peers`: every client of a Unix socket is trusted."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    has_unix_peers: bool = False

    def __contains__(self, address: Address) -> bool:
        return any(address in network for network in self.networks)

    def is_peer_trusted(self, peer: str | None) -> bool:
        """Return whether the other end of a connection is trusted; a Unix socket has no address (None)."""
        if peer is None:
            return self.has_unix_peers
        address = _parse_address(peer)
        return address is not None and address in self


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """The path prefix of the service, and the proxies that may name one if it is empty, and report their clients."""

    root_path: str = ""
    trusted: TrustedProxies = TrustedProxies()

    def find_prefix(self, peer: str | None, headers: Headers) -> str:
        """Return the path prefix of a request: `root_path`, otherwise X-Forwarded-Prefix of a trusted proxy."""
        return self._choose_prefix(self._read_forwarded_headers(peer, headers))

    def apply(self, scope: Scope) -> None:
        """Set `root_path`, `client` and `scheme` of a request, and its Host header, to those that its client sees.

        `path` contains the prefix afterwards, as ASGI requires, even if the proxy has removed it.
        """
        client = scope.get("client")
        forwarded = self._read_forwarded_headers(client[0] if client else None, scope["headers"])
        prefix = self._choose_prefix(forwarded)
        if prefix:
            _set_prefix(scope, prefix)
        address = self._find_client(forwarded.get(b"x-forwarded-for", ()))
        if address is not None:
            scope["client"] = (address, 0)
        scheme = _get_single(forwarded, b"x-forwarded-proto").lower()
        if scheme in ("http", "https"):
            scope["scheme"] = scheme
        host = _get_single(forwarded, b"x-forwarded-host").encode("latin-1")
        if host and HOST_PATTERN.fullmatch(host):
            scope["headers"] = [(b"host", host), *(field for field in scope["headers"] if field[0] != b"host")]

    def _read_forwarded_headers(self, peer: str | None, headers: Headers) -> dict[bytes, list[bytes]]:
        """Return the values of the X-Forwarded-* headers by name; none if the peer is not a trusted proxy."""
        forwarded: dict[bytes, list[bytes]] = {}
        if self.trusted.is_peer_trusted(peer):
            for name, value in headers:
                if name in FORWARDED_HEADERS:
                    forwarded.setdefault(name, []).append(value)
        return forwarded

    def _choose_prefix(self, forwarded: Mapping[bytes, list[bytes]]) -> str:
        prefix = self.root_path or _get_single(forwarded, b"x-forwarded-prefix")
        return prefix if is_valid_prefix(prefix) else ""

    def _find_client(self, values: Iterable[bytes]) -> str | None:
        """Return the rightmost address that is not a trusted proxy; the last valid one if there is none.

        Each proxy appends the address of its client; the client itself may have sent everything further to the left.
        """
        found = None
        entries = b",".join(values).decode("latin-1").rsplit(",", MAX_FORWARDED_HOPS)
        for entry in reversed(entries[-MAX_FORWARDED_HOPS:]):
            address = _parse_address(entry.strip())
            if address is None:
                break
            found = address
            if address not in self.trusted:
                break
        return None if found is None else str(found)


def is_valid_prefix(prefix: str) -> bool:
    """Return whether a text is a path prefix such as /corr2d or /api/corr2d."""
    return len(prefix) <= MAX_PREFIX_CHARS and PREFIX_PATTERN.fullmatch(prefix) is not None


def parse_trusted_proxies(text: str) -> TrustedProxies:
    """Parse comma-separated addresses, networks and `unix`. Raises ValueError."""
    networks, has_unix_peers = [], False
    for entry in (part.strip() for part in text.split(",")):
        if entry == UNIX_PEER:
            has_unix_peers = True
            continue
        try:
            networks.append(ip_network(entry))
        except ValueError as error:
            reason = "has bits set to the right of its mask" if "host bits" in str(error) else "is not valid"
            raise ValueError(
                f"{entry!r} {reason}: use an address such as 10.0.0.7 or ::1, a network such as 10.0.0.0/8, or "
                f"{UNIX_PEER}"
            ) from error
    return TrustedProxies(tuple(networks), has_unix_peers)


def _parse_address(text: str) -> Address | None:
    """Return an address that may have a port; an IPv4 address that is written as an IPv6 address as the former."""
    with_port = ADDRESS_WITH_PORT_PATTERN.fullmatch(text)
    try:
        address = ip_address(text if with_port is None else with_port["v4"] or with_port["v6"])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _get_single(forwarded: Mapping[bytes, list[bytes]], name: bytes) -> str:
    """Return the value of a header that must occur once, otherwise an empty text: the proxy did not replace it."""
    values = forwarded.get(name, ())
    return values[0].decode("latin-1") if len(values) == 1 else ""


def _set_prefix(scope: Scope, prefix: str) -> None:
    path: str = scope["path"]
    if path == prefix:
        path += "/"  # raw_path stays as received
    elif not path.startswith(prefix + "/"):
        path = prefix + path
        scope["raw_path"] = prefix.encode() + (scope.get("raw_path") or b"")
    scope["path"], scope["root_path"] = path, prefix
