"""The machine: what the figures depend on besides the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Final

_LIBRARIES: Final = ("lmdb", "grpcio", "protobuf", "msgpack")


def describe(folder: Path) -> dict[str, str]:
    """Return what there is to say about the machine, and about the disk that *folder* is on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": str(cores),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1024**3:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "file system": _file_system(folder),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "durability": "full: each commit waits for the disk, on both sides",
    }


def _file_system(folder: Path) -> str:
    """Return the type of the file system of the longest mount point above the folder."""
    path = str(folder.resolve())
    found = ("", "unknown")
    try:
        mounts = Path("/proc/mounts").read_text()
    except OSError:
        return found[1]
    for line in mounts.splitlines():
        point, kind = line.split()[1:3]
        if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]
