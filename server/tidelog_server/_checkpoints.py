"""
Checkpoints: what a replica shows a server that was put back from a backup.

A checkpoint names commits of a tenant's history: the newest one, and older ones at
growing distances, and how far settling had come in which run of the store; see `_runs`.
A store that lacks the newest commit, in the same timeline, has lost history that
somebody was told of; so has one that never came so far in that run: refusals move no
version, and of commits that are collected nobody can tell any more. The newest commit
that it has tells how far its history and the replica's are the same. A checkpoint is
sealed: nobody can make one up.
"""

from __future__ import annotations

from typing import Final

import uuid_utils
from google.protobuf.message import DecodeError

from tidelog.internal.v1 import splice_pb2
from tidelog_server._records import Head, Identity
from tidelog_server._runs import Moment, lacks
from tidelog_server._sealing import Sealer
from tidelog_server._store import Reader, Store

# Distances from the newest commit grow by half: what is common is underestimated by no more than
# half of what was lost.
COMMITS_MAX: Final = 48

# Those that begin with a new store, or a restore that says so, are named by random UUIDs, of version 4.
_FOUND_UUID_VERSION: Final = 7


def found_timeline() -> str:
    """Return a name for a timeline that begins because the store was found to have been put back."""
    return str(uuid_utils.uuid7())


def is_found(timeline: str) -> bool:
    """
    Tell whether a timeline began because the store was found to have been put back.

    Then the one before it may have gone on in two ways under one name: nobody was told.
    """
    return uuid_utils.UUID(timeline).version == _FOUND_UUID_VERSION


class Checkpoints:
    """
    Makes and reads the checkpoints of a tenant's replicas.

    Args:
        store: Whose history they are of.
        tenant: The tenant.
    """

    def __init__(self, store: Store, tenant: str) -> None:
        self._tenant = tenant
        self._sealer = Sealer(store, "checkpoint")
        self._older: list[Head] = []

    def begin(self, reader: Reader) -> None:
        """Note the older commits that the checkpoints of a session name."""
        self._older = _spread(reader)

    def at(self, identity: Identity, head: Head, settling: Moment) -> bytes:
        """Return the checkpoint of a store's history at *head*; empty if it has not begun and nothing was settled."""
        if not head.version and not settling.number:
            return b""
        commits = [head, *(one for one in self._older if one.version < head.version)]
        checkpoint = splice_pb2.Checkpoint(
            epoch=identity.epoch,
            timeline=identity.timeline,
            commits=[splice_pb2.Commit(version=one.version, commit_id=one.commit_id) for one in commits],
            settling_count=settling.number,
            settling_run=settling.run,
        )
        return self._sealer.seal(checkpoint.SerializeToString(), self._tenant)

    def contradicts(self, reader: Reader, data: bytes) -> bool:
        """Tell whether a checkpoint is of this timeline, and names what the store has lost."""
        checkpoint = self._opened(data)
        identity = reader.identity()
        if checkpoint is None or (checkpoint.epoch, checkpoint.timeline) != (identity.epoch, identity.timeline):
            return False
        if lacks(reader, Moment(checkpoint.settling_count, checkpoint.settling_run)):
            return True
        newest = max(checkpoint.commits, key=lambda one: one.version)
        if newest.version > reader.head().version:
            return True
        known = reader.commit_id(newest.version) if newest.version else newest.commit_id
        if known is None:
            # Is it gone with what was collected, or did this history never commit there?
            return newest.version >= reader.collected()
        return known != newest.commit_id

    def common_version(self, reader: Reader, data: bytes) -> int:
        """Return a version up to which a checkpoint's history is the store's own, the newest known one; 0: none."""
        checkpoint = self._opened(data)
        if checkpoint is None or checkpoint.epoch != reader.identity().epoch:
            return 0
        return max(
            (one.version for one in checkpoint.commits if reader.commit_id(one.version) == one.commit_id), default=0
        )

    def _opened(self, data: bytes) -> splice_pb2.Checkpoint | None:
        opened = self._sealer.open(data, self._tenant) if data else None
        if opened is None:
            return None
        try:
            checkpoint = splice_pb2.Checkpoint.FromString(opened)
        except DecodeError:
            return None
        return checkpoint if checkpoint.commits else None


def _spread(reader: Reader) -> list[Head]:
    """Return commits at growing distances from the newest, the newest first."""
    head = reader.head()
    distances = [0]
    step = 1
    while len(distances) < COMMITS_MAX and step < head.version:
        distances.append(step)
        step += (step + 1) // 2
    return reader.commits_until(head.version - distance for distance in distances)
