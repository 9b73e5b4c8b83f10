"""
Stores by what people call them: a directory is an embedded store, a URL is that of a PostgreSQL database.

Everybody who is told where data are comes here. Only a database needs the extra.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Final

from tidelog._environment import Environment
from tidelog._finding import Finding
from tidelog._logging import get_logger
from tidelog_server._content_store import ContentStore
from tidelog_server._errors import ExtraMissing
from tidelog_server._lmdb_backup import Restored
from tidelog_server._lmdb_store import FORMAT, LmdbStore
from tidelog_server._lmdb_verification import verify_directory
from tidelog_server._postgres_store import EXTRA_MISSING, PostgresStore
from tidelog_server._verification import Counts

_SCHEMES: Final = ("postgresql://", "postgres://")

_log = get_logger("tidelog.store")


def is_database(place: str | Path) -> bool:
    """Tell whether something is the URL of a database, and not a directory."""
    return isinstance(place, str) and place.startswith(_SCHEMES)


def open_store(place: str | Path, *, makes: bool = True) -> LmdbStore | PostgresStore:
    """
    Open the store in a directory or a database.

    Args:
        place: The directory, or the URL of the database.
        makes: Whether one is made where there is none.

    Raises:
        ExtraMissing: It is in a database, and the extra is not installed.
        StorageError: It cannot be opened, or is not there.
    """
    if is_database(place):
        if not makes:
            _verification().check_database(str(place))
        return PostgresStore(str(place))
    if not makes:
        Environment.open_read_only(Path(place), format_name=FORMAT).close()
    return LmdbStore(place)


def verify_store(
    place: str | Path, *, counts: Counts | None = None, contents: ContentStore | None = None
) -> Iterator[Finding]:
    """
    Yield what is wrong in a store, or in a backup of an embedded one. Nothing is written.

    Servers may be running on it. Each tenant is read as of one moment: as long as that
    takes, an embedded store grows by what is written meanwhile, and a database cannot
    clean up behind it.

    Args:
        place: The directory, or the URL of the database.
        counts: Gets how many tenants, objects, changes and so on were looked at.
        contents: Where the contents of files lie. None: in the directory; those that are
            kept elsewhere are not looked at.

    Raises:
        ExtraMissing: It is in a database, and the extra is not installed.
        FormatUnsupported: There is something else.
        StorageError: There is nothing, or it cannot be opened.
    """
    counts = Counter() if counts is None else counts
    if is_database(place):
        yield from _verification().verify_database(str(place), counts=counts, contents=contents)
    else:
        yield from verify_directory(Path(place), counts=counts, contents=contents)


def begin_timeline(place: str | Path) -> Restored:
    """
    Begin a new timeline, because the store was put back from an older state by means of its own.

    That is a dump or a base backup of a database, or a copy of a disk. Replicas see from it that the
    history goes on from an earlier point, and offer again what the store lacks.

    Raises:
        ExtraMissing: It is in a database, and the extra is not installed.
        StoreInUse: A server has it open. A database may have servers.
        FormatUnsupported: There is something else.
        StorageError: There is nothing, or it cannot be opened.
    """
    with closing(open_store(place, makes=False)) as store:
        former = store.identity
        versions = {}
        for tenant in store.tenants():
            with store.read(tenant) as reader:
                versions[tenant] = reader.head().version
        timeline = store.begin_timeline().timeline
    _log.info("began a timeline", epoch=former.epoch, timeline=timeline)
    return Restored(former.epoch, former.timeline, timeline, versions, moved_to=None)


def _verification() -> ModuleType:
    """Return what looks into databases."""
    try:
        from tidelog_server import _postgres_verification  # noqa: PLC0415 - of an extra
    except ImportError as error:
        raise ExtraMissing(EXTRA_MISSING) from error
    return _postgres_verification
