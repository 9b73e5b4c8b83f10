"""What simulated users do: every local operation of a replica, at random, and what must come of it at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

from tests.simulation import contents
from tests.simulation.application import CONTENDED, ENTITIES
from tests.simulation.contents import Library
from tests.simulation.model import Attributes, Key, Misfit, patched, same

from tidelog import InvalidValue, ObjectExists, ObjectNotFound, Operation, OperationKind, Patch
from tidelog_client import Object, Replica, Transaction
from tidelog_client._files import FileState

IDS = ("a", "b", "c", "ä/€", "x" * 128)
FRESH_ID_SHARE = 0.15
CONTENDED_SHARE = 0.7
# Deleted more often: whether others refer to them decides.
REFERRED = frozenset({"Order", "Node"})
HANDLES_MAX = 6
TRANSACTION_OPERATIONS_MAX = 6
DAY = datetime(2026, 7, 1, tzinfo=UTC)


def pick_contended(random: Random) -> Key:
    """Pick one of the few objects that all work on."""
    return random.choice(CONTENDED), random.choice(IDS[:3])


class Mistake(Exception):
    """What a program raises in the middle of a transaction."""


@dataclass(frozen=True)
class Intended:
    """A change that a user meant to make."""

    kind: OperationKind
    key: Key
    patch: Patch = field(default_factory=Patch)


class User:
    """
    Somebody who works with one replica; with files, if there is a library of contents to be had.

    Args:
        replica: The replica.
        random: The dice.
        name: What he calls himself.
        library: The contents.
        is_contended: Whether all work on the same few objects.
    """

    def __init__(
        self,
        replica: Replica,
        random: Random,
        name: str,
        library: Library | None = None,
        *,
        is_contended: bool = False,
    ) -> None:
        self.replica = replica
        self._is_contended = is_contended
        self._library = library
        self._random = random
        self._name = name
        self._fresh_count = 0
        self._handles: list[Object] = []

    def open_again(self, replica: Replica) -> None:
        """Go on after a crash: handles are gone with the process."""
        self.replica = replica
        self._handles = []

    def act(self) -> tuple[str, list[Intended], bool]:
        """Do something; return what it was, the operations that must now be in the log, and if they are a group."""
        happenings = [self._change, self._transaction, self._new, self._edit_handle, self._end_handle, self._read]
        weights = [8, 4, 1, 2, 3, 1]
        if self._library is not None:
            happenings, weights = [*happenings, self._attach, self._open_file], [*weights, 4, 1]
        return self._random.choices(happenings, weights)[0]()

    def pick_keys(self) -> list[Object | Key]:
        """Pick what to synchronize: known, unknown, deleted and uncommitted objects."""
        picked: list[Object | Key] = [self._key() for _ in range(self._random.randint(1, 5))]
        if self._handles and self._random.random() < 0.5:
            picked.append(self._random.choice(self._handles))
        return picked

    # --- single operations --------------------------------------------------------------

    def _change(self) -> tuple[str, list[Intended], bool]:
        intended = self._intend(self._current)
        before = self._current(intended.key)
        error = _expected_error(intended, before)
        replica, (entity, id_) = self.replica, intended.key
        if intended.kind is OperationKind.CREATE:
            raised = _raised(lambda: replica.create(entity, intended.patch.set, id_))
        elif intended.kind is OperationKind.UPDATE:
            raised = _raised(lambda: replica.update(entity, id_, **_keywords(intended.patch)))
        else:
            raised = _raised(lambda: replica.delete(entity, id_))
        _expect(raised is error, f"{intended} on {before} raised {raised}, expected {error}")
        what = f"{intended.kind.name} {entity} {id_}"
        if error is not None:
            return f"{what}: {error.__name__}", [], False
        _expect_view(intended, before, self._current(intended.key))
        return what, [intended], False

    def _transaction(self) -> tuple[str, list[Intended], bool]:
        random = self._random
        is_atomic, fails = random.random() < 0.6, random.random() < 0.2
        done: list[Intended] = []
        expected: dict[Key, Attributes | None] = {}
        try:
            with self.replica.transaction(atomic=is_atomic) as transaction:
                for _ in range(random.randint(1, TRANSACTION_OPERATIONS_MAX)):
                    self._step(transaction, done, expected)
                if fails:
                    expected = {key: self._current(key) for key in expected}
                    done = []
                    raise Mistake
        except Mistake:
            pass
        for key, attributes in expected.items():
            _expect(same(self._current(key), attributes), f"{key} is {self._current(key)}, expected {attributes}")
        what = f"{'atomic ' if is_atomic else ''}transaction of {[(one.kind.name, *one.key) for one in done]}"
        return f"{what}{' that raised' if fails else ''}", done, is_atomic and len(done) > 1

    def _step(self, transaction: Transaction, done: list[Intended], expected: dict[Key, Attributes | None]) -> None:
        def current(key: Key) -> Attributes | None:
            return transaction.get(*key)

        intended = self._intend(current)
        before = current(intended.key)
        error = _expected_error(intended, before)
        entity, id_ = intended.key
        if intended.kind is OperationKind.CREATE:
            raised = _raised(lambda: transaction.create(entity, intended.patch.set, id_))
        elif intended.kind is OperationKind.UPDATE:
            raised = _raised(lambda: transaction.update(entity, id_, **_keywords(intended.patch)))
        else:
            raised = _raised(lambda: transaction.delete(entity, id_))
        _expect(raised is error, f"{intended} on {before} raised {raised}, expected {error}")
        if error is None:
            done.append(intended)
            expected[intended.key] = current(intended.key)
            _expect_view(intended, before, expected[intended.key])

    # --- files --------------------------------------------------------------------------

    def _attach(self) -> tuple[str, list[Intended], bool]:
        random, key = self._random, self._key()
        content, name = self._library_of().draw(random), random.choice(contents.ATTRIBUTES)
        intended = Intended(OperationKind.UPDATE, key, Patch({name: contents.reference_to(content, "f.txt")}))
        before = self._current(key)
        error = _expected_error(intended, before)
        raised = _raised(lambda: self.replica.attach(*key, name, content, name="f.txt"))
        _expect(raised is error, f"attaching to {key} on {before} raised {raised}, expected {error}")
        if error is not None:
            return f"attach to {key}: {error.__name__}", [], False
        _expect_view(intended, before, self._current(key))
        return f"attach {len(content)} bytes to {key}", [intended], False

    def _open_file(self) -> tuple[str, list[Intended], bool]:
        """Open a file that is here."""
        key = self._key()
        for name, reference in contents.references(self._current(key)).items():
            if self.replica.file_state(*key, name) is FileState.AVAILABLE:
                with self.replica.open_file(*key, name) as file:
                    return f"open {name} of {key}: {self.is_right(reference.sha256, file.read())}", [], False
        return f"open {key}: no file", [], False

    def missing_file(self) -> tuple[Key, str, bytes] | None:
        """Pick a file that is not here: object, attribute and hash."""
        key = self._key()
        for name, reference in contents.references(self._current(key)).items():
            if self.replica.file_state(*key, name) is not FileState.AVAILABLE:
                return key, name, reference.sha256
        return None

    def is_right(self, sha256: bytes, content: bytes) -> bool:
        """Tell whether a content is what it should be."""
        return content == self._library_of().content(sha256)

    def _library_of(self) -> Library:
        if self._library is None:
            raise AssertionError("there are no files in this world")
        return self._library

    def _file_value(self, library: Library) -> Any:
        """Return what a file's attribute may hold: a content, the file of another object, one that nobody has."""
        random = self._random
        what = random.choices(["added", "shared", "unknown", "none"], [10, 6, 0.5, 1])[0]
        if what == "added":
            return self.replica.add_file(library.draw(random), name="f.txt")
        if what == "shared":
            for _ in range(4):
                for reference in contents.references(self._current(self._key())).values():
                    return reference.to_value()
        return contents.reference_to(random.randbytes(8), "f.txt") if what == "unknown" else None

    # --- handles ------------------------------------------------------------------------

    def _new(self) -> tuple[str, list[Intended], bool]:
        entity, id_ = self._key()
        handle = self.replica.new(entity, self._attributes(entity), id_)
        _expect(handle.is_new and not handle.exists, f"{handle!r} is new and exists")
        self._keep(handle)
        return f"new {entity} {id_}", [], False

    def _edit_handle(self) -> tuple[str, list[Intended], bool]:
        handle = self._handle()
        if handle is None:
            return "no handle", [], False
        name, value = self._random.choice(list(self._attributes(handle.entity).items()))
        gone = not handle.is_new and not handle.exists and not handle.uncommitted
        raised = _raised(lambda: handle.__setitem__(name, value))
        expected = ObjectNotFound if gone else None
        _expect(raised is expected, f"setting {name} on {handle!r} raised {raised}, expected {expected}")
        if raised is None:
            _expect(same(handle.uncommitted[name], value), f"{handle!r} does not hold {name}={value!r}")
            if handle.exists:
                _expect(same(handle[name], value), f"{handle!r} does not show {name}={value!r}")
        return f"set {name} on {handle.entity} {handle.id}", [], False

    def _end_handle(self) -> tuple[str, list[Intended], bool]:
        handle = self._handle()
        if handle is None:
            return "no handle", [], False
        self._handles.remove(handle)
        key, before = (handle.entity, handle.id), self._current((handle.entity, handle.id))
        if self._random.random() < 0.3:
            handle.rollback()
            _expect(handle.exists is (before is not None), f"after rollback {handle!r} exists={handle.exists}")
            return f"rollback {key}", [], False
        uncommitted = handle.uncommitted
        kind = OperationKind.CREATE if handle.is_new else OperationKind.UPDATE
        intended = Intended(kind, key, Patch(uncommitted))
        error = _expected_error(intended, before)
        try:
            handle.commit()
        except ObjectNotFound as raised:
            _expect(error is ObjectNotFound, f"commit of {handle!r} raised {raised!r}")
            _expect(same(raised.unsaved, uncommitted), f"the error carries {raised.unsaved}, not {uncommitted}")
        except ObjectExists as raised:
            _expect(error is ObjectExists, f"commit of {handle!r} raised {raised!r}")
        else:
            _expect(error is None, f"commit of {handle!r} raised nothing, expected {error}")
            _expect_view(intended, before, self._current(key))
            if uncommitted or kind is OperationKind.CREATE:
                return f"commit {key}", [intended], False
        return f"commit {key}: {error.__name__ if error else 'nothing to commit'}", [], False

    def _read(self) -> tuple[str, list[Intended], bool]:
        entity = self._random.choice(ENTITIES)
        found = {one.id: one for one in self.replica.query(entity)}
        _expect(len(found) == self.replica.count(entity), f"count and query of {entity} differ")
        for id_, handle in found.items():
            _expect(same(self._current((entity, id_)), handle.to_dict()), f"query shows another {entity} {id_}")
        key = self._key()
        found_one = self.replica.get(*key)
        if found_one is not None:
            self._keep(found_one)
        return f"read {entity}, get {key}", [], False

    def _keep(self, handle: Object) -> None:
        self._handles.append(handle)
        if len(self._handles) > HANDLES_MAX:
            self._handles.pop(0)

    def _handle(self) -> Object | None:
        return self._random.choice(self._handles) if self._handles else None

    # --- dice ---------------------------------------------------------------------------

    def _current(self, key: Key) -> Attributes | None:
        handle = self.replica.get(*key)
        return None if handle is None else handle.to_dict()

    def _key(self) -> Key:
        if self._is_contended and self._random.random() < CONTENDED_SHARE:
            return pick_contended(self._random)
        entity = self._random.choices(ENTITIES, [3, 4, 3, 3, 3, 1, 1])[0]
        if self._random.random() < FRESH_ID_SHARE:
            self._fresh_count += 1
            return entity, f"{self._name}-{self._fresh_count}"
        return entity, self._random.choice(IDS)

    def _intend(self, current: Callable[[Key], Attributes | None]) -> Intended:
        random, key = self._random, self._key()
        # Mostly what is possible; now and then what is not.
        exists = (current(key) is not None) is not (random.random() < 0.05)
        if not exists:
            return Intended(OperationKind.CREATE, key, Patch(self._attributes(key[0])))
        if random.random() < (0.4 if key[0] in REFERRED else 0.25):
            return Intended(OperationKind.DELETE, key)
        return Intended(OperationKind.UPDATE, key, self._patch(key[0]))

    def _attributes(self, entity: str) -> Attributes:
        random = self._random
        attributes: Attributes = {"n": self._number(), random.choice("xyz"): self._value()}
        if random.random() < 0.5:
            attributes["tags"] = [self._value(depth=2) for _ in range(random.randrange(4))]
        if entity in {"Task", "Order"}:
            attributes["title"] = random.choices(["A", "B b", None, ""], [6, 3, 1, 2])[0]
        if entity == "Task":
            for name, share in (
                ("tidy", 0.15), ("boom", 0.07), ("wait", 0.1), ("counted", 0.15), ("ephemeral", 0.07), ("locked", 0.1),
            ):  # fmt: skip
                if random.random() < share:
                    attributes[name] = random.random() < 0.8
        if entity == "Line":
            attributes["order"] = random.choices([random.choice(IDS), None], [8, 1])[0]
            if random.random() < 0.2:
                attributes["also"] = [random.choice(IDS) for _ in range(random.randrange(3))]
        if entity == "Node":
            ids = IDS[:3] if self._is_contended else IDS
            attributes["next"] = random.choices([random.choice(ids), None], [4, 2])[0]
            if random.random() < 0.3:
                attributes["friends"] = [random.choice(ids)]
        if self._library is not None:
            for name, share in zip(contents.ATTRIBUTES, (0.4, 0.1), strict=True):
                if random.random() < share:
                    attributes[name] = self._file_value(self._library)
        return attributes

    def _patch(self, entity: str) -> Patch:
        random = self._random
        patch = Patch(self._attributes(entity))
        if random.random() < 0.6:
            names = random.sample(sorted(patch.set), random.randint(0, len(patch.set)))
            patch = patch._replace(set={name: patch.set[name] for name in names})
        if "n" not in patch.set and random.random() < 0.7:
            patch = patch._replace(increment={"n": self._number()})
        if "tags" not in patch.set and random.random() < 0.5:
            members = {"tags": [random.choice([1, 2, 1.0, True, "t"]) for _ in range(random.randrange(3))]}
            patch = patch._replace(add=members) if random.random() < 0.6 else patch._replace(remove=members)
        names_unset = ("x", "y", "order") if self._library is None else ("x", "y", "order", *contents.ATTRIBUTES)
        unset = tuple(name for name in names_unset if name not in patch.set and random.random() < 0.2)
        if entity == "Node" and "friends" not in patch.set and random.random() < 0.2:
            patch = patch._replace(add={**patch.add, "friends": [random.choice(IDS)]})
        return patch._replace(unset=unset)

    def _number(self) -> Any:
        random = self._random
        return random.choices(
            [random.randint(-5, 5), random.random(), Decimal(random.randint(0, 99)) / 4, 2**62, "no number"],
            [20, 1, 1, 0.3, 0.5],
        )[0]

    def _value(self, depth: int = 0) -> Any:
        random = self._random
        choices = [
            None, True, False, 0, 1, 1.0, -0.0, float("nan"), -(2**63), "", "ünï\u0000", b"", b"\xff\x00",
            Decimal("1.10"), DAY + timedelta(microseconds=random.randrange(10**12)),
        ]  # fmt: skip
        if depth < 2 and random.random() < 0.3:
            return [self._value(depth + 1) for _ in range(random.randrange(3))]
        if depth < 2 and random.random() < 0.3:
            return {random.choice("pqr"): self._value(depth + 1) for _ in range(random.randrange(3))}
        return random.choice(choices)


