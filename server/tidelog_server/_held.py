"""
Held operations: those that refer to objects which had not arrived, settled together.

They are tried as if all their creations existed, in rounds: each round drops what is
refused and what depends on it; the last one drops nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tidelog._keys import ObjectKey
from tidelog_server._action import References
from tidelog_server._outcomes import BEHIND_ANOTHER, Applied, Outcomes, Result
from tidelog_server._overlay import Mark, Overlay
from tidelog_server._refusal import NotReady, Refused, Waits
from tidelog_server._units import Unit, created_keys, keys_of

HELD_ROUNDS_MAX: Final = 64

# Why a unit is dropped. None: it comes behind one that stays pending.
_Verdict = Refused | Waits | NotReady | None


class HeldUnits:
    """
    Settles held units.

    Args:
        overlay: Takes what they do.
        outcomes: Takes what becomes of them.
        references: Decides about references; shared with *apply*.
        apply: Applies one unit, or leaves no trace and raises Refused, Waits or NotReady.
    """

    def __init__(
        self, overlay: Overlay, outcomes: Outcomes, references: References, apply: Callable[[Unit], list[Applied]]
    ) -> None:
        self._overlay = overlay
        self._outcomes = outcomes
        self._references = references
        self._apply = apply

    def settle(self, units: Sequence[Unit]) -> list[Result]:
        """Settle all units, and return the results in their order."""
        outcomes = self._outcomes
        mark = self._overlay.mark()
        results: dict[int, list[Result]] = {}
        live = list(range(len(units)))
        for _ in range(HELD_ROUNDS_MAX):
            applied = self._round(units, live, results, mark)
            withdrawn = outcomes.withdraw_behind_parked(units, results)
            if len(applied) == len(live) and not withdrawn:
                results.update({index: outcomes.settle(units[index], applied[index]) for index in live})
                break
            self._overlay.rollback(mark)
            live = [index for index in live if index not in results]
        else:
            results.update(
                {index: outcomes.park(units[index], "too entangled with refused operations") for index in live}
            )
        return [result for index in range(len(units)) for result in results[index]]

    def _round(
        self, units: Sequence[Unit], live: list[int], results: dict[int, list[Result]], mark: Mark
    ) -> dict[int, list[Applied]]:
        """Try all live units; put the results of those dropped into *results*, return what the others did."""
        references = self._references
        references.assumed = Counter(key for index in live for key in created_keys(units[index]))
        applied: dict[int, list[Applied]] = {}
        dropped: dict[int, _Verdict] = {}
        users: dict[ObjectKey, list[int]] = {}
        # Objects with a dropped operation that may stay pending: what comes behind it is judged next round.
        undecided: set[ObjectKey] = set()
        for index in live:
            unit = units[index]
            if undecided and not undecided.isdisjoint(keys_of(unit)):
                undecided.update(keys_of(unit))
                continue
            references.begin_unit()
            try:
                if self._outcomes.is_parked(unit):
                    dropped[index] = None
                else:
                    applied[index] = self._apply(unit)
                    references.end_unit(created_keys(unit))
                    for key in references.used:
                        users.setdefault(key, []).append(index)
                    continue
            except (Refused, Waits, NotReady) as verdict:
                # With its traceback it would hold on to this frame, and so to itself.
                dropped[index] = verdict.with_traceback(None)
            references.end_unit(created_keys(unit))
            if not isinstance(dropped[index], Refused):
                undecided.update(keys_of(unit))
        if dropped:
            # A failure tells how things stood without what this round tried.
            self._overlay.rollback(mark)
        self._drop(units, [index for index in live if index not in dropped], dropped, users, results)
        return applied

    def _drop(
        self,
        units: Sequence[Unit],
        kept: Iterable[int],
        dropped: dict[int, _Verdict],
        users: dict[ObjectKey, list[int]],
        results: dict[int, list[Result]],
    ) -> None:
        """
        Settle what a round dropped, as far as its verdicts can be trusted.

        A dropped unit takes those with it that came before it and relied on what it
        would create. What was judged on top of such a one is judged again in the next
        round, without it.
        """
        creators: dict[ObjectKey, set[int]] = {}
        for index in kept:
            for key in created_keys(units[index]):
                creators.setdefault(key, set()).add(index)
        fallen: dict[int, ObjectKey] = {}
        trusted = set(dropped)
        for root in sorted(dropped):
            fallen = _fallen(units, users, creators, root)
            if fallen:
                trusted = {index for index in dropped if index < min(fallen)}
                # What takes others with it may itself have been judged on top of them.
                touched = {key for index in fallen for key in keys_of(units[index])}
                if touched.isdisjoint(keys_of(units[root])):
                    trusted.add(root)
                break
        for index in sorted(trusted):
            verdict = dropped[index]
            if verdict is None:
                results[index] = self._outcomes.park(units[index], BEHIND_ANOTHER)
            elif isinstance(verdict, Refused):
                results[index] = self._outcomes.refuse(units[index], verdict)
            elif isinstance(verdict, NotReady):
                results[index] = self._outcomes.park(units[index], verdict.message)
            else:
                results[index] = self._outcomes.give_up(units[index], verdict)
        for index, (entity, id_) in sorted(fallen.items()):
            missing = Waits((entity, id_), f"refers to {entity} {id_!r}, which was not created")
            results[index] = self._outcomes.give_up(units[index], missing)


def _fallen(
    units: Sequence[Unit], users: dict[ObjectKey, list[int]], creators: dict[ObjectKey, set[int]], dropped: int
) -> dict[int, ObjectKey]:
    """
    Return the units that relied on what a dropped one would create, directly or not, each with what it lacks.

    An object that another unit creates as well is not lacking.
    """
    fallen: dict[int, ObjectKey] = {}
    gone = created_keys(units[dropped])
    while gone:
        key = gone.pop()
        if creators.get(key, set()) - fallen.keys():
            continue
        for index in users.get(key, ()):
            if index not in fallen and index != dropped:
                fallen[index] = key
                gone.extend(created_keys(units[index]))
    return fallen
