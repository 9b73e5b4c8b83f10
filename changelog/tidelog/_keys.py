"""
Keys: how positions and objects are spelled as LMDB keys, so that bytes sort as meant.

A seq or version is eight bytes, most significant first. An object is its entity,
a NUL, its id: neither may hold a NUL, so no two objects share a spelling and the
objects of an entity are neighbours. At most 64 + 1 + 128 bytes, well below LMDB's
511, whatever a store puts before or after.
"""

from __future__ import annotations

import struct
from typing import Final

ObjectKey = tuple[str, str]

_POSITION: Final = struct.Struct(">Q")

POSITION_BYTES: Final = 8

pack_position = _POSITION.pack


def unpack_position(data: bytes) -> int:
    """Return the seq or version that eight bytes spell."""
    return int.from_bytes(data, "big")


def pack_object_key(entity: str, id_: str) -> bytes:
    """Return the bytes that name an object."""
    return f"{entity}\0{id_}".encode()


def unpack_object_key(data: bytes) -> ObjectKey:
    """Return the (entity, id) that the bytes name."""
    entity, _, id_ = data.decode().partition("\0")
    return entity, id_


def entity_prefix(entity: str) -> bytes:
    """Return what the keys of an entity's objects start with."""
    return f"{entity}\0".encode()
