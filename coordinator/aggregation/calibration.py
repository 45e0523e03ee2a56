"""Calibration: after the mean is made, one process with the server's own data trains all that is attached, alone.

    rows say `calibrating`    the first calibrator that asks gets the work and a lease; silent for longer, it may lose it
    its update is accepted    synced, then a row (`coordinator.rounds.updates`), like any other update
    it is applied             start + difference, with weight 1; one transaction names the new weights and goes on

A crash anywhere repeats the last step from the same rows and gives the same bytes. Without a calibrator the round goes on at
its deadline (`coordinator.rounds.rounds`), uncalibrated, and its notes say so.
"""

import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.evaluating import begin_evaluation
from coordinator.rounds.rounds import advance
from coordinator.store.tables import CalibrationRow, RoundRow, RunRow
from coordinator.store.weights import name_weights, put_segments, read_weights
from lamina.bundles.manifest import EngineName, Manifest
from lamina.federation.aggregation import Contribution, aggregate
from lamina.federation.content import check_accepted
from lamina.federation.terms import Terms

log = logging.getLogger("lamina.coordinator")


def why_not_calibrate(manifest: Manifest, engine: EngineName, modalities: tuple[str, ...]) -> str | None:
    """Why a calibrator cannot serve a run, with what would help; None if it can."""
    plan = manifest.plan
    if plan.calibration is None:
        return "has no `calibration` in its plan, so it has no work for a calibrator"
    if lacking := [modality for modality in plan.model.modalities if modality not in modalities]:
        return f"trains {', '.join(plan.model.modalities)}, and the calibrator has no data for {', '.join(lacking)}"
    if not has_programs(manifest, engine):
        return f"has no calibration programs for {engine}: export the bundle with that engine"
    return None


def has_programs(manifest: Manifest, engine: EngineName) -> bool:
    """Whether a calibrator with this engine can serve every stage that trains."""
    return all(
        engine in programs.calibrate
        for stage, programs in zip(manifest.plan.stages, manifest.stages, strict=True)
        if stage.rounds
    )


def take_calibration(session: Session, row: RoundRow, device_id: str, terms: Terms, now: float, lease_ends: float) -> bool:
    """Gives the round's calibration to a calibrator, or renews its lease. False if it is done or another one is at it."""
    work = session.get(CalibrationRow, row.id)
    if work is None:
        work = CalibrationRow(round_id=row.id, device_id=device_id)
        session.add(work)
    elif work.body_sha256 is not None or (work.device_id != device_id and work.lease_ends_unix_seconds > now):
        return False
    work.device_id, work.lease_ends_unix_seconds = device_id, lease_ends
    work.download_encoding, work.upload_encoding = terms.download_encoding, terms.upload_encoding
    work.compression = terms.compression
    return True


def due_calibrations(session: Session) -> set[int]:
    """The rounds (by row id) whose calibrator's update is accepted and not applied yet."""
    return set(
        session.scalars(
            select(RoundRow.id)
            .join(CalibrationRow, CalibrationRow.round_id == RoundRow.id)
            .join(RunRow, RunRow.number == RoundRow.run_number)
            .where(
                RoundRow.phase == "calibrating",
                CalibrationRow.body_sha256.is_not(None),
                RunRow.halt.in_(("", "paused")),
            )
        )
    )


def apply_calibration(house: House, round_id: int) -> None:
    """Makes the calibrated weights of a round and moves its run on. Raises DiskFullError, StoreError."""
    with house.database.read() as session:
        row = session.get_one(RoundRow, round_id)
        run = session.get_one(RunRow, row.run_number)
        manifest, stage = house.manifest(run.manifest), row.stage
        names = manifest.calibrated(stage)
        start = read_weights(house, session, run, names)
        content = session.get_one(CalibrationRow, round_id).content_sha256 or ""
    path = house.calibration_file(round_id)
    check_accepted(path, content, manifest.specs(names))
    new, _ = aggregate(start, [Contribution(content, 1, path)], manifest.specs(names))
    commit_calibration(house, round_id, put_segments(house, manifest, names, new))
    path.unlink(missing_ok=True)


def commit_calibration(house: House, round_id: int, blobs: dict[str, str]) -> None:
    """In one transaction: name the new weights, ask for evaluations, leave the phase."""
    now = house.clock()
    with house.database.write() as session:
        row = session.get_one(RoundRow, round_id)
        run = session.get_one(RunRow, row.run_number)
        name_weights(session, run, blobs)
        begin_evaluation(house, session, run, row, now)
        log.info("%s: round %d of stage %d is calibrated", run.id, row.round, row.stage)
        advance(house, session, run, now)
