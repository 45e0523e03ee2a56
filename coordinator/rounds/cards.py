"""What must be equal on all devices of a run is compared: class names, scaling, rates, vocabularies (`lamina.data.card`).

A device names the card of its data by its hash at every check-in, and sends the card once. A run takes what its plan says; what
that leaves open, the first device decides that takes part, and later devices have to agree field by field. A card without a
modality, or a device without a card, is compared with nothing there.

While a run has no update yet, a card that is wrong can be mended: a device that is here alone decides anew.
"""

import json

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import CardRow, DataFactRow, DeviceRow, RoundRow, RunRow, UpdateRow
from lamina.data.card import DataCard, conflicts, describe_conflict
from lamina.encoding.tensors import hash_bytes
from lamina.plans.plan import Plan

_MOST_SHOWN = 4


def keep_card(house: House, device_id: str, body: bytes) -> None:
    """The card of a device's data, in place of the one before. Raises ConfigError for a body that is none."""
    card = DataCard.from_json(body, "the data card")
    with house.database.write() as session:
        row = session.get(CardRow, device_id) or CardRow(device_id=device_id)
        row.sha256, row.card = hash_bytes(body), card.to_json().decode()
        session.add(row)


def is_known(session: Session, device_id: str, sha256: str) -> bool:
    row = session.get(CardRow, device_id)
    return row is not None and row.sha256 == sha256


def why_not_this_data(
    house: House, session: Session, run: RunRow, plan: Plan, device: DeviceRow, sha256: str, now: float
) -> str | None:
    """Why the data of a device that has this card cannot be part of a run, with the values of both; None if it can.

    What it is the first to know becomes what the run knows.
    """
    row = session.get(CardRow, device.id)
    if row is None or row.sha256 != sha256:
        return None
    mine = DataCard.from_json(row.card).fields()
    mine = {name: value for name, value in mine.items() if name.partition(".")[0] in ("classes", *plan.model.modalities)}
    if plan.model.labels is None:
        mine.pop("classes", None)
    by_plan = plan.data_card.fields() if plan.data_card else {}
    misfits = [describe_conflict(name, mine[name], by_plan[name], "in its plan") for name in conflicts(mine, by_plan)]
    facts = {fact.field: fact for fact in session.scalars(select(DataFactRow).where(DataFactRow.run_number == run.number))}
    known = {name: json.loads(fact.value) for name, fact in facts.items() if name not in by_plan}
    others = list(conflicts(mine, known))
    if others and _decides_alone(house, session, run, device, now):
        for name in others:
            facts[name].value, facts[name].device_id = json.dumps(mine[name]), device.id
    else:
        misfits += [
            describe_conflict(name, mine[name], known[name], f"on {_name_of(session, facts[name].device_id)}")
            for name in others
        ]
    if misfits:
        more = f"; and {len(misfits) - _MOST_SHOWN} more differences" if len(misfits) > _MOST_SHOWN else ""
        return f"has other data: {'; '.join(misfits[:_MOST_SHOWN])}{more}"
    for name in mine.keys() - known.keys() - by_plan.keys():
        session.add(DataFactRow(run_number=run.number, field=name, value=json.dumps(mine[name]), device_id=device.id))
    return None


def _decides_alone(house: House, session: Session, run: RunRow, device: DeviceRow, now: float) -> bool:
    """Whether no update came yet, and no other device with a card is here."""
    updates = select(func.count()).select_from(UpdateRow).join(RoundRow, RoundRow.id == UpdateRow.round_id)
    if session.scalars(updates.where(RoundRow.run_number == run.number)).one():
        return False
    since = now - house.settings.presence_seconds
    others = select(func.count()).select_from(DeviceRow).join(CardRow, CardRow.device_id == DeviceRow.id)
    here = others.where(DeviceRow.run_number == run.number, DeviceRow.seen_unix_seconds >= since, DeviceRow.id != device.id)
    return session.scalars(here).one() == 0


def _name_of(session: Session, device_id: str) -> str:
    device = session.get(DeviceRow, device_id)
    return f"device {device.name!r}" if device is not None else "a device that was removed"
