"""One sentence for whatever a run waits for: for what, since when, until when. The same in answers, status and log."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.cohort import count_here
from coordinator.rounds.evaluating import awaited_evaluations
from coordinator.rounds.rounds import count_updates, current_round, places
from coordinator.rounds.timeline import deadline_of
from coordinator.store.tables import CalibrationRow, DeviceRow, EvaluationRow, RoundRow, RunRow, UpdateRow
from lamina.plans.plan import Cohort, Plan


def describe(house: House, session: Session, run: RunRow, now: float) -> str:
    """What the run waits for, or how it ended."""
    if run.is_finished:
        return f"{run.id} is finished"
    if run.halt:
        return describe_halt(run, now)
    row = current_round(session, run)
    cohort = house.manifest(run.manifest).plan.cohort
    if row is None:
        here = count_here(house, session, run, now)
        drawn = f"{cohort.size} of them are drawn and " if cohort.pool is not None else ""
        return (
            f"round {run.round} of stage {run.stage} waits for its cohort since {_seconds(now - run.since_unix_seconds)}: "
            f"{here} of {cohort.present} devices are here; {drawn}it starts when all are, without a time limit"
        )
    return describe_round(house, session, run, row, now)


def describe_halt(run: RunRow, now: float) -> str:
    """Why a run does not go on, and what would make it."""
    why = f": {run.halt_reason}" if run.halt_reason else ""
    if run.halt == "paused":
        since = _seconds(now - (run.halted_unix_seconds or now))
        return f"{run.id} is paused since {since}{why}; `lamina run resume` lets it go on"
    if run.halt == "failed":
        return f"{run.id} has failed{why}; `lamina run resume` tries again, `lamina run rollback` takes rounds back"
    return f"{run.id} was cancelled{why}"


def describe_round(house: House, session: Session, run: RunRow, row: RoundRow, now: float) -> str:
    """What a started round waits for; empty for a closed one."""
    name = f"round {row.round} of stage {row.stage}"
    open_for = _seconds(now - row.since_unix_seconds)
    plan = house.manifest(run.manifest).plan
    cohort = plan.cohort
    if run.has_ended:
        return ""
    if row.phase == "training":
        return f"{name} open for {open_for}: {_training(session, row, cohort, now)}"
    if row.phase == "aggregating":
        return f"{name} is being aggregated for {open_for}: {count_updates(session, row)} updates; {_attempt(house, row)}"
    if row.phase == "calibrating":
        return f"{name} {_calibrating(house, session, plan, row, now)}"
    if row.phase == "evaluating":
        asked = session.scalars(select(func.count()).where(EvaluationRow.round_id == row.id)).one()
        awaited = awaited_evaluations(house, session, run, row, now)
        last = max((place.lease_ends_unix_seconds for place in awaited), default=now)
        last = min(last, deadline_of(row, cohort))
        return (
            f"{name} evaluating for {open_for}: {asked - len(awaited)} of {asked} evaluations, "
            f"the last lease ends in {_seconds(last - now)}"
        )
    return ""


def _training(session: Session, row: RoundRow, cohort: Cohort, now: float) -> str:
    sent = set(session.scalars(select(UpdateRow.device_id).where(UpdateRow.round_id == row.id)))
    parts = [f"{len(sent)} of {cohort.size} updates"]
    held = places(session, row)
    leases = [place.lease_ends_unix_seconds for place in held if place.device_id not in sent]
    if leases:
        parts.append(f"the next lease ends in {_seconds(min(leases) - now)}")
    if len(held) < cohort.size:
        parts.append(f"{cohort.size - len(held)} places are free")
    left = deadline_of(row, cohort) - now
    if left > 0:
        parts.append(f"it closes in {_seconds(left)} if {cohort.min_updates} updates are there")
    else:
        parts.append(f"past its deadline, it closes with {cohort.min_updates} updates")
    return ", ".join(parts)


def _attempt(house: House, row: RoundRow) -> str:
    trouble = house.trouble.get(row.id)
    return f"the last attempt failed and is repeated: {trouble}" if trouble else "this takes seconds"


def _calibrating(house: House, session: Session, plan: Plan, row: RoundRow, now: float) -> str:
    work = session.get(CalibrationRow, row.id)
    open_for = _seconds(now - row.since_unix_seconds)
    if work is not None and work.body_sha256 is not None:
        return f"is being calibrated for {open_for}: the calibrator's update is applied; {_attempt(house, row)}"
    left = f"without it, the round goes on in {_seconds(deadline_of(row, plan.cohort) - now)}"
    if work is not None and work.lease_ends_unix_seconds > now:
        name = session.get_one(DeviceRow, work.device_id).name
        lease = _seconds(work.lease_ends_unix_seconds - now)
        return f"is being calibrated for {open_for} by {name}, whose lease ends in {lease}; {left}"
    data = plan.calibration.data if plan.calibration else None
    command = f"start it with `lamina calibrate URL --data FILE` on its data ({data})"
    return f"waits for the calibrator since {open_for}: {command}; {left}"


def _seconds(value: float) -> str:
    return f"{max(value, 0):.0f} s"
