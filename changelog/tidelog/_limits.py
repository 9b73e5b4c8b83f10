"""
Every bound that both sides share, with its unit in its name.

What a replica commits is held against the same numbers that the server takes,
so that nothing is ever logged that no server would accept.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1

ID_BYTES_MAX: Final = 128
NAME_BYTES_MAX: Final = 64
NESTING_DEPTH_MAX: Final = 32

OPERATION_BYTES_MAX: Final = 1024 * 1024
GROUP_OPERATIONS_MAX: Final = 1_000
GROUP_BYTES_MAX: Final = 2 * 1024 * 1024

# What an object may grow to by many operations: one snapshot must fit a message.
OBJECT_BYTES_MAX: Final = 2 * 1024 * 1024

BATCH_OPERATIONS_MAX: Final = 500
BATCH_BYTES_MAX: Final = 1024 * 1024
# Enough that the server's writer always finds some to commit together while the replica settles others.
BATCHES_IN_FLIGHT_MAX: Final = 8

PAGE_OBJECTS_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 1024 * 1024

SELECTION_OBJECTS_MAX: Final = 100_000

# A constraint is evaluated for each object of an entity, and one per entity fits the start of a session.
CONSTRAINT_DEPTH_MAX: Final = 32
CONSTRAINT_PARTS_MAX: Final = 1_000
CONSTRAINT_BYTES_MAX: Final = 64 * 1024
# A schema travels in one message, beside other things.
SCHEMA_BYTES_MAX: Final = 1024 * 1024
SCHEMA_ENTITIES_MAX: Final = 1_000
SCHEMA_RENAMES_MAX: Final = 1_000
ENTITY_ATTRIBUTES_MAX: Final = 1_000
ENUMERATION_VALUES_MAX: Final = 1_000
PATTERN_CHARS_MAX: Final = 1_000
# A longer string breaks its pattern unread: the time that a match takes grows with the text.
PATTERN_TEXT_CHARS_MAX: Final = 1_000

# What is said to people about one operation: a thousand of them must fit a message.
REASON_BYTES_MAX: Final = 1_000

# gRPC takes 8 KiB of headers in all.
TOKEN_BYTES_MAX: Final = 7 * 1024

# A commit group may exceed the batch target, and a page holds at least one
# object: both stay below this, with room for the framing.
MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024

# A part of a content in one message.
FILE_CHUNK_BYTES: Final = 256 * 1024
# What a content costs a server besides its bytes: a file, and its records.
FILE_COST_BYTES: Final = 4096
# How many contents are asked about at once.
FILES_STAT_MAX: Final = 1_000
FILE_NAME_BYTES_MAX: Final = 255
# What a server takes unless it is told otherwise.
FILE_BYTES_MAX_DEFAULT: Final = 2 * 1024 * 1024 * 1024
