"""Addresses: "host:port", as both sides and the command line take them, and URLs, as messages may show them."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from tidelog._errors import InvalidValue

_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})", re.ASCII)
_PORT_MAX: Final = 65_535
# A password that should have been escaped ends at the last "@".
_PASSWORD: Final = re.compile(r"(://[^:@/?]*):.*@")


def check_address(text: str) -> str:
    """
    Return *text* if it is "host:port"; an IPv6 host stands in brackets.

    Raises:
        InvalidValue: It is not.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > _PORT_MAX:
        raise InvalidValue(f"an address is HOST:PORT, got {text!r}")
    return text


def host_of(address: str) -> str:
    """Return the host of a checked address."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine for sure. A name other than localhost may be anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_secrets(place: str) -> str:
    """Return a URL without a password and without its options, one of which may be a password too."""
    return _PASSWORD.sub(r"\1@", place.partition("?")[0]) if "://" in place else place
