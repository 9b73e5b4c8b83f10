"""Addresses: "host:port", as both sides and the command line take them."""

from __future__ import annotations

import re
from typing import Final

from tidelog._errors import InvalidValue

_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})", re.ASCII)
_PORT_MAX: Final = 65_535


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
