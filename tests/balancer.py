"""A balancer for tests: one address for several servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import cycle

from tidelog.testing import Proxy


class Balancer(Proxy):
    """Leads each new connection to the next server, whether that is there or not."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._targets = cycle(targets)
        super().__init__(next(self._targets))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.target = next(self._targets)
        await super()._accept(reader, writer)
