"""Findings: what a verification of a server's store or of a replica names as wrong."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FindingKind(enum.StrEnum):
    """
    What is wrong. docs/cli.md says what follows from each.

    Attributes:
        FILE_DAMAGED: LMDB cannot read its file, or a table is missing.
        ENTRY_UNREADABLE: An entry cannot be decoded.
        TENANT_WRONG: Tenants and their numbers are not one to one, or data belong to no tenant.
        HEAD_WRONG: A tenant's head is not at its newest change and commit.
        CHANGE_MISSING: The change log has a gap.
        CHANGE_ORPHANED: A change leads to no object.
        CHAIN_BROKEN: A change does not follow the one that it names as the one before.
        STATE_DIFFERS: An object is not what its changes make of it.
        BY_VERSION_WRONG: An object is not listed by its version exactly once.
        INDEX_WRONG: An index does not say what follows from objects and failures.
        SETTLED_WRONG: What became of an operation contradicts the change log, the failures or its replica.
        FAILURE_WRONG: A failure does not point to what it is about, or nothing points to it.
        REFUSED_WRONG: A refused creation does not point to its failure.
        FILE_REFERENCE_WRONG: An object refers to a content that is not on record, or is of another size.
        CONTENT_LOST: A content that is on record is not there.
        CONTENT_DAMAGED: A content has another length or hash than it should.
        LOG_DAMAGED: An operation in the log fails its check sum.
        LOG_GAP: The operation log has a gap, or another end than the replica remembers.
        PENDING_WRONG: What is noted of a pending operation is not what the log holds.
        OUTCOME_WRONG: An operation is not exactly one of pending and settled.
        VIEW_DIFFERS: An object is not its base with its operations replayed.
        BASE_WRONG: A base without an operation that is replayed on it.
        REPLAY_WRONG: An operation is replayed that should not be, or the other way round.
        META_WRONG: A remembered value contradicts the data.
        STAGED_WRONG: What is kept of a download is not what the replica remembers of it.
    """

    FILE_DAMAGED = "file_damaged"
    ENTRY_UNREADABLE = "entry_unreadable"
    TENANT_WRONG = "tenant_wrong"
    HEAD_WRONG = "head_wrong"
    CHANGE_MISSING = "change_missing"
    CHANGE_ORPHANED = "change_orphaned"
    CHAIN_BROKEN = "chain_broken"
    STATE_DIFFERS = "state_differs"
    BY_VERSION_WRONG = "by_version_wrong"
    INDEX_WRONG = "index_wrong"
    SETTLED_WRONG = "settled_wrong"
    FAILURE_WRONG = "failure_wrong"
    REFUSED_WRONG = "refused_wrong"
    FILE_REFERENCE_WRONG = "file_reference_wrong"
    CONTENT_LOST = "content_lost"
    CONTENT_DAMAGED = "content_damaged"
    LOG_DAMAGED = "log_damaged"
    LOG_GAP = "log_gap"
    PENDING_WRONG = "pending_wrong"
    OUTCOME_WRONG = "outcome_wrong"
    VIEW_DIFFERS = "view_differs"
    BASE_WRONG = "base_wrong"
    REPLAY_WRONG = "replay_wrong"
    META_WRONG = "meta_wrong"
    STAGED_WRONG = "staged_wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that is wrong.

    Attributes:
        kind: What.
        where: The entry that it concerns, for people: "change 17", "Task 't1'".
        expected: What should be there.
        found: What is there.
        tenant: The tenant whose data it concerns; empty on a replica.
    """

    kind: FindingKind
    where: str
    expected: str
    found: str
    tenant: str = ""

    def __str__(self) -> str:
        tenant = f"tenant {self.tenant!r}: " if self.tenant else ""
        return f"{tenant}{self.where}: expected {self.expected}, found {self.found}"
