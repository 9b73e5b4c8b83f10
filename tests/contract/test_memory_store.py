from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.builders import MemoryStore
from tests.contract.store_contract import StoreContract


class TestMemoryStore(StoreContract):
    """The store that the engine's tests run on keeps the promises that the engine relies on."""

    disks: dict[Path, dict[str, Any]]

    def open(self, folder: Path) -> MemoryStore:
        """Open the store that stands for a folder."""
        if not hasattr(self, "disks"):
            self.disks = {}
        return MemoryStore(self.disks.setdefault(folder, {}))
