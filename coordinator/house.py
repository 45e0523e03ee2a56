"""What every part of the coordinator works with: settings, clock, database, folders, tokens."""

import time
from pathlib import Path

from sqlalchemy import select

from coordinator.rounds.timeline import Clock, Timeline
from coordinator.security.gate import Gate
from coordinator.security.tokens import Tokens
from coordinator.settings import Settings
from coordinator.store.blobs import Blobs
from coordinator.store.database import Database
from coordinator.store.incoming import remove_partial_files
from coordinator.store.tables import ClockRow, RunRow
from coordinator.store.variants import Variants
from lamina.bundles.manifest import Manifest


class House:
    """An opened state folder. One process at a time may have it open (`coordinator.serve` holds a lock)."""

    def __init__(self, settings: Settings, clock: Clock = time.time, steady: Clock | None = None) -> None:
        """Creates what is missing. Raises StoreError, ConfigError, DiskFullError.

        `clock` is the wall clock; `steady` one that nobody can set, by default that of this machine for its own wall clock.
        """
        if steady is None and clock is time.time:
            steady = time.monotonic
        settings.state.mkdir(0o700, parents=True, exist_ok=True)
        settings.updates.mkdir(0o700, exist_ok=True)
        remove_partial_files(settings.updates)
        self.settings = settings
        self._manifests: dict[str, Manifest] = {}
        self.blobs = Blobs(settings.blobs)
        self.database = Database(settings.database)
        with self.database.read() as session:
            last = session.get(ClockRow, 1)
        self.clock = Timeline(clock, steady, self._longest_wait, last)
        self.tokens = Tokens(settings, self.database)
        self.gate = Gate(self.tokens, settings)
        self.variants = Variants(self.blobs, self.database)
        self.trouble: dict[int, str] = {}
        """Why the last attempt to aggregate a round (by row id) failed; for the status only, nothing is decided by it."""

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

    def remove_bodies(self, round_id: int) -> None:
        """Deletes the files of all updates of a round; their rows stay."""
        for path in (*self.settings.updates.glob(f"{round_id}-*"), self.calibration_file(round_id)):
            path.unlink(missing_ok=True)

    def _longest_wait(self) -> float:
        """How long, in seconds, any open run may wait for a device, and so hear of none."""
        with self.database.read() as session:
            manifests = set(session.scalars(select(RunRow.manifest).where(RunRow.is_finished.is_(False))))
        cohorts = [self.manifest(digest).plan.cohort for digest in manifests]
        return max([self.settings.presence_seconds, *(each.deadline_seconds + each.lease_seconds for each in cohorts)])

    def close(self) -> None:
        self.database.close()
