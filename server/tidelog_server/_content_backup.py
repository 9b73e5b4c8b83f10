"""
Contents of files in backups: a directory of contents, copied beside the data.

Contents never change, so a backup shares the bytes with what it is a copy of wherever the
file system can do that; a store that is restored does not, and leaves its backup alone.
What is collected meanwhile was not needed when the data were copied. What has come since is
more than the copy needs, unless it took the place of another copy, which is gone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tidelog._contents import Content, ContentDirectory, content_path
from tidelog_server._content_store import CONTENTS_DIRECTORY


def copy_contents(source: Path, target: Path, *, share: bool = True) -> int:
    """
    Copy what `files` in a directory holds to another directory, durably; return how many contents that is.

    Parts of uploads stay behind: who uploads begins anew.

    Args:
        source: The directory with `files`.
        target: The other one.
        share: Whether a file may have a name in both, where that is possible.

    Raises:
        OSError: There is no room, or something cannot be read or written.
    """
    count = 0
    tenants = source / CONTENTS_DIRECTORY
    for tenant in tenants.iterdir() if tenants.is_dir() else ():
        directory = ContentDirectory(tenant)
        copied = target / CONTENTS_DIRECTORY / tenant.name
        for content in directory.contents():
            count += _copy_content(directory, copied, content, _link if share else _copy)
    for folder, _, _ in os.walk(target / CONTENTS_DIRECTORY, topdown=False):
        sync_to_disk(Path(folder))
    return count


def _copy_content(source: ContentDirectory, target: Path, content: Content, put: Callable[[Path, Path], bool]) -> bool:
    """Copy a content, or what took its place meanwhile; tell whether there was any."""
    copies = [content]
    while copies:
        for one in copies:
            place = content_path(one.sha256, one.copy)
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            if (target / place).exists() or put(source.path / place, target / place):
                return True
        copies = source.copies(content.sha256)
    return False  # collected meanwhile


def _link(source: Path, target: Path) -> bool:
    """Let a file have another name, or copy it; tell whether it was there."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        return False
    except OSError:  # another file system, or one that cannot do it
        return _copy(source, target)
    return True


def _copy(source: Path, target: Path) -> bool:
    """Copy a file; tell whether it was there."""
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        return False
    sync_to_disk(target)
    return True


def sync_to_disk(path: Path) -> None:
    """Force a file or a directory to disk."""
    if os.name == "nt" and path.is_dir():
        return  # there is no way to
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
