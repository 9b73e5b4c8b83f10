"""Clocks and random numbers that come from a seed, in the places of those that the product uses."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Protocol
from unittest import mock

import uuid_utils

from tidelog import _contents
from tidelog_client import _commit, _file_exchange, _lineage, _replica, _synchronizer, _transfer
from tidelog_server import _hooks, _lmdb_store, _outcomes, _tenant, _upload_records

UUID_BYTES = 16


class Clocks(Protocol):
    """What time it is where the product runs just now."""

    def time_us(self) -> int:
        """Return the microseconds since 1970 on the clock of the device that acts."""
        ...

    def monotonic(self) -> float:
        """Return the seconds that its process has run."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let the world go on."""
        ...


class _Time:
    """Stands for the module `time`."""

    def __init__(self, clocks: Clocks) -> None:
        self.monotonic = clocks.monotonic
        self.sleep = clocks.sleep
        self._time_us = clocks.time_us

    def time(self) -> float:
        return self._time_us() / 1e6


class _Chance:
    """Stands for the modules `secrets`, `uuid` and `uuid_utils`."""

    UUID = uuid_utils.UUID

    def __init__(self, random: Random) -> None:
        self._random = random
        self._count = 0

    def token_bytes(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def token_hex(self, size: int) -> str:
        return self.token_bytes(size).hex()

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._random.randbytes(UUID_BYTES), version=4)

    def uuid7(self) -> uuid_utils.UUID:
        """Return an id above all that came before, as those of a clock that never stands still are."""
        self._count += 1
        return uuid_utils.UUID(bytes=self._count.to_bytes(6, "big") + b"\x70\0\x80" + self._random.randbytes(7))


@contextmanager
def from_seed(random: Random, clocks: Clocks) -> Iterator[None]:
    """Let nothing that the product does depend on anything but a seed."""
    time, chance = _Time(clocks), _Chance(random)
    with ExitStack() as stack:
        for module, name, value in (
            (_replica, "time", time),
            (_synchronizer, "time", time),
            (_synchronizer, "random", random),
            (_contents, "time", time),
            (_file_exchange, "time", time),
            (_transfer, "time", time),
            (_transfer, "random", random),
            (_commit, "secrets", chance),
            (_lmdb_store, "secrets", chance),
            (_upload_records, "secrets", chance),
            (_lineage, "uuid", chance),
            (_lmdb_store, "uuid", chance),
            (_commit, "uuid_utils", chance),
            (_replica, "uuid_utils", chance),
            (_hooks, "uuid_utils", chance),
            (_outcomes, "uuid_utils", chance),
            (_tenant, "uuid_utils", chance),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