def fits(operation: Operation, intended: Intended, *, is_grouped: bool) -> bool:
    """Tell whether a logged operation says what was meant."""
    return (
        operation.kind is intended.kind
        and operation.key == intended.key
        and (operation.group is not None) is is_grouped
        and all(map(same, map(_plain, operation.decoded_patch()), map(_plain, intended.patch)))
    )


def _plain(part: Any) -> Any:
    """Make what an unset names comparable, and leave out what says nothing."""
    return sorted(part) if isinstance(part, tuple | list) else part


def _keywords(patch: Patch) -> dict[str, Any]:
    return {
        "attributes": patch.set,
        "unset": patch.unset,
        "increment": patch.increment,
        "add": patch.add,
        "remove": patch.remove,
    }


def _expected_error(intended: Intended, before: Attributes | None) -> type[Exception] | None:
    if intended.kind is OperationKind.CREATE:
        return None if before is None else ObjectExists
    if before is None:
        return ObjectNotFound if not _is_malformed(intended) else InvalidValue
    if _is_malformed(intended):
        return InvalidValue
    try:
        patched(before, intended.patch)
    except Misfit:
        return InvalidValue
    return None


def _is_malformed(intended: Intended) -> bool:
    return any(isinstance(amount, str) for amount in intended.patch.increment.values())


def _expect_view(intended: Intended, before: Attributes | None, after: Attributes | None) -> None:
    expected: Attributes | None = None
    if intended.kind is OperationKind.CREATE:
        expected = intended.patch.set
    elif intended.kind is OperationKind.UPDATE and before is not None:
        expected = patched(before, intended.patch)
    _expect(same(after, expected), f"{intended} on {before} shows {after}")


def _raised(action: Callable[[], object]) -> type[Exception] | None:
    try:
        action()
    except (ObjectExists, ObjectNotFound, InvalidValue) as error:
        return type(error)
    return None


def _expect(holds: bool, what: str) -> None:  # noqa: FBT001 - reads like an assertion, and works under -O
    if not holds:
        raise AssertionError(what)
