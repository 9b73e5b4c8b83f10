"""
What copies of a replica's directory have in common, and what becomes of it on the server.

Copies have one id until they learn of each other, and then several: what one of them
settles, the others find settled under an id that may not be theirs. The checkers know of
one id for each replica. Here a store is told to them as if all that was settled of the
operations in a log, by whichever copy, had been settled under the id that it has now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tests.simulation.promises import Settlement
from tests.simulation.records import Committed, ServerRecord
from tests.simulation.server import Chronicle, Place

from tidelog_server._records import Settled


def last_seqs(present: Mapping[str, int], chronicle: Chronicle) -> dict[str, int]:
    """Return the newest seq of every id that a replica ever had, given those of the present ones."""
    found = dict(present)
    for replica_id, seq in chronicle.marks:
        found[replica_id] = max(seq, found.get(replica_id, 0))
    return found


def committed_under(marks: Mapping[Place, Settled], ledger: Mapping[int, bytes]) -> dict[str, Committed]:
    """Return what was settled under each id; *ledger* has all that was ever committed, by nonce."""
    found: dict[str, Committed] = {}
    for (replica_id, seq), one in sorted(marks.items()):
        if one.nonce in ledger:
            found.setdefault(replica_id, Committed()).add(seq, ledger[one.nonce])
    return found


def as_of_one_id(
    server: ServerRecord, chronicle: Chronicle, replica_id: str, committed: Committed
) -> tuple[ServerRecord, dict[Place, Settlement]]:
    """Return a store, and when it settled what, as if a log had had one id all the time."""
    places = _first_places(chronicle, [operation.nonce for operation in committed.operations.values()])
    settled, renamed, settlements = {}, {}, {}
    for seq, operation in committed.operations.items():
        place = places.get(operation.nonce)
        if place is not None:
            settled[seq] = chronicle.marks[place]
            renamed[place] = replica_id, seq
            settlements[replica_id, seq] = chronicle.settlements[place]
    # What another copy has done at these places of the log under this very id is not of this log.
    others = {place: ("", place[1]) for place in chronicle.marks if place[0] == replica_id and place not in renamed}
    told = replace(server, settled={**server.settled, replica_id: settled}, places={**others, **renamed})
    return told, {**chronicle.settlements, **settlements}


def _first_places(chronicle: Chronicle, nonces: Iterable[int]) -> dict[int, Place]:
    """Return where each operation was settled first."""
    wanted = set(nonces)
    found: dict[int, Place] = {}
    for place, one in chronicle.marks.items():
        if one.nonce in wanted:
            known = found.get(one.nonce)
            if known is None or chronicle.settlements[place].order < chronicle.settlements[known].order:
                found[one.nonce] = place
    return found
