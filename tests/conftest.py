"""What every test stands on."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import psutil
import pytest

# Fixtures are found here.
from tests.postgres import postgres_cluster, postgres_database

__all__ = ["postgres_cluster", "postgres_database"]

EXIT_TIMEOUT_SECONDS = 5

# Python keeps these until it exits itself.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.fixture(scope="session", autouse=True)
def children_can_be_interrupted() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and children would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail the run if a server or a replica that a test started is still there at its end."""
    yield
    children = [child for child in psutil.Process().children(recursive=True) if not _is_helper(child)]
    _, alive = psutil.wait_procs(children, timeout=EXIT_TIMEOUT_SECONDS)
    left = [_describe(process) for process in alive]
    for process in alive:
        process.kill()
    assert not left, f"child processes were left behind: {left}"


def _is_helper(process: psutil.Process) -> bool:
    return any(helper in _describe(process) for helper in HELPERS)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return f"{process.pid} gone"
