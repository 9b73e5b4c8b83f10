"""
File questions: what is asked about contents, where each answer may take its time.

A place of contents far away answers after some hundredths of a second, and a device may
ask about a thousand. So several contents are looked at at once, for several questions; a
few of each user, whose others wait until these are answered. A question whose client is
gone ends where it is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from tidelog._errors import ResourceClosed
from tidelog_server._files import Each, Wanted
from tidelog_server._principal import Principal

QUESTIONS_AT_ONCE: Final = 4
QUESTIONS_OF_USER: Final = 2
LOOKS_OF_QUESTION: Final = 8

T = TypeVar("T")


class FileQuestions:
    """Asks them in threads. Used on one event loop."""

    def __init__(self) -> None:
        self._asking = ThreadPoolExecutor(QUESTIONS_AT_ONCE, thread_name_prefix="tidelog-files-asked")
        self._looking = ThreadPoolExecutor(
            QUESTIONS_AT_ONCE * LOOKS_OF_QUESTION, thread_name_prefix="tidelog-files-looked"
        )
        self._all = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        self._of_users: WeakValueDictionary[tuple[str, str], asyncio.Semaphore] = WeakValueDictionary()

    def close(self) -> None:
        """Let what is under way end."""
        for pool in (self._asking, self._looking):
            pool.shutdown(wait=True, cancel_futures=True)

    async def ask(self, principal: Principal, question: Callable[[Each], T]) -> T:
        """Return the answer to a user's question, which is given what looks at several contents at once."""
        user = (principal.tenant, principal.user_id)
        of_user = self._of_users.setdefault(user, asyncio.Semaphore(QUESTIONS_OF_USER))
        await of_user.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            of_user.release()
            raise
        loop, gone = asyncio.get_running_loop(), threading.Event()
        asked = self._asking.submit(question, partial(self._each, gone))

        def leave() -> None:
            of_user.release()
            self._all.release()

        def leave_soon(_done: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(leave)

        # Its places are taken until its threads are done, whether its client is there or not.
        asked.add_done_callback(leave_soon)
        try:
            return await asyncio.wrap_future(asked)
        finally:
            gone.set()

    def _each(self, gone: threading.Event, function: Callable[[Wanted], T], wanted: Iterable[Wanted]) -> Iterator[T]:
        left = list(wanted)
        for first in range(0, len(left), LOOKS_OF_QUESTION):
            if gone.is_set():
                raise ResourceClosed("nobody waits for the answer any more")
            yield from self._looking.map(function, left[first : first + LOOKS_OF_QUESTION])
