"""Retention: what a server forgets in time. A thread of its own looks now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Final

from tidelog._errors import TidelogError
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._logging import get_logger
from tidelog_server._failures import is_payload_due, without_payloads
from tidelog_server._records import Writes
from tidelog_server._store import Reader, Store

LOOK_SECONDS: Final = 3600.0
PAGE_FAILURES: Final = 500

_log = get_logger("tidelog.retention")


class Retention:
    """
    Takes the payloads out of failures that were settled long ago.

    Args:
        store: Where they are.
        failures: How long the payloads of settled failures are kept.
        clock: Returns the time in microseconds since 1970.
    """

    def __init__(self, store: Store, *, failures: timedelta, clock: Callable[[], int]) -> None:
        self._store = store
        self._failures = failures
        self._clock = clock
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_now_and_then, name="tidelog-retention", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. Waits for what is under way."""
        self._stopped.set()
        self._thread.join()

    def look(self) -> None:
        """Forget what is due, in all tenants."""
        settled_before_us = self._clock() - self._failures // timedelta(microseconds=1)
        for tenant in self._store.tenants():
            after = b""
            while not self._stopped.is_set():
                with self._store.read(tenant) as reader:
                    found = reader.failures(after, PAGE_FAILURES, PAGE_BYTES_MAX)
                if not found:
                    break
                after = found[-1][0]
                # Those who write are kept waiting for what has to be written only.
                due = [failure_id for failure_id, data in found if is_payload_due(data, settled_before_us)]
                if due:
                    self._store.submit(tenant, partial(_forget, due)).result()

    def _look_now_and_then(self) -> None:
        while True:
            try:
                self.look()
            except TidelogError as error:
                # The next look will do; a full disk is told to those who write.
                _log.warning("nothing could be forgotten", detail=str(error))
            if self._stopped.wait(LOOK_SECONDS):
                return


def _forget(due: list[bytes], reader: Reader) -> tuple[Writes, None]:
    return without_payloads(reader, due), None
