"""What a seed draws once: how many take part, what the application is, and how small the limits are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Final
from unittest import mock

from tests.simulation.application import Business

from tidelog import _log
from tidelog.v1 import sync_pb2
from tidelog_client import _publication, _storage, _synchronization, _view
from tidelog_server import _download, _engine, _overlay, _session
from tidelog_server._retention import Periods

MIB: Final = 1024 * 1024
COPIES_SHARE: Final = 0.25
NEVER: Final = timedelta(days=100_000)


@dataclass(frozen=True)
class Settings:
    """
    What a seed draws once: how many replicas, and how small the limits are.

    Where directories are copied and stores put back, replicas may be retired too: who is, goes on as a copy does.
    """

    replica_count: int
    schema_versions: tuple[int, ...]
    server_map_bytes: int
    replica_map_bytes: int
    is_hasty: bool
    has_third_party: bool
    has_copies: bool
    periods: Periods
    business: Business
    limits: dict[str, int]

    @classmethod
    def drawn(cls, random: Random) -> Settings:
        """Draw settings: small limits reach in a few steps what takes a million objects otherwise."""
        replica_count = random.randint(1, 4)
        has_copies = random.random() < COPIES_SHARE
        history = random.choice([timedelta(0), timedelta(microseconds=200), timedelta(days=30)])
        return cls(
            replica_count,
            tuple(random.choices([1, 2], [4, 1])[0] for _ in range(replica_count)),
            random.choice([256 * 1024, 1024 * MIB]),
            random.choice([256 * 1024, 1024 * MIB]),
            random.random() < 0.3,
            random.random() < 0.3 and not has_copies,
            has_copies,
            Periods(history, random.choice([timedelta(days=300), NEVER]) if has_copies else NEVER),
            Business.drawn(random),
            {
                "batch_operations": random.choice([1, 2, 5, 500]),
                "batches_in_flight": random.choice([1, 2, 4]),
                "download_page": random.choice([1, 2, 5, 1_000]),
                "catch_up_rounds": random.choice([1, 3]),
                "held_units": random.choices([1, 3, 10_000], [1, 1, 6])[0],
                "server_scan_page": random.choice([1, 3, 500]),
                "stage_bytes": random.choice([1, 300, 8 * MIB]),
                "publish_objects": random.choice([0, 3, 100_000]),
                "publish_pages": random.choice([1, 2, 20]),
                "replica_page": random.choice([1, 3, 500]),
                "selection_keys": random.choice([1, 5_000]),
            },
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the limits in force."""
        limits = self.limits
        message = sync_pb2.Limits()
        message.CopyFrom(_session.LIMITS)
        message.batch_operation_count = limits["batch_operations"]
        message.batches_in_flight = limits["batches_in_flight"]
        with ExitStack() as stack:
            for module, name, value in (
                (_session, "LIMITS", message),
                (_download, "PAGE_OBJECTS_MAX", limits["download_page"]),
                (_download, "CATCH_UP_ROUNDS_MAX", limits["catch_up_rounds"]),
                (_engine, "HELD_UNITS_MAX", limits["held_units"]),
                (_overlay, "_SCAN_PAGE_OBJECTS", limits["server_scan_page"]),
                (_synchronization, "STAGE_BYTES", limits["stage_bytes"]),
                (_synchronization, "SELECTION_KEYS_A_MESSAGE", limits["selection_keys"]),
                (_publication, "PUBLISH_OBJECTS_MAX", limits["publish_objects"]),
                (_publication, "PUBLISH_STEP_PAGES", limits["publish_pages"]),
                (_publication, "MERGE_STEP_PAGES", limits["publish_pages"]),
                (_publication, "END_STEP_OBJECTS", limits["publish_pages"]),
                (_storage, "READ_PAGE_ENTRIES", limits["replica_page"]),
                (_view, "PAGE_OBJECTS", limits["replica_page"]),
                (_log, "_SCAN_PAGE_ENTRIES", limits["replica_page"]),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield
