"""
Queues of jobs: those of one tenant in their order, tenants in turns.

Whoever works takes a group of one tenant's jobs, and until it is done nobody else gets
any of that tenant's: so they run one after the other, whoever runs them, and different
tenants' at the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

J = TypeVar("J")


class TenantQueues(Generic[J]):
    """
    Jobs that wait.

    Args:
        is_alone: Tells whether a job is to be a group of its own.
        group_jobs_max: How many are a group at most.
    """

    def __init__(self, is_alone: Callable[[J], bool], group_jobs_max: int) -> None:
        self._is_alone = is_alone
        self._group_jobs_max = group_jobs_max
        self._changed = threading.Condition()
        # No tenant's queue is empty, but that of one whose jobs run.
        self._waiting: dict[str, deque[J]] = {}
        self._idle: deque[str] = deque()
        self._closed = False

    def put(self, tenant: str, job: J) -> bool:
        """Add a job behind the tenant's others; tell whether it was taken: it is not once they are closed."""
        with self._changed:
            if self._closed:
                return False
            queue = self._waiting.get(tenant)
            if queue is None:
                queue = self._waiting[tenant] = deque()
                self._idle.append(tenant)
                self._changed.notify()
            queue.append(job)
            return True

    def take(self) -> tuple[str, list[J]] | None:
        """Wait for a group, and return it with its tenant; None once they are closed and nothing is left to begin."""
        with self._changed:
            while not self._idle:
                if self._closed:
                    return None
                self._changed.wait()
            tenant = self._idle.popleft()
            queue = self._waiting[tenant]
            group = [queue.popleft()]
            if not self._is_alone(group[0]):
                while queue and len(group) < self._group_jobs_max and not self._is_alone(queue[0]):
                    group.append(queue.popleft())
            return tenant, group

    def done(self, tenant: str) -> None:
        """Note that a group that was taken has come to its end."""
        with self._changed:
            if self._waiting[tenant]:
                self._idle.append(tenant)
                self._changed.notify()
            else:
                del self._waiting[tenant]

    def close(self) -> None:
        """Take no more jobs. What waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
