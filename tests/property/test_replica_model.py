from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from tests.builders import contents, quick_folder
from tests.property.strategies import few_names, patches, values

from tidelog import InvalidValue, ObjectExists, ObjectNotFound, Patch, ResourceClosed, attribute
from tidelog._values import equal
from tidelog_client import Object, Replica

pytestmark = pytest.mark.slow

ENTITIES = st.sampled_from(["Task", "Note"])
IDS = st.sampled_from(["a", "b", "c", "ab"])
STATES = st.dictionaries(few_names, values, max_size=3)

Key = tuple[str, str]
Model = dict[Key, dict[str, Any]]


class Undone(Exception):
    """Raised to undo a transaction."""


def changed(model: Model, step: tuple[str, Key, Any]) -> None:
    """Do to the model what a step does to a replica, or raise what the replica raises."""
    kind, key, argument = step
    if kind == "create":
        if key in model:
            raise ObjectExists(entity=key[0], id=key[1])
        model[key] = argument
        return
    if key not in model:
        raise ObjectNotFound(entity=key[0], id=key[1])
    if kind == "delete":
        del model[key]
    else:
        model[key] = argument.apply(model[key])


def done(target: Any, step: tuple[str, Key, Any]) -> None:
    """Do a step on a replica or in a transaction."""
    kind, (entity, id_), argument = step
    if kind == "create":
        target.create(entity, argument, id_)
    elif kind == "delete":
        target.delete(entity, id_)
    else:
        target.update(
            entity,
            id_,
            argument.set,
            unset=argument.unset,
            increment=argument.increment,
            add=argument.add,
            remove=argument.remove,
        )


KEYS = st.tuples(ENTITIES, IDS)
STEPS = st.one_of(
    st.tuples(st.just("create"), KEYS, STATES),
    st.tuples(st.just("update"), KEYS, patches()),
    st.tuples(st.just("delete"), KEYS, st.none()),
)
REFUSALS = (ObjectExists, ObjectNotFound, InvalidValue)


class ReplicaAgainstAModel(RuleBasedStateMachine):
    """A replica without a server does what a dictionary does, and logs each change once."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = self.stack.enter_context(quick_folder())
        self.model: Model = {}
        self.log: list[tuple[str, Key]] = []

    @initialize()
    def open(self) -> None:
        """Open the replica."""
        self.replica = Replica(self.folder / "a", durability="relaxed")

    def teardown(self) -> None:
        """Close the replica."""
        self.replica.close()
        self.stack.close()

    @rule(step=STEPS)
    def one_step(self, step: tuple[str, Key, Any]) -> None:
        """Change one object, or fail as the model does."""
        expected = dict(self.model)
        try:
            changed(expected, step)
        except REFUSALS as refusal:
            with pytest.raises(type(refusal)):
                done(self.replica, step)
            return
        done(self.replica, step)
        self.model = expected
        self.log.append((step[0], step[1]))

    @rule(steps=st.lists(STEPS, max_size=5), atomic=st.booleans(), undo=st.booleans())
    def transaction(self, steps: list[tuple[str, Key, Any]], *, atomic: bool, undo: bool) -> None:
        """Change several objects at once, passing over what cannot be, or undo it all."""
        expected = dict(self.model)
        logged: list[tuple[str, Key]] = []
        try:
            with self.replica.transaction(atomic=atomic) as tx:
                for step in steps:
                    try:
                        changed(expected, step)
                    except REFUSALS as refusal:
                        with pytest.raises(type(refusal)):
                            done(tx, step)
                        continue
                    done(tx, step)
                    logged.append((step[0], step[1]))
                    found = tx.get(*step[1])
                    assert equal(found, expected.get(step[1]))
                if undo:
                    raise Undone
        except Undone:
            return
        self.model = expected
        self.log += logged

    @rule(target=handles, key=KEYS)
    def get(self, key: Key) -> Object | None:
        """Get a handle where the model has an object, and none where it has none."""
        found = self.replica.get(*key)

        assert (found is not None) == (key in self.model)
        if found is not None:
            assert equal(found.to_dict(), self.model[key])
        return found

    @rule(handle=handles, name=few_names, value=values)
    def set_attribute(self, handle: Object | None, name: str, value: Any) -> None:
        """Set an attribute of a handle; nobody else sees it."""
        if handle is None or self.is_of_before(handle):
            return
        if handle.exists or handle.uncommitted:
            handle[name] = value
            if handle.exists:
                assert equal(handle[name], value)
        else:
            with pytest.raises(ObjectNotFound):
                handle[name] = value

    @rule(handle=consumes(handles), commit=st.booleans())
    def end_of_a_handle(self, handle: Object | None, *, commit: bool) -> None:
        """Commit or roll back what a handle has changed."""
        if handle is None or self.is_of_before(handle):
            return
        key = (handle.entity, handle.id)
        changes = handle.uncommitted
        if not commit:
            handle.rollback()
            assert handle.uncommitted == {}
        elif key not in self.model:
            with pytest.raises(ObjectNotFound):
                handle.commit()
            assert equal(handle.uncommitted, changes)
        else:
            handle.commit()
            if changes:
                self.model[key] = Patch(changes).apply(self.model[key])
                self.log.append(("update", key))

    @rule(entity=ENTITIES, name=few_names, value=values)
    def query(self, entity: str, name: str, value: Any) -> None:
        """Find the objects whose attribute has a value, and count them."""
        expected = {
            id_
            for (one, id_), state in self.model.items()
            if one == entity and state.get(name) is not None and equal(state[name], value)
        }

        assert {found.id for found in self.replica.query(entity, {name: value})} == expected
        assert self.replica.count(entity, attribute(name) == value) == len(expected)

    @precondition(lambda self: len(self.log) > 2)
    @rule()
    def reopen(self) -> None:
        """Close the replica and open it again; handles of before are gone."""
        self.replica.close()
        self.open()

    @rule(handle=handles)
    def look(self, handle: Object | None) -> None:
        """A handle shows what the model has, its own changes in front."""
        if handle is None or self.is_of_before(handle):
            return
        key = (handle.entity, handle.id)
        assert handle.exists == (key in self.model)
        if handle.exists:
            assert equal(handle.to_dict(), {**self.model[key], **handle.uncommitted})

    def is_of_before(self, handle: Object) -> bool:
        """Tell whether a handle belongs to a replica that was closed, which it then says."""
        if handle._storage is self.replica._storage:
            return False
        with pytest.raises(ResourceClosed):
            assert handle.exists
        return True

    @invariant()
    def shows_the_model(self) -> None:
        """The replica has exactly the objects of the model."""
        if hasattr(self, "replica"):
            found = {
                (entity, id_): state
                for entity in ("Task", "Note")
                for id_, state in contents(self.replica, entity).items()
            }
            assert equal(
                {"/".join(key): state for key, state in found.items()},
                {"/".join(key): state for key, state in self.model.items()},
            )

    @invariant()
    def logs_each_change_once(self) -> None:
        """The log has each committed change, in order, all of them pending."""
        if hasattr(self, "replica"):
            logged = [one.operation for one in self.replica.log()]
            assert [(one.kind.name.lower(), one.key) for one in logged] == self.log
            assert [one.seq for one in logged] == list(range(1, len(self.log) + 1))
            assert self.replica.pending_count() == len(self.log)


TestReplica = ReplicaAgainstAModel.TestCase
TestReplica.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=25, stateful_step_count=25
)
