"""Variables that Kubernetes sets for Services named corr2d or corr2d-..., whose names look like settings.

Reference: Kubernetes documentation, "Service", section "Environment variables".
"""

import re
from ipaddress import ip_address

SERVICE_NAME = r"CORR2D(?:_+[A-Z0-9]+)*?"
LINK_NAME = SERVICE_NAME + r"_PORT_(?P<port>[0-9]+)_(?P<protocol>TCP|UDP|SCTP)"
ADDRESS_NAME_PATTERN = re.compile(rf"{SERVICE_NAME}_SERVICE_HOST|{LINK_NAME}_ADDR")
NUMBER_NAME_PATTERN = re.compile(rf"{SERVICE_NAME}_SERVICE_PORT(?:_[A-Z0-9_]+)?")
URL_NAME_PATTERN = re.compile(rf"{SERVICE_NAME}_PORT")
LINK_URL_NAME_PATTERN = re.compile(LINK_NAME)
LINK_PART_NAME_PATTERN = re.compile(rf"{LINK_NAME}_(?P<part>PORT|PROTO)")
URL_PATTERN = re.compile(r"(?P<protocol>tcp|udp|sctp)://(?P<address>[^/]+):(?P<port>[0-9]{1,5})")


def is_kubernetes_variable(name: str, value: str) -> bool:
    """Return whether Kubernetes sets a variable of this name to such a value: an address, port, URL or protocol.

    A name may have several meanings: CORR2D_SERVICE_PORT is the port of the Service corr2d, or the URL of the Service
    corr2d-service.
    """
    return (
        (ADDRESS_NAME_PATTERN.fullmatch(name) is not None and _is_address(value))
        or (NUMBER_NAME_PATTERN.fullmatch(name) is not None and value.isdecimal())
        or (URL_NAME_PATTERN.fullmatch(name) is not None and _is_url(value))
        or ((link := LINK_URL_NAME_PATTERN.fullmatch(name)) is not None and _is_url(value, link))
        or ((link := LINK_PART_NAME_PATTERN.fullmatch(name)) is not None and value == _get_part(link))
    )


def _get_part(link: re.Match[str]) -> str:
    return link["port"] if link["part"] == "PORT" else link["protocol"].lower()


def _is_url(value: str, link: re.Match[str] | None = None) -> bool:
    """Return whether the value is the URL of a Service, with the port and protocol in the name of the variable."""
    url = URL_PATTERN.fullmatch(value)
    if url is None or not _is_address(url["address"]):
        return False
    return link is None or (url["port"], url["protocol"]) == (link["port"], link["protocol"].lower())


def _is_address(text: str) -> bool:
    try:
        return bool(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False
