"""What the killed processes do; each role takes up what its predecessor left behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from random import Random
from typing import Any

from tests.kill.data import contents_at
from tests.simulation.application import Weather, make_application
from tests.simulation.processes import SCHEMA, Journal, work

from tidelog import Entity, Integer, Schema, ServerUnavailable, String
from tidelog_client import Replica, _replica
from tidelog_server import Application, Server, StoreUnavailable

__all__ = [
    "commit_together",
    "make_shop",
    "migrate",
    "publish",
    "serve",
    "serve_open",
    "serve_photos",
    "synchronize",
    "take_photos",
    "trim",
    "work",
]

COMMITTING_THREADS = 8
PHOTO_BYTES = (0, 10, 10_000, 300_000, 2_000_000)
# Short enough that contents go while operations that refer to them are on their way.
PHOTO_GRACE_SECONDS = 2.0
RESTART_SECONDS = 0.05
TRIM_STEP_OPERATIONS = 500
# Where no server is: a replica that is on its way into the view does that first.
NOWHERE = "127.0.0.1:1"
OLD_SCHEMA = Schema([Entity("Task", {"price": Integer(), "title": String()})])
NEW_SCHEMA = Schema([Entity("Task", {"price": Integer(minimum=100), "title": String()})], version=2)


def serve(place: str, address: str, contents_url: str, endpoint: str) -> None:
    """Serve the simulated application."""
    application = make_application(Weather(), schema_version=1)
    with _once_it_is_there(
        lambda: Server(application, store=place, listen=address, contents=contents_at(contents_url, endpoint))
    ):
        threading.Event().wait()


def synchronize(directory: str, address: str) -> None:
    """Synchronize everything, once."""
    with Replica(directory, server=address) as replica:
        replica.synchronize_all()


def publish(directory: str) -> None:
    """Go on with a publication that was begun."""
    with Replica(directory, server=NOWHERE) as replica, contextlib.suppress(ServerUnavailable):
        replica.synchronize_all(timeout=0.01)


def trim(directory: str) -> None:
    """Remove all settled operations from the log."""
    _replica.TRIM_STEP_OPERATIONS = TRIM_STEP_OPERATIONS  # type: ignore[misc]  # more steps to be killed between
    with Replica(directory, log_retention=timedelta(0)) as replica:
        replica.trim_log()


def commit_together(directory: str, journal_path: str) -> None:
    """Commit from many threads at the same time, so that they are committed in groups; note what is committed."""
    journal = Journal(journal_path)
    with Replica(directory, schema=SCHEMA) as replica:
        marks = count(replica.count("Note"))

        def commit() -> None:
            for mark in marks:
                with replica.transaction(atomic=mark % 3 == 0) as transaction:
                    for part in "ab":
                        transaction.create("Note", {"mark": f"{mark}{part}"})
                journal.append(f"committed {mark}a {mark}b")

        threads = [threading.Thread(target=commit, daemon=True) for _ in range(COMMITTING_THREADS)]
        for thread in threads:
            thread.start()
        threads[0].join()


def serve_open(place: str, address: str, contents_url: str, endpoint: str) -> None:
    """Serve an application without rules."""
    contents = contents_at(contents_url, endpoint)
    with _once_it_is_there(lambda: Server(Application(), store=place, listen=address, contents=contents)):
        threading.Event().wait()


def serve_photos(place: str, address: str, contents_url: str, endpoint: str) -> None:
    """Serve photos, and delete what nobody refers to as soon as may be."""
    grace, contents = timedelta(seconds=PHOTO_GRACE_SECONDS), contents_at(contents_url, endpoint)
    with _once_it_is_there(
        lambda: Server(Application(), store=place, listen=address, file_grace=grace, contents=contents)
    ) as one:
        while True:
            with contextlib.suppress(StoreUnavailable):
                one.collect()


@contextlib.contextmanager
def _once_it_is_there(make: Callable[[], Server]) -> Iterator[Server]:
    """Start a server, again and again as long as its database is not there, as whoever keeps it running does."""
    while True:
        server = make()
        try:
            server.start()
        except StoreUnavailable:
            time.sleep(RESTART_SECONDS)
        else:
            break
    try:
        yield server
    finally:
        server.stop()


def take_photos(directory: str, address: str, seed: str, journal_path: str) -> None:
    """Take, replace and delete photos, and synchronize; note which photos were taken."""
    dice = Random(seed)
    journal = Journal(journal_path)
    with Replica(directory, server=address) as replica:
        while True:
            ids = [one.id for one in replica.query("Photo")]
            content = dice.randbytes(dice.choice(PHOTO_BYTES))
            step = dice.choice(["take", "take", "replace", "share", "delete"])
            if step == "take" or not ids:
                taken = replica.create("Photo", {"file": replica.add_file(content)})
                journal.append(f"committed {taken}")
            elif step == "replace":
                replica.attach("Photo", dice.choice(ids), "file", content)
            elif step == "share":
                found = replica.get("Photo", dice.choice(ids))
                if found is not None:
                    replica.create("Photo", {"file": found["file"]})
            else:
                replica.delete("Photo", dice.choice(ids))
            if dice.random() < 0.5:
                try:
                    replica.synchronize_all(timeout=2)
                    journal.append("synchronized")
                except ServerUnavailable:
                    pass
                except Exception as error:
                    journal.append(f"error {error!r}")
                    raise


def make_shop(schema: Schema) -> Application:
    """Return an application; the newer schema's has prices in cents."""
    application = Application(schema=schema)
    if schema.version == NEW_SCHEMA.version:

        @application.migration("Task", version=2)
        def in_cents(task: dict[str, Any]) -> dict[str, Any]:
            return {**task, "price": task["price"] * 100}

    return application


def migrate(place: str, contents_url: str, endpoint: str) -> None:
    """Start a server whose schema needs a migration, and stop it."""
    with Server(make_shop(NEW_SCHEMA), store=place, migrate=True, contents=contents_at(contents_url, endpoint)):
        pass
