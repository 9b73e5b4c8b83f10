"""
Calls: how to let go of one whose client reads nothing.

gRPC keeps a message until the client lets it through, and behind it the end of the call:
for as long as the connection stands, though nobody serves the call any more. It has no
means to end such a call from its server. But a call that nobody holds is cancelled, and
what was to be sent is dropped. It is held by two tasks of gRPC's: the one that runs the
handler, and the one that made this, which waits for the client to leave. So tasks are to
know who made them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Final, TypeVar
from weakref import ref

# Until the end of a call stands behind its messages.
END_SECONDS: Final = 0.1

T = TypeVar("T")


class _Task(asyncio.Task[T]):
    """
    A task that knows who made it.

    Attributes:
        maker: The task in which it was made.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T], **options: Any) -> None:
        super().__init__(coroutine, **options)
        maker = asyncio.current_task(self.get_loop())
        self.maker = ref(maker) if maker is not None else None


def note_makers(loop: asyncio.AbstractEventLoop) -> None:
    """Have the tasks of a loop know who made them. Before a server starts on it."""
    loop.set_task_factory(lambda loop, coroutine, **options: _Task(coroutine, loop=loop, **options))


def let_go() -> None:
    """
    Have the call cancelled whose handler the present task runs; shortly, when this has returned.

    gRPC's own server keeps the first call, and the newest one until another comes: the clients of these may read on.
    """
    task = asyncio.current_task()
    maker = task.maker() if isinstance(task, _Task) and task.maker is not None else None
    if task is not None and maker is not None:
        loop = asyncio.get_running_loop()
        for one in (maker, task):
            loop.call_later(END_SECONDS, one.cancel)
