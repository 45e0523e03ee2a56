"""What every part of the coordinator works with: settings, clock, database, folders, tokens."""

import time
from collections.abc import Callable
from pathlib import Path

from coordinator.blobs import Blobs
from coordinator.database import Database
from coordinator.incoming import remove_partial_files
from coordinator.settings import Settings
from coordinator.tokens import Tokens
from coordinator.variants import Variants
from lamina.manifest import Manifest

Clock = Callable[[], float]
"""Seconds since 1970. Wall time, because leases must mean the same after a restart."""


class House:
    """An opened state folder. One process at a time may have it open (`coordinator.serve` holds a lock)."""

    def __init__(self, settings: Settings, clock: Clock = time.time) -> None:
        """Creates what is missing. Raises StoreError, ConfigError, DiskFullError."""
        settings.state.mkdir(parents=True, exist_ok=True)
        settings.updates.mkdir(exist_ok=True)
        remove_partial_files(settings.updates)
        self.settings = settings
        self.clock = clock
        self.blobs = Blobs(settings.blobs)
        self.database = Database(settings.database)
        self.tokens = Tokens(settings, self.database)
        self.variants = Variants(self.blobs, self.database)
        self.trouble: dict[int, str] = {}
        """Why the last attempt to aggregate a round (by row id) failed; for the status only, nothing is decided by it."""
        self._manifests: dict[str, Manifest] = {}

    def manifest(self, digest: str) -> Manifest:
        """A published manifest; parsed once per process, since it never changes."""
        if digest not in self._manifests:
            path = self.blobs.path(digest)
            self._manifests[digest] = Manifest.from_file(path)
        return self._manifests[digest]

    def update_file(self, round_id: int, device_id: str) -> Path:
        """Where an accepted update lies until its round is aggregated. Not a blob: no other device may fetch it."""
        return self.settings.updates / f"{round_id}-{device_id}"

    def calibration_file(self, round_id: int) -> Path:
        """Where an accepted update of a calibrator lies until it is applied."""
        return self.settings.updates / f"calibration-{round_id}"

    def close(self) -> None:
        self.database.close()
