"""
Children: an object in a process of its own.

Each side of a measurement has its own interpreter, and its memory and processor time
are its own. A child ends when its pipe closes, so it does not outlive its parent,
however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, NamedTuple, Protocol, Self, TypeVar

END_SECONDS_MAX: Final = 20.0
SAMPLE_SECONDS: Final = 0.02

_USAGE: Final = "usage of the process"  # no method of a worker


class Worker(Protocol):
    """What a child's process holds."""

    def close(self) -> None: ...


W = TypeVar("W", bound=Worker)


class Usage(NamedTuple):
    """
    What a process has used so far.

    Attributes:
        peak_bytes: The most memory that it had resident, mapped pages of LMDB included.
        own_bytes: The most that it had without pages of files: what cannot be given back.
        cpu_seconds: Processor time of all its threads.
    """

    peak_bytes: int
    own_bytes: int
    cpu_seconds: float

    def since(self, earlier: Usage) -> Usage:
        """Return the peaks as they are, and the processor time since an earlier moment."""
        return self._replace(cpu_seconds=self.cpu_seconds - earlier.cpu_seconds)


class ChildFailed(Exception):
    """A call into a child raised; the message is its traceback."""


class Child(Generic[W]):
    """
    A worker in a process of its own, made there from *kind* and *arguments*.

    Use it as a context manager: at the end the worker is closed and the process is gone.
    """

    def __init__(self, kind: Callable[..., W], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._own_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        try:
            self._answer()
        except BaseException:
            self._end()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """
        Call a method of the worker and wait for what it returns.

        Raises:
            ChildFailed: It raised, or the process is gone.
        """
        self._pipe.send((method, arguments))
        return self._answer()

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        return self._process.pid

    def usage(self) -> Usage:
        """Return what the process has used so far."""
        peak_bytes, cpu_seconds = self.call(_USAGE)
        return Usage(peak_bytes, self._own_bytes, cpu_seconds)

    def kill(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._ended.set()
        self._sampler.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()  # it may be in the middle of something long
        self._end()

    def _answer(self) -> Any:
        try:
            result, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ChildFailed(f"process {self._process.pid} is gone") from None
        if error is not None:
            raise ChildFailed(error)
        return result

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(END_SECONDS_MAX)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        """Watch the process's own memory from outside: the kernel keeps no peak of it."""
        status = Path(f"/proc/{self._process.pid}/status")
        while not self._ended.wait(SAMPLE_SECONDS):
            self._own_bytes = max(self._own_bytes, status_bytes(status, "RssAnon"))


def status_bytes(status: Path, name: str) -> int:
    """Return a figure of a process's status file; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _serve(pipe: Connection, kind: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
    """Make the worker, and do what the parent asks for until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    try:
        worker = kind(*arguments)
    except Exception:  # noqa: BLE001 - the parent raises it
        pipe.send((None, traceback.format_exc()))
        return
    pipe.send((None, None))
    try:
        while True:
            method, parameters = pipe.recv()
            try:
                pipe.send((getattr(worker, method)(*parameters) if method != _USAGE else _usage(), None))
            except Exception:  # noqa: BLE001 - the parent raises it
                pipe.send((None, traceback.format_exc()))
    except (EOFError, OSError):
        pass
    finally:
        worker.close()


def _usage() -> tuple[int, float]:
    return status_bytes(Path("/proc/self/status"), "VmHWM"), time.process_time()
