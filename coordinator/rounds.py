"""The state machine of a run. `advance` is all of it, top to bottom; what it decides is a row before anybody acts on it.

    stage with 0 rounds     passed at once, its segments stay as they are
    no round                until enough devices are here; with `cohort.pool`, its cohort is then drawn (`coordinator.cohort`)
    training                until every place has its update, or at the deadline with at least `min_updates`
    aggregating             no more updates; the weighted mean is being made (`coordinator.aggregation`)
    calibrating             only with `plan.calibration`: until the calibrator's update is applied (`coordinator.calibration`),
                            or, if none has come by the deadline, no longer
    evaluating              until every device that was asked has answered or its lease is over; none may be asked
                            (`coordinator.evaluating`)
    closed                  next round; or, after the last one or when the stage has stalled (`coordinator.stages`), the next
                            stage, or the run is finished

The clock may jump: a jump can end a lease or a deadline early or late, and can change nothing that was accepted.
"""

import logging
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.cohort import start_round
from coordinator.evaluating import awaited_evaluations, begin_evaluation
from coordinator.house import House
from coordinator.stages import early_end, ends_with, next_stage
from coordinator.tables import CalibrationRow, PlaceRow, RoundRow, RunRow, UpdateRow
from lamina.errors import UnknownNameError

log = logging.getLogger("lamina.coordinator")


def advance(house: House, session: Session, run: RunRow, now: float) -> None:
    """Moves a run as far as it can go without arithmetic. Calling it again changes nothing."""
    manifest = house.manifest(run.manifest)
    plan = manifest.plan
    while not run.is_finished:
        if run.round == plan.stages[run.stage].rounds:
            next_stage(session, manifest, run, now)
            continue

        row = current_round(session, run)
        if row is None:
            start_round(house, session, run, now)
            return

        if row.phase == "training":
            updates = count_updates(session, row)
            is_past_deadline = now >= row.since_unix_seconds + plan.cohort.deadline_seconds
            if updates == plan.cohort.size or (is_past_deadline and updates >= plan.cohort.min_updates):
                row.enter("aggregating", now)
            return

        if row.phase == "aggregating":
            return

        if row.phase == "calibrating":
            if is_calibrated(session, row) or now < row.since_unix_seconds + plan.cohort.deadline_seconds:
                return
            log.warning("%s: round %d of stage %d goes on without calibration", run.id, run.round, run.stage)
            begin_evaluation(house, session, run, row, now)

        if row.phase == "evaluating":
            if awaited_evaluations(house, session, run, row, now):
                return
            row.enter("closed", now)
            log.info("%s: round %d of stage %d is closed", run.id, run.round, run.stage)

        run.round, run.since_unix_seconds = run.round + 1, now
        if ends_with(session, plan, row):
            next_stage(session, manifest, run, now)


def advance_all(house: House, now: float) -> None:
    """Moves every open run; for start-up and for whoever looks at a run that no device asks about."""
    with house.database.write() as session:
        for run in open_runs(session):
            advance(house, session, run, now)


def open_runs(session: Session) -> Sequence[RunRow]:
    """Unfinished runs in the order of publishing."""
    return session.scalars(select(RunRow).where(RunRow.is_finished.is_(False)).order_by(RunRow.number)).all()


def get_run(session: Session, run_id: str) -> RunRow:
    """Raises UnknownNameError."""
    prefix, _, number = run_id.partition("-")
    # At most 9 digits, so that no text becomes a number that the database cannot hold.
    is_legal = prefix == "run" and number.isascii() and number.isdigit() and len(number) <= 9
    run = session.get(RunRow, int(number)) if is_legal else None
    if run is None or run.id != run_id:
        raise UnknownNameError(f"there is no run {run_id[:40]!r} here; `lamina status` lists the runs")
    return run


def get_round(house: House, session: Session, run: RunRow, stage: int, number: int) -> RoundRow:
    """A round that has started. Raises UnknownNameError that says what does exist."""
    plan = house.manifest(run.manifest).plan
    stages = plan.stages
    if not 0 <= stage < len(stages):
        raise UnknownNameError(f"{run.id} has stages 0 to {len(stages) - 1}, none is {stage}")
    if not 0 <= number < stages[stage].rounds:
        raise UnknownNameError(f"stage {stage} of {run.id} has {stages[stage].rounds} rounds counted from 0, none is {number}")
    row = session.scalar(
        select(RoundRow).where(RoundRow.run_number == run.number, RoundRow.stage == stage, RoundRow.round == number)
    )
    if row is None and (stage < run.stage or run.is_finished):
        raise UnknownNameError(f"{run.id}: {early_end(session, plan, run.number, stage)}; check in for new work")
    if row is None:
        raise UnknownNameError(f"round {number} of stage {stage} of {run.id} has not started; check in to get work")
    return row


def current_round(session: Session, run: RunRow) -> RoundRow | None:
    """The started round that the run stands in; None while it waits for its cohort, and when it is finished."""
    return session.scalar(
        select(RoundRow).where(RoundRow.run_number == run.number, RoundRow.stage == run.stage, RoundRow.round == run.round)
    )


def is_calibrated(session: Session, row: RoundRow) -> bool:
    """Whether the update of a calibrator was accepted in this round."""
    calibration = session.get(CalibrationRow, row.id)
    return calibration is not None and calibration.body_sha256 is not None


def count_updates(session: Session, row: RoundRow) -> int:
    return session.scalars(select(func.count()).where(UpdateRow.round_id == row.id)).one()


def places(session: Session, row: RoundRow) -> Sequence[PlaceRow]:
    """The places that are held, those whose lease ends first at the front."""
    return session.scalars(
        select(PlaceRow)
        .where(PlaceRow.round_id == row.id, PlaceRow.is_lost.is_(False))
        .order_by(PlaceRow.lease_ends_unix_seconds, PlaceRow.device_id)
    ).all()
