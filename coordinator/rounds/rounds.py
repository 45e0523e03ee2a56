"""The state machine of a run. `advance` is all of it, top to bottom; what it decides is a row before anybody acts on it.

    stage with 0 rounds     passed at once, its segments stay as they are
    no round                until enough devices are here; with `cohort.pool`, its cohort is then drawn (`rounds.cohort`)
    training                until every place has its update, or at the deadline with at least `min_updates`
    aggregating             no more updates; the new weights are being made (`aggregation.aggregator`)
    calibrating             only with `plan.calibration`: until the calibrator's update is applied (`aggregation.calibration`),
                            or, if none has come by the deadline, no longer
    evaluating              until every device that was asked has answered or its lease is over; none may be asked
                            (`rounds.evaluating`)
    closed                  next round; or, after the last one or when the stage has stalled (`rounds.stages`), the next
                            stage, or the run is finished

A run that cannot go on fails, with the reason, and has no more work; so does one that an operator cancelled. A paused one
stays as it is. What a lease or a deadline is worth now, `coordinator.rounds.timeline` says alone.
"""

import logging
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.cohort import start_round
from coordinator.rounds.evaluating import awaited_evaluations, begin_evaluation
from coordinator.rounds.stages import early_end, move_on, what_follows
from coordinator.rounds.timeline import DEADLINES_UNTIL_FAILURE, deadline_of, mend, tenure_of
from coordinator.rounds.transitions import move_round, move_run
from coordinator.store.snapshots import keep_snapshot
from coordinator.store.tables import CalibrationRow, DeviceRow, PlaceRow, RoundRow, RunRow, UpdateRow
from coordinator.view.history import note
from lamina.errors import RoundClosedError, UnknownNameError
from lamina.federation.policies import policy_of
from lamina.federation.policy import Position
from lamina.federation.state import RoundTransition, RunTransition

log = logging.getLogger("lamina.coordinator")


def advance(house: House, session: Session, run: RunRow, now: float) -> None:
    """Moves a run as far as it can go without arithmetic. Calling it again changes nothing."""
    was_finished = run.is_finished
    _advance(house, session, run, now)
    if run.is_finished and not was_finished:
        note(house, session, "finish", "running", "finished", run=run)


def _advance(house: House, session: Session, run: RunRow, now: float) -> None:
    manifest = house.manifest(run.manifest)
    plan, policy = manifest.plan, policy_of(manifest.plan)
    while run.state == "running":
        if run.round == plan.stages[run.stage].rounds:
            move_on(session, manifest, run, policy.next(Position(run.stage, run.round - 1), []), now)
            continue

        row = current_round(session, run)
        if row is None:
            start_round(house, session, run, now)
            return

        if row.phase == "training":
            if policy.closes(count_updates(session, row), now - row.since_unix_seconds):
                move_round(row, RoundTransition.COMPLETE, now)
            elif reason := why_it_never_closes(house, session, run, row, now):
                fail(house, session, run, reason, now)
            return

        if row.phase == "aggregating":
            return

        if row.phase == "calibrating":
            if is_calibrated(session, row) or now < deadline_of(row, plan.cohort):
                return
            log.warning("%s: round %d of stage %d goes on without calibration", run.id, run.round, run.stage)
            begin_evaluation(house, session, run, row, now)

        if row.phase == "evaluating":
            if awaited_evaluations(house, session, run, row, now):
                return
            move_round(row, RoundTransition.CLOSE, now)
            keep_snapshot(house, session, run, row)
            log.info("%s: round %d of stage %d is closed", run.id, run.round, run.stage)

        run.round += 1
        move_on(session, manifest, run, what_follows(session, plan, row), now)


