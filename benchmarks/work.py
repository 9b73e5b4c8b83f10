"""Work: what a worker did, and what it took."""

from __future__ import annotations

import time
from types import TracebackType
from typing import NamedTuple, Self


class Work(NamedTuple):
    """
    What a worker did, and what it took.

    Attributes:
        operations: Operations or objects that were committed or moved.
        seconds: How long it took.
        cpu_seconds: Processor time that the process took for it.
        sent_bytes: Bytes of the messages sent.
        received_bytes: Bytes of the messages received.
        upload_seconds: Part of the time until the server had settled the upload.
    """

    operations: int
    seconds: float
    cpu_seconds: float
    sent_bytes: int = 0
    received_bytes: int = 0
    upload_seconds: float = 0.0


class Stopwatch:
    """Adds up the time of all `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def __enter__(self) -> Self:
        self._cpu_start = time.process_time()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._start
        self.cpu_seconds += time.process_time() - self._cpu_start
