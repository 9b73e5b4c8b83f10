"""
One who listens to whatever the server says to a replica, and knows what its user may know.

Who may not read an object must not be told that there is one, by no removal and by no
word of a refusal; and who may not read an attribute must not be told what it holds.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Callable, Collection, Iterable, Iterator

from tests.simulation.application import ENTITIES
from tests.simulation.model import Attributes, Key, Misfit, patched, same
from tests.simulation.promises import check_private, promise
from tests.simulation.records import Committed, History, SeenHistory
from tests.simulation.rights import Eyes

from tidelog._failure import FailureReason
from tidelog._operation import Operation, OperationKind
from tidelog._schema import Schema
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import operation_pb2, sync_pb2

_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
# As refusals name an object.
_OBJECT = re.compile(rf"\b({'|'.join(ENTITIES)}) ({_STRING})")
# What a rule of the schema says itself.
_PUBLIC = frozenset({"20", "-20"})


class Listener:
    """
    Listens to one session.

    Args:
        eyes: What the user may read.
        seen: The history as the replica may know it.
        history: What really happened.
        committed: The operations of the replica's log.
        schema: What refers to what.
        asked: The objects that were asked for. None: those of the projection are told of.
        since: Returns the version from which on the replica may have been told of an object.
    """

    def __init__(  # noqa: PLR0917 - what somebody may know
        self,
        eyes: Eyes,
        seen: SeenHistory,
        history: History,
        committed: Committed,
        schema: Schema,
        asked: Collection[Key] | None,
        since: Callable[[], int],
    ) -> None:
        self._eyes = eyes
        self._seen = seen
        self._history = history
        self._committed = committed
        self._schema = schema
        self._asked = asked
        self._since = since

    def hear(self, answer: bytes) -> None:
        """Listen to a message."""
        message = splice_pb2.SynchronizeResponseSplice.FromString(answer)
        if message.page:
            page = sync_pb2.SnapshotPage.FromString(message.page)
            check_private(self._seen, page)
            self.check_page(page)
        elif message.batch_results:
            self.check_results(sync_pb2.BatchResults.FromString(message.batch_results).results)
        elif message.upload_settled:
            self.check_results(sync_pb2.UploadSettled.FromString(message.upload_settled).results)

    @promise("Private: a page tells of no object that its receiver cannot know of")
    def check_page(self, page: sync_pb2.SnapshotPage) -> Iterator[str]:
        """Look at what is removed, and at what is confirmed without a word of what it holds."""
        for gone in page.removals:
            key = gone.entity, gone.id
            if not self._may_be_told_of(key):
                yield f"{key} is removed, and {self._eyes.principal} could not know of it since {self._since()}"
        for one in page.confirmations:
            key = one.entity, one.id
            whole = self._history.at(key, one.version)
            if not same(whole, self._eyes.readable(key[0], whole)):
                yield f"{key} is confirmed at {one.version} to {self._eyes.principal}, it is {whole}"

    @promise("Private: a refusal names no object and no value that its receiver may not read")
    def check_results(self, results: Iterable[operation_pb2.OperationResult]) -> Iterator[str]:
        """Look at the words of refusals."""
        for result in results:
            operation = self._committed.operations.get(result.seq)
            if operation is None or not result.message:
                continue  # of a log that is no more
            named = list(self._named(operation))
            for entity, id_ in _OBJECT.findall(result.message):
                key = entity, literal_eval(id_)
                # What was never there a hook would have created, had the operation not been refused.
                if key not in named and key in self._history.changes_to and not self._may_know(key):
                    yield f"{operation.key}: {result.message!r} names {key}, which {self._eyes.principal} may not read"
            said = _OBJECT.sub("", result.message)
            for name, value in self._hidden(operation):
                if re.search(rf"(?<![\w.-]){re.escape(repr(value))}(?![\w.])", said):
                    yield f"{operation.key}: {result.message!r} tells that {name!r} is {value!r}"
            if result.reason == FailureReason.VALIDATION_FAILED.number and not self._may_write(operation):
                yield f"{operation.key}: {result.message!r} to {self._eyes.principal}, who may not write that at all"

    def _may_be_told_of(self, key: Key) -> bool:
        """Tell whether a removal says nothing new to the user."""
        if self._asked is not None:
            return key in self._asked
        return key in self._committed.seqs_of or self._may_know(key, self._since())

    def _may_know(self, key: Key, since: int = 0) -> bool:
        states = self._history.states_between(key, since)
        return any(self._eyes.readable(key[0], state) is not None for state in states)

    def _named(self, operation: Operation) -> Iterator[Key]:
        """Yield the objects that an author named himself, in an operation or its commit group."""
        first, size = (operation.seq, 1) if operation.group is None else (operation.group.id, operation.group.size)
        for seq in range(first, first + size):
            one = self._committed.operations[seq]
            yield one.key
            if one.kind is not OperationKind.DELETE:
                patch = one.decoded_patch()
                for written in (patch.set, patch.add):
                    yield from (target for _, target in self._schema.referenced(one.entity, written))

    def _hidden(self, operation: Operation) -> Iterator[tuple[str, object]]:
        """Yield what an operation found and left behind in attributes that its author neither reads nor sets."""
        before = self._history.at(operation.key, self._history.version)
        if operation.kind is not OperationKind.UPDATE or before is None or operation.group is not None:
            return
        patch = operation.decoded_patch()
        for state in (before, _after(before, operation)):
            readable = self._eyes.readable(operation.entity, state) or {}
            for name, value in (state or {}).items():
                is_told = name in readable or name in patch.set or repr(value) in _PUBLIC
                if not is_told and type(value) in (int, float, str) and repr(value) not in repr(patch):
                    yield name, value

    def _may_write(self, operation: Operation) -> bool:
        """Tell whether an author may write the attributes of an operation, at some moment of late."""
        if operation.kind is not OperationKind.UPDATE or operation.group is not None:
            return True
        names = operation.decoded_patch().written
        state = self._history.at(operation.key, self._history.version)
        return state is None or self._eyes.may_write(operation.entity, names, state)


def _after(before: Attributes, operation: Operation) -> Attributes | None:
    try:
        return patched(before, operation.decoded_patch())
    except Misfit:
        return None