def why_it_never_closes(house: House, session: Session, run: RunRow, row: RoundRow, now: float) -> str:
    """Why a round in training waits for devices that are here, have had their time, and send nothing; empty if it does not.

    A round whose devices went away waits for others, as for its cohort.
    """
    cohort = house.manifest(run.manifest).plan.cohort
    if now < row.since_unix_seconds + DEADLINES_UNTIL_FAILURE * cohort.deadline_seconds:
        return ""
    unsent = [place for place in places(session, row) if session.get(UpdateRow, (row.id, place.device_id)) is None]
    if any(place.lease_ends_unix_seconds > now for place in unsent):
        return ""
    names = sorted(
        device.name
        for place in unsent
        if (device := session.get_one(DeviceRow, place.device_id)).run_number == run.number
        and (device.seen_unix_seconds or 0) >= max(tenure_of(place, cohort), now - house.settings.presence_seconds)
    )
    if not names:
        return ""
    return (
        f"round {row.round} of stage {row.stage} has {count_updates(session, row)} of the {cohort.min_updates} updates that it "
        f"needs after {DEADLINES_UNTIL_FAILURE} times its deadline of {cohort.deadline_seconds:g} s: {', '.join(names)} asked "
        "for work and sent nothing"
    )


def fail(house: House, session: Session, run: RunRow, reason: str, now: float) -> None:
    """Ends a run that cannot go on, and frees its devices."""
    note(house, session, "fail", run.state, "failed", run=run, detail=reason)
    move_run(run, RunTransition.FAIL, now, reason)
    log.error("%s has failed: %s", run.id, reason)


def fail_run(house: House, run_id: str, reason: str) -> None:
    """The same in a transaction of its own, unless the run has ended already."""
    now = house.clock()
    with house.database.write() as session:
        run = get_run(session, run_id)
        if not run.has_ended:
            fail(house, session, run, reason, now)


def moments(house: House) -> list[float]:
    """When time alone may move an open run: deadlines, and the ends of leases that a round waits for."""
    times: list[float] = []
    with house.database.read() as session:
        for run in open_runs(session):
            row = current_round(session, run)
            if row is None or row.phase in ("aggregating", "closed"):
                continue
            cohort = house.manifest(run.manifest).plan.cohort
            times.append(deadline_of(row, cohort))
            if row.phase == "training":
                times.append(row.since_unix_seconds + DEADLINES_UNTIL_FAILURE * cohort.deadline_seconds)
                times += [place.lease_ends_unix_seconds for place in places(session, row)]
            elif row.phase == "evaluating":
                times += [answer.lease_ends_unix_seconds for answer in awaited_evaluations(house, session, run, row, 0.0)]
    return times


def advance_all(house: House) -> None:
    """Moves every open run as far as time lets it; for the worker."""
    now = house.clock()
    with house.database.write() as session:
        house.clock.forget_presence(session)
        house.clock.store(session, now)
        for run in open_runs(session):
            advance(house, session, run, now)


def mend_all(house: House) -> None:
    """At the start, before anything is decided: times that a wrong clock granted."""
    now = house.clock()
    with house.database.write() as session:
        house.clock.store(session, now, is_urgent=True)
        for run in session.scalars(select(RunRow).where(RunRow.is_finished.is_(False))):
            mend(session, run, house.manifest(run.manifest).plan.cohort, now)


def open_runs(session: Session) -> Sequence[RunRow]:
    """Runs that go on, in the order of publishing."""
    return session.scalars(select(RunRow).where(RunRow.is_finished.is_(False), RunRow.halt == "").order_by(RunRow.number)).all()


def paused_runs(session: Session) -> Sequence[RunRow]:
    return session.scalars(select(RunRow).where(RunRow.halt == "paused").order_by(RunRow.number)).all()


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
    """A round that has started. Raises UnknownNameError that says what does exist, RoundClosedError if it was taken back."""
    plan = house.manifest(run.manifest).plan
    stages = plan.stages
    if not 0 <= stage < len(stages):
        raise UnknownNameError(f"{run.id} has stages 0 to {len(stages) - 1}, none is {stage}")
    if not 0 <= number < stages[stage].rounds:
        raise UnknownNameError(f"stage {stage} of {run.id} has {stages[stage].rounds} rounds counted from 0, none is {number}")
    row = session.scalar(
        select(RoundRow).where(RoundRow.run_number == run.number, RoundRow.stage == stage, RoundRow.round == number)
    )
    if row is None and run.undone_round_id:
        raise RoundClosedError(f"round {number} of stage {stage} of {run.id} was taken back; check in for new work")
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
