"""
Setting aside what is damaged: the way out when the log cannot be read at some place, or a content is not what it was.

What is left of them goes into files beside the data first. Then those that are pending
become failures, so that what comes behind them goes on; nothing disappears in silence.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from tidelog._environment import typed_errors
from tidelog_client._storage import Storage

SET_ASIDE_FOLDER: Final = "set-aside"


class SetAside(NamedTuple):
    """
    What was set aside.

    Attributes:
        files: What is left of each damaged operation, by its seq.
        failure_ids: The failures that pending operations became.
        contents: What is left of each damaged content of a file, by its SHA-256.
    """

    files: dict[int, Path]
    failure_ids: list[str]
    contents: dict[bytes, Path]


def set_aside_damaged(storage: Storage) -> SetAside:
    """
    Take operations that cannot be read out of the log, and damaged contents of files out of their place.

    What is left of them is kept in files. Contents that are damaged or not there are downloaded again.

    Raises:
        DiskFull: There is no room for them. Nothing was changed.
        StorageError: They cannot be written. Nothing was changed.
    """
    folder = storage.environment.path / SET_ASIDE_FOLDER
    contents = storage.files.set_aside_damaged(folder)
    with storage.environment.read() as transaction:
        damaged = dict(storage.log.damaged(transaction))
    for pending in storage.pending():
        with storage.environment.read() as transaction:
            if not storage.log.stored(transaction, pending.seq):
                damaged[pending.seq] = b""
    if not damaged:
        return SetAside({}, [], contents)
    files = {}
    with typed_errors(folder):
        folder.mkdir(exist_ok=True)
        for seq, data in damaged.items():
            files[seq] = folder / f"operation-{seq}"
            with files[seq].open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
    message = f"the replica cannot read it any more: it was damaged outside tidelog, and set aside in {folder}"
    failure_ids = storage.environment.write(lambda transaction: storage.set_aside(transaction, damaged, message))
    return SetAside(files, failure_ids, contents)
