"""Who takes part in a round: the first devices that ask, or, with `cohort.pool`, some that are drawn from those present.

A drawn device has a place from the start of the round, so that the others wait. If it stays silent for the length of a lease,
the place goes to a device that asks for work, as any other place does.
"""

import logging

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import DeviceRow, PlaceRow, RoundRow, RunRow
from lamina.federation.policies import policy_of
from lamina.federation.policy import Position

log = logging.getLogger("lamina.coordinator")


def start_round(house: House, session: Session, run: RunRow, now: float) -> None:
    """Starts the round where the run stands, if enough devices are here."""
    plan = house.manifest(run.manifest).plan
    policy = policy_of(plan)
    if not policy.may_start(count_here(house, session, run, now)):
        return
    row = RoundRow(id=_next_id(session), run_number=run.number, stage=run.stage, round=run.round, since_unix_seconds=now)
    session.add(row)
    session.flush()
    log.info("%s: round %d of stage %d starts", run.id, run.round, run.stage)
    here = session.execute(select(DeviceRow.name, DeviceRow.id).where(*is_here(house, run, now))).all()
    ids = {name: device_id for name, device_id in here}
    drawn = policy.draw(ids, Position(run.stage, run.round))
    if drawn is None:
        return
    lease_ends = now + plan.cohort.lease_seconds
    for name in drawn:
        session.add(
            PlaceRow(
                round_id=row.id,
                device_id=ids[name],
                lease_ends_unix_seconds=lease_ends,
                taken_unix_seconds=now,
                has_asked=False,
            )
        )
    session.flush()
    log.info("%s: drawn from %d devices: %s", run.id, len(ids), ", ".join(sorted(drawn)))


def _next_id(session: Session) -> int:
    """An id that no round ever had, also none that was taken back."""
    last = session.scalar(select(func.max(RoundRow.id))) or 0
    return 1 + max(last, session.scalar(select(func.max(RunRow.undone_round_id))) or 0)


def count_here(house: House, session: Session, run: RunRow, now: float) -> int:
    """How many devices asked this run for work within `presence_seconds`; a calibrator is none of them."""
    return session.scalars(select(func.count()).select_from(DeviceRow).where(*is_here(house, run, now))).one()


def is_here(house: House, run: RunRow, now: float) -> tuple[ColumnElement[bool], ...]:
    """Which devices asked this run for work within `presence_seconds`."""
    since = now - house.settings.presence_seconds
    return DeviceRow.run_number == run.number, DeviceRow.seen_unix_seconds.between(since, now), DeviceRow.role == "device"
