"""
Sightings: up to when a store knows for sure what became of contents. No I/O.

A store that was put back from a backup does not know what has come since, nor what has
come to refer to what it knows; for a while it may come to know it once more, from those
who offer it again. If it was told, it has another timeline. If not, it may be an older
state of itself that nobody has looked at for long; and so is one that was just off.

Both knew all there was to know when somebody last looked: what nothing needed by then, and
nothing was about to, nobody has come to need since without bringing it along. So until the
while is over contents are judged as of that time.
"""

from __future__ import annotations

import struct
from datetime import timedelta
from typing import Final, NamedTuple

# How long what was lost may be offered again after a store was put back: as long as replicas do that.
UNKNOWN_KEPT: Final = timedelta(days=30)
# What nobody has looked at for longer than this may have been put back without being told.
UNSEEN_MAX: Final = timedelta(days=7)
NOTED_EVERY: Final = timedelta(hours=1)

_HEAD: Final = struct.Struct(">QH")
_DOUBT: Final = struct.Struct(">QQ")
_MICROSECOND: Final = timedelta(microseconds=1)


class Doubt(NamedTuple):
    """
    What may be a store's having been put back.

    Attributes:
        since_us: When it was noticed.
        sure_us: Up to when the store knew all. 0: nobody can tell.
    """

    since_us: int
    sure_us: int


class Sightings(NamedTuple):
    """
    What is noted of when a store was looked at.

    Attributes:
        timeline: Its timeline then.
        looked_us: When that was last.
        doubts: Those of which something may still be offered again.
    """

    timeline: bytes = b""
    looked_us: int = 0
    doubts: tuple[Doubt, ...] = ()

    @classmethod
    def unpack(cls, data: bytes) -> Sightings:
        """Return what a note says; nothing, if there is none."""
        if not data:
            return cls()
        looked_us, count = _HEAD.unpack_from(data)
        end = _HEAD.size + count * _DOUBT.size
        doubts = (Doubt(*one) for one in _DOUBT.iter_unpack(data[_HEAD.size : end]))
        return cls(data[end:], looked_us, tuple(doubts))

    def pack(self) -> bytes:
        """Return a note."""
        return (
            _HEAD.pack(self.looked_us, len(self.doubts))
            + b"".join(_DOUBT.pack(*one) for one in self.doubts)
            + (self.timeline)
        )

    def looked(self, timeline: bytes, now_us: int, *, was_seen: bool, is_empty: bool) -> Sightings:
        """
        Return these with a look more.

        Args:
            timeline: The timeline that the store has.
            now_us: The time.
            was_seen: Whether whoever looks has seen these, or older ones: else the store may have been put back.
            is_empty: Whether there is nothing in the store that could have been lost.
        """
        # One of the future is of a clock that was ahead.
        known = (one._replace(since_us=min(one.since_us, now_us)) for one in self.doubts)
        doubts = [one for one in known if now_us - one.since_us <= UNKNOWN_KEPT // _MICROSECOND]
        if timeline != self.timeline:
            doubts = [] if is_empty else [*doubts, Doubt(now_us, 0)]
        elif self.is_due(now_us, UNSEEN_MAX) and not was_seen:
            doubts.append(Doubt(now_us, self.looked_us if self.looked_us < now_us else 0))
        return Sightings(timeline, now_us, tuple(doubts))

    def is_due(self, now_us: int, period: timedelta) -> bool:
        """Tell whether nobody has looked for longer than a period. A clock may have been ahead."""
        return abs(now_us - self.looked_us) > period // _MICROSECOND

    @property
    def sure_us(self) -> int:
        """Up to when the store knows for sure what became of contents."""
        return min((one.sure_us for one in self.doubts), default=self.looked_us)
