from __future__ import annotations

import pytest

from tidelog._keys import entity_prefix, pack_object_key, pack_position, unpack_object_key, unpack_position


def test_positions_sort_as_numbers() -> None:
    """The bytes of positions sort as the positions do."""
    positions = [0, 1, 255, 256, 65_535, 2**32, 2**63 - 1, 2**64 - 1]

    assert sorted(map(pack_position, reversed(positions))) == [pack_position(position) for position in positions]
    assert [unpack_position(pack_position(position)) for position in positions] == positions
    assert unpack_position(b"") == 0


@pytest.mark.parametrize("key", [("Task", "t1"), ("T", "é" * 64), ("é" * 32, "\U0001f600"), ("a b", "c/d#e")])
def test_object_keys_there_and_back(key: tuple[str, str]) -> None:
    """The name of an object reads back as it was written."""
    assert unpack_object_key(pack_object_key(*key)) == key


def test_no_two_objects_share_a_spelling() -> None:
    """Where entity ends and id begins is told, whatever the two are."""
    keys = [("Task", "1"), ("Task1", ""), ("Tas", "k1"), ("T", "ask1")]

    assert len({pack_object_key(*key) for key in keys}) == len(keys)


def test_objects_of_an_entity_are_neighbours() -> None:
    """All keys of an entity start with its prefix, and no key of another one does."""
    prefix = entity_prefix("Task")

    assert pack_object_key("Task", "t1").startswith(prefix)
    for entity in ("Tas", "Task2", "Task ", "task", "TaskTask"):
        assert not pack_object_key(entity, "t1").startswith(prefix)


def test_keys_sort_by_id_within_an_entity() -> None:
    """Within an entity keys sort by the bytes of the id, a prefix before what goes on."""
    ids = ["a", "a ", "ab", "b", "é", "\uffff", "\U0001f600"]

    assert sorted(pack_object_key("Task", id_) for id_ in reversed(ids)) == [
        pack_object_key("Task", id_) for id_ in ids
    ]


def test_keys_fit_into_lmdb() -> None:
    """The longest key leaves room for a tenant, a replica and a position before LMDB's 511 bytes."""
    assert len(pack_object_key("é" * 32, "é" * 64)) == 64 + 1 + 128
