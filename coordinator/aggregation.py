"""From an aggregating round to new weights: read what was accepted, make the mean, store it, and move on.

A crash anywhere repeats the whole from the same rows and gives the same bytes: the round leaves the phase in the one
transaction that also names the new weights.
"""

import logging
import threading

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.aggregate import Contribution, weighted_mean
from coordinator.house import House
from coordinator.rounds import advance, enter
from coordinator.tables import EvaluationRow, RoundRow, RunRow, UpdateRow, WeightRow
from lamina.errors import LaminaError
from lamina.files import raise_if_full
from lamina.manifest import Manifest
from lamina.tensors import Float32, decode_file, encode

log = logging.getLogger("lamina.coordinator")


class Aggregator:
    """Aggregates whatever is due, one round at a time, in the thread that calls."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._busy = threading.Lock()

    def run_due(self) -> None:
        """Returns at once if another thread is at it: that one looks again before it stops.

        A failure is logged, told in the status, and tried again at the next call.
        """
        if not self._busy.acquire(blocking=False):
            return
        try:
            attempted: set[int] = set()
            while (due := self._due() - attempted) != set():
                round_id = min(due)
                attempted.add(round_id)
                self._attempt(round_id)
        finally:
            self._busy.release()

    def _due(self) -> set[int]:
        with self._house.database.read() as session:
            return set(session.scalars(select(RoundRow.id).where(RoundRow.phase == "aggregating")))

    def _attempt(self, round_id: int) -> None:
        try:
            aggregate_round(self._house, round_id)
            self._house.trouble.pop(round_id, None)
        except (LaminaError, OSError) as error:
            self._house.trouble[round_id] = _as_lamina(error, self._house).message
            log.error("aggregation of round id %d failed", round_id, exc_info=error)


def aggregate_round(house: House, round_id: int) -> None:
    """Makes the new weights of a round in phase `aggregating` and moves its run on. Raises DiskFullError, StoreError."""
    with house.database.read() as session:
        row = session.get_one(RoundRow, round_id)
        run = session.get_one(RunRow, row.run_number)
        stage, manifest = row.stage, house.manifest(run.manifest)
        start = _start_weights(house, session, run, stage)
        contributions = [
            Contribution(update.content_sha256, update.num_examples, house.update_file(round_id, update.device_id))
            for update in session.scalars(select(UpdateRow).where(UpdateRow.round_id == round_id))
        ]
    new = weighted_mean(start, contributions, manifest.exchange_specs(stage))
    blobs = {name: house.blobs.put(_segment_file(manifest, name, new)) for name in manifest.plan.stages[stage].active}
    commit_round(house, round_id, blobs)
    remove_updates(house, round_id)
    house.variants.remove_outdated(house.manifest)


def commit_round(house: House, round_id: int, blobs: dict[str, str]) -> None:
    """In one transaction: name the new weights, ask for evaluations, leave the phase."""
    now = house.clock()
    with house.database.write() as session:
        row = session.get_one(RoundRow, round_id)
        run = session.get_one(RunRow, row.run_number)
        for segment, blob in blobs.items():
            session.get_one(WeightRow, (run.number, segment)).blob = blob
        lease_ends = now + house.manifest(run.manifest).plan.cohort.lease_seconds
        for update in session.scalars(
            select(UpdateRow).where(UpdateRow.round_id == round_id, UpdateRow.test_examples > 0)
        ).all():
            session.add(EvaluationRow(round_id=round_id, device_id=update.device_id, lease_ends_unix_seconds=lease_ends))
        enter(row, "evaluating", now)
        log.info("%s: round %d of stage %d is aggregated", run.id, row.round, row.stage)
        session.flush()
        advance(house, session, run, now)


def remove_updates(house: House, round_id: int) -> None:
    """Deletes the bodies of an aggregated round; the rows stay, so that repeats are still known."""
    for path in house.settings.updates.glob(f"{round_id}-*"):
        path.unlink()


def remove_leftovers(house: House) -> None:
    """Deletes bodies that a crash left behind: of rounds whose aggregation is committed."""
    with house.database.read() as session:
        needed = set(session.scalars(select(RoundRow.id).where(RoundRow.phase.in_(("training", "aggregating")))))
    for path in house.settings.updates.iterdir():
        round_id = path.name.partition("-")[0]
        if round_id.isdecimal() and int(round_id) not in needed:
            path.unlink()


def _start_weights(house: House, session: Session, run: RunRow, stage: int) -> dict[str, Float32]:
    """The exchange vector that the round's devices started from, by tensor name."""
    manifest = house.manifest(run.manifest)
    start: dict[str, Float32] = {}
    for name in manifest.plan.stages[stage].active:
        blob = session.get_one(WeightRow, (run.number, name)).blob
        tensors = decode_file(str(house.blobs.path(blob)), manifest.segment(name).tensors)
        start |= {f"{name}/{tensor}": value for tensor, value in tensors.items()}
    return start


def _segment_file(manifest: Manifest, name: str, vector: dict[str, Float32]) -> bytes:
    return encode({tensor.name: vector[f"{name}/{tensor.name}"] for tensor in manifest.segment(name).tensors})


def _as_lamina(error: LaminaError | OSError, house: House) -> LaminaError:
    if isinstance(error, LaminaError):
        return error
    try:
        raise_if_full(error, house.settings.blobs / "any")
    except LaminaError as full:
        return full
    return LaminaError(f"{type(error).__name__}: {error.strerror}")
