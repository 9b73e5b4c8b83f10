"""What the killed processes do; each role takes up what its predecessor left behind."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from itertools import count
from random import Random
from typing import Any

from tests.simulation.application import Weather, make_application
from tests.simulation.processes import SCHEMA, Journal, work

from tidelog import Entity, Integer, Schema, ServerUnavailable, String
from tidelog_client import Replica, _replica
from tidelog_server import Application, Server

__all__ = [
    "commit_together",
    "make_shop",
    "migrate",
    "publish",
    "serve",
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
TRIM_STEP_OPERATIONS = 500
# Where no server is: a replica that is on its way into the view does that first.
NOWHERE = "127.0.0.1:1"
OLD_SCHEMA = Schema([Entity("Task", {"price": Integer(), "title": String()})])
NEW_SCHEMA = Schema([Entity("Task", {"price": Integer(minimum=100), "title": String()})], version=2)


def serve(directory: str, address: str) -> None:
    """Serve the simulated application."""
    with Server(make_application(Weather(), schema_version=1), store=directory, listen=address):
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


def serve_photos(directory: str, address: str) -> None:
    """Serve photos, and delete what nobody refers to as soon as may be."""
    with Server(
        Application(), store=directory, listen=address, file_grace=timedelta(seconds=PHOTO_GRACE_SECONDS)
    ) as one:
        while True:
            one.collect()


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


def migrate(directory: str) -> None:
    """Start a server whose schema needs a migration, and stop it."""
    with Server(make_shop(NEW_SCHEMA), store=directory, migrate=True):
        pass
