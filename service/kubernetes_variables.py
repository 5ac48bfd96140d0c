"""Variables that Kubernetes sets for Services named corr2d or corr2d-..., whose names look like settings.

Reference: Kubernetes documentation, "Service", section "Environment variables".
"""

import re
from ipaddress import ip_address

PATTERN = re.compile(
    r"CORR2D(?:_[A-Z0-9]+)*?_"
    r"(?:SERVICE_(?P<host>HOST)|SERVICE_(?P<number>PORT(?:_[A-Z0-9_]+)?)"
    r"|PORT(?:_(?P<port>[0-9]+)_(?P<protocol>TCP|UDP|SCTP)(?:_(?P<part>ADDR|PORT|PROTO))?)?)"
)
URL_PATTERN = re.compile(r"(?P<protocol>tcp|udp|sctp)://(?P<address>[^/]+):(?P<port>[0-9]{1,5})")


def is_kubernetes_variable(name: str, value: str) -> bool:
    """Return whether Kubernetes sets a variable of this name to such a value: an address, port, URL or protocol."""
    match = PATTERN.fullmatch(name)
    if match is None:
        return False
    port, protocol, part = match["port"], (match["protocol"] or "").lower(), match["part"]
    if match["host"] or part == "ADDR":
        return _is_address(value)
    if match["number"]:
        return value.isdecimal()
    if part == "PORT":
        return value == port
    if part == "PROTO":
        return value == protocol
    url = URL_PATTERN.fullmatch(value)
    return (
        url is not None
        and _is_address(url["address"])
        and port in (None, url["port"])
        and protocol in ("", url["protocol"])
    )


def _is_address(text: str) -> bool:
    try:
        return bool(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False
