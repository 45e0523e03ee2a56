"""The devices of a run, by name: who is here, whom the run waits for and for what, and what each did last."""

from sqlalchemy import ColumnElement, not_, or_, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.cohort import count_here, is_here
from coordinator.rounds.evaluating import awaited_evaluations
from coordinator.rounds.rounds import current_round, get_run, is_calibrated, places
from coordinator.store.tables import CalibrationRow, DeviceRow, PlaceRow, RoundRow, RunRow, UpdateRow
from lamina.bounds import MAX_SECONDS
from lamina.wire import Awaited, DeviceList, DeviceState

MOST_DEVICES = 50
"""So many are listed, however large the fleet is."""


def device_list(house: House, run_id: str) -> DeviceList:
    """Raises UnknownNameError."""
    now = house.clock()
    with house.database.read() as session:
        run = get_run(session, run_id)
        awaited = awaited_devices(house, session, run, now)
        here = set(session.scalars(select(DeviceRow.id).where(*is_here(house, run, now))))
        took_part = select(PlaceRow.device_id).join(RoundRow).where(RoundRow.run_number == run.number)
        known = or_(DeviceRow.run_number == run.number, DeviceRow.id.in_(took_part), DeviceRow.id.in_(awaited))
        rows = session.scalars(select(DeviceRow).where(known, DeviceRow.removed_name.is_(None))).all()
        # Whom the run waits for, the longest silent first; then the others, the last seen first.
        first = sorted((row for row in rows if row.id in awaited), key=lambda row: (row.seen_unix_seconds or 0.0, row.name))
        others = sorted(
            (row for row in rows if row.id not in awaited), key=lambda row: (-(row.seen_unix_seconds or 0.0), row.name)
        )
        listed = [*first, *others][:MOST_DEVICES]
        away = sum(what == "check_in" for what in awaited.values())
        return DeviceList(
            run=run.id,
            here=len(here),
            awaited=len(awaited),
            to_join=max(0, lacking(house, session, run, now) - away),
            devices=tuple(_state(row, row.id in here, awaited.get(row.id, "none"), now) for row in listed),
            more=len(rows) - len(listed),
        )


def awaited_devices(house: House, session: Session, run: RunRow, now: float) -> dict[str, Awaited]:
    """Device id -> what the run waits for from it. A run that lacks devices waits for all that are enrolled and not here."""
    awaited: dict[str, Awaited] = {}
    if run.has_ended:
        return awaited
    if lacking(house, session, run, now):
        awaited |= dict.fromkeys(session.scalars(select(DeviceRow.id).where(*is_away(house, run, now))), "check_in")
    row = current_round(session, run)
    if row is None:
        return awaited
    if row.phase == "training":
        awaited |= dict.fromkeys(awaited_updates(session, row), "update")
    elif row.phase == "evaluating":
        asked = awaited_evaluations(house, session, run, row, now)
        awaited |= dict.fromkeys((evaluation.device_id for evaluation in asked), "evaluation")
    elif row.phase == "calibrating" and not is_calibrated(session, row):
        work = session.get(CalibrationRow, row.id)
        awaited |= dict.fromkeys([work.device_id] if work and work.lease_ends_unix_seconds > now else [], "calibration")
    return awaited


def awaited_updates(session: Session, row: RoundRow) -> list[str]:
    """The devices that hold a place in a round and have not sent their update, those whose lease ends first at the front."""
    sent = set(session.scalars(select(UpdateRow.device_id).where(UpdateRow.round_id == row.id)))
    return [place.device_id for place in places(session, row) if place.device_id not in sent]


def lacking(house: House, session: Session, run: RunRow, now: float) -> int:
    """How many devices must check in before the run's round can go on: those that its cohort lacks, or its free places."""
    if run.has_ended:
        return 0
    cohort = house.manifest(run.manifest).plan.cohort
    row = current_round(session, run)
    if row is None:
        return max(0, cohort.present - count_here(house, session, run, now))
    if row.phase != "training":
        return 0
    # A device that has sent its update takes no second place; those that are here and have none ask within seconds.
    held = {place.device_id for place in places(session, row)}
    waiting = session.scalars(select(DeviceRow.id).where(*is_here(house, run, now), DeviceRow.id.not_in(held))).all()
    return max(0, cohort.size - len(held) - len(waiting))


def is_away(house: House, run: RunRow, now: float) -> tuple[ColumnElement[bool], ...]:
    """Which devices could take part in the run and are not here: those that asked it for work once, or never asked at all."""
    could_join = or_(DeviceRow.run_number == run.number, DeviceRow.run_number.is_(None))
    here = select(DeviceRow.id).where(*is_here(house, run, now))
    return DeviceRow.role == "device", DeviceRow.removed_name.is_(None), could_join, not_(DeviceRow.id.in_(here))


def _state(row: DeviceRow, is_here: bool, awaited: Awaited, now: float) -> DeviceState:
    return DeviceState(
        device=row.name,
        role=row.role,
        is_here=is_here,
        awaited=awaited,
        seen_seconds=_ago(row.seen_unix_seconds, now),
        did=row.did,
        did_seconds=_ago(row.did_unix_seconds, now),
        refusal=row.refusal,
        refused_seconds=_ago(row.refused_unix_seconds, now),
    )


def _ago(at: float | None, now: float) -> float | None:
    """Seconds since then; none if a wrong clock put it into the future."""
    return None if at is None else round(min(max(0.0, now - at), MAX_SECONDS), 3)
