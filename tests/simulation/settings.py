"""What a seed draws once: how many take part, what the application is, and how small the limits are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random
from typing import Final
from unittest import mock

from tests.simulation.application import ENTITIES, Business

from tidelog import _log
from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog.v1 import sync_pb2
from tidelog_client import (
    _file_exchange,
    _files,
    _publication,
    _storage,
    _synchronization,
    _transfer,
    _view,
)
from tidelog_client._file_wishes import FileDownload, FileMode
from tidelog_server import _collection, _content_store, _download, _engine, _overlay, _session, _sightings
from tidelog_server._retention import Periods

MIB: Final = 1024 * 1024
COPIES_SHARE: Final = 0.25
FILES_SHARE: Final = 0.33
CONSENT_SHARE: Final = 0.4
CONTENTION_SHARE: Final = 0.15
NEVER: Final = timedelta(days=100_000)


@dataclass(frozen=True)
class FileSettings:
    """
    What a seed draws for worlds with files.

    Attributes:
        wishes: Which contents each replica wants, by entity.
        grace: How long the server keeps contents that nothing refers to.
        bytes_max: How large a content may be.
        limits: How small the limits are.
    """

    wishes: tuple[Mapping[str, FileDownload], ...]
    grace: timedelta
    bytes_max: int
    limits: dict[str, int]

    @classmethod
    def drawn(cls, random: Random, replica_count: int) -> FileSettings:
        """Draw settings."""
        return cls(
            tuple(_file_wishes(random) for _ in range(replica_count)),
            random.choice([timedelta(0), timedelta(microseconds=300), timedelta(days=1)]),
            random.choices([300, FILE_BYTES_MAX_DEFAULT], [1, 3])[0],
            {
                "chunk": random.choice([16, 100, MIB]),
                "small_uploads": random.choice([0, 200, 4 * MIB]),
                "step": random.choice([1, 3, 1_000]),
                "noted": random.choice([1, 3, 500]),
                "grace_seconds": random.choice([0, 3_600]),
                "session_seconds": random.choice([0, 2]),
            },
        )

    def names(self) -> Iterator[str]:
        """Name what was drawn."""
        yield "files"
        modes = {str(one.mode) for wishes in self.wishes for one in wishes.values()}
        yield from (f"files {mode}" for mode in sorted(modes - {FileMode.EAGER}))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the limits in force."""
        limits = self.limits
        with ExitStack() as stack:
            for module, name, value in (
                (_transfer, "UPLOAD_CHUNK_BYTES", limits["chunk"]),
                (_content_store, "FILE_CHUNK_BYTES", limits["chunk"]),
                (_file_exchange, "SMALL_UPLOADS_BYTES", limits["small_uploads"]),
                (_file_exchange, "SESSION_SECONDS", limits["session_seconds"]),
                (_file_exchange, "NOTED_AT_ONCE", limits["noted"]),
                (_transfer, "FILES_STAT_MAX", limits["step"]),
                (_files, "LOOK_STEP_OBJECTS", limits["step"]),
                (_files, "COLLECT_STEP_CONTENTS", limits["step"]),
                (_files, "SCAN_PAGE_KEYS", limits["step"]),
                (_files, "GRACE_SECONDS", limits["grace_seconds"]),
                (_collection, "STEP_ENTRIES", limits["step"]),
                # Years pass here in an instant.
                (_sightings, "UNSEEN_MAX", NEVER),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield


def _file_wishes(random: Random) -> dict[str, FileDownload]:
    if random.random() < 0.4:
        return {}
    return {
        entity: FileDownload(random.choice(["eager", "lazy", "never"]), random.choice([None, None, 100]))
        for entity in ENTITIES
        if random.random() < 0.5
    }


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
    consents_at_once: bool = True
    files: FileSettings | None = None

    @classmethod
    def drawn(cls, random: Random, *, copies_focus: float = 1.0) -> Settings:
        """
        Draw settings: small limits reach in a few steps what takes a million objects otherwise.

        Args:
            random: The dice.
            copies_focus: How much more often than usual directories are copied and stores put back.
        """
        replica_count = random.randint(1, 4)
        has_copies = random.random() < COPIES_SHARE * copies_focus
        history = random.choice([timedelta(0), timedelta(microseconds=200), timedelta(days=30)])
        return cls(
            replica_count,
            tuple(random.choices([1, 2], [4, 1])[0] for _ in range(replica_count)),
            random.choice([256 * 1024, 1024 * MIB]),
            random.choice([256 * 1024, 1024 * MIB]),
            random.random() < 0.3,
            random.random() < 0.3,
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

    def with_files(self, random: Random) -> Settings:
        """Return the settings of a world in which there may be files; *random* draws nothing else."""
        if random.random() >= FILES_SHARE:
            return self
        return replace(self, files=FileSettings.drawn(random, self.replica_count))

    @property
    def has_restless_files(self) -> bool:
        """Whether a synchronization that waits for contents looks at the server again and again, without a pause."""
        return self.files is not None and not self.files.limits["session_seconds"]

    def with_guard(self, random: Random) -> Settings:
        """Return the settings of a world with some way to deal with the loss of most of an entity; see above."""
        limits = {**self.limits, "removed_unasked": random.choices([0, 1, 3, 20], [3, 2, 1, 1])[0]}
        return replace(self, limits=limits, consents_at_once=random.random() < CONSENT_SHARE)

    def with_contention(self, random: Random, *, focus: float = 1.0) -> Settings:
        """
        Return the settings of a world in which all may work on the same few objects; see above.

        Args:
            random: The dice.
            focus: How much more often than usual they do.
        """
        if random.random() >= CONTENTION_SHARE * focus:
            return self
        return replace(self, business=Business.contended(random))

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
                (_publication, "GUARD_OBJECTS_AT_ONCE", limits["publish_pages"]),
                (_publication, "GUARD_BITS_PER_OBJECT", limits["publish_pages"]),
                (_publication, "PUBLISH_STEP_PAGES", limits["publish_pages"]),
                (_publication, "MERGE_STEP_PAGES", limits["publish_pages"]),
                (_publication, "END_STEP_OBJECTS", limits["publish_pages"]),
                (_publication, "REMOVED_OBJECTS_UNASKED", limits["removed_unasked"]),
                (_storage, "READ_PAGE_ENTRIES", limits["replica_page"]),
                (_view, "PAGE_OBJECTS", limits["replica_page"]),
                (_log, "_SCAN_PAGE_ENTRIES", limits["replica_page"]),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            if self.files is not None:
                stack.enter_context(self.files.applied())
            yield
