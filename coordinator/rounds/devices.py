"""Devices: enrolment, what operators do to them, and what each said when it last asked for work."""

import hmac
from uuid import uuid4

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.rounds import advance, open_runs
from coordinator.security.tokens import hash_token, new_token
from coordinator.store.tables import CalibrationRow, DeviceRow, EvaluationRow, PlaceRow, RoundRow, RunRow, UpdateRow
from coordinator.view.history import note
from lamina.errors import ConfigError, NotEnrolledError, UnknownNameError
from lamina.federation.losses import MAX_EXAMPLES
from lamina.wire import CheckIn, Enrolled, EnrolledDevice, Enrolment, Enrolments, HistoryEntry


def enrol(house: House, enrolment: Enrolment, is_trusted: bool) -> tuple[Enrolled, bool]:
    """The device, and whether it is a new one: the same name with the same token is the same device, however often it asks.

    Raises ConfigError if the name is taken, or if the token is that of another device.
    """
    token = "" if enrolment.token_sha256 else new_token()
    token_sha256 = enrolment.token_sha256 or hash_token(token)
    with house.database.write() as session:
        device = session.scalar(select(DeviceRow).where(DeviceRow.name == enrolment.name))
        if device is not None and hmac.compare_digest(device.token_sha256, token_sha256):
            return Enrolled(device_id=device.id), False
        if device is not None:
            raise ConfigError(
                f"another device is called {enrolment.name!r}: choose another name, or, if this one has lost its state "
                f"folder, have the operator run `lamina device remove {enrolment.name}`, and join again"
            )
        if session.scalar(select(DeviceRow.id).where(DeviceRow.token_sha256 == token_sha256)) is not None:
            raise ConfigError(
                "another device has this token, or had it and was removed; delete identity.json in the device's state folder "
                "and join again"
            )
        device = DeviceRow(id=f"dev-{uuid4().hex[:16]}", name=enrolment.name, token_sha256=token_sha256, is_trusted=is_trusted)
        session.add(device)
        return Enrolled(device_id=device.id, device_token=token), True


def get_device(session: Session, device_id: str) -> DeviceRow:
    device = session.get(DeviceRow, device_id)
    if device is None or device.removed_name is not None:
        raise NotEnrolledError("this device is no longer enrolled; join the coordinator again")
    return device


def remember(house: House, device: DeviceRow, run: RunRow | None, facts: CheckIn, now: float) -> None:
    """Notes that the device is here and which run it asks work for.

    The time is written only when it has moved by a good part of `presence_seconds`: a fleet that waits then costs no
    disk writes.
    """
    device.run_number = run.number if run else None
    device.engine, device.role = facts.engine, facts.role
    # Only whether there are any is ever asked, and the column holds no number of any size.
    device.test_examples = min(facts.test_examples, MAX_EXAMPLES)
    seen = device.seen_unix_seconds
    if seen is None or abs(now - seen) > house.settings.presence_seconds / 4:
        device.seen_unix_seconds = now


def list_devices(house: House) -> Enrolments:
    """All devices that are enrolled, by name."""
    now = house.clock()
    with house.database.read() as session:
        rows = session.execute(
            select(DeviceRow, RunRow)
            .outerjoin(RunRow, RunRow.number == DeviceRow.run_number)
            .where(DeviceRow.removed_name.is_(None))
            .order_by(DeviceRow.name)
        ).all()
        return Enrolments(
            devices=tuple(
                EnrolledDevice(
                    name=device.name,
                    device_id=device.id,
                    run=run.id if run else "",
                    engine=device.engine,
                    role=device.role,
                    seen_seconds_ago=None if device.seen_unix_seconds is None else max(now - device.seen_unix_seconds, 0.0),
                )
                for device, run in rows
            )
        )


def remove_device(house: House, name: str, who: str) -> HistoryEntry:
    """Its token is dead at once, its name is free, its places go to others; what was accepted of it counts on.

    Raises UnknownNameError.
    """
    now = house.clock()
    with house.database.write() as session:
        device = _by_name(session, name)
        open_rounds = select(RoundRow.id).where(RoundRow.phase != "closed")
        for place in session.scalars(
            select(PlaceRow).where(PlaceRow.device_id == device.id, PlaceRow.round_id.in_(open_rounds))
        ):
            if session.get(UpdateRow, (place.round_id, device.id)) is None:
                place.is_lost = True
        for table in (EvaluationRow, CalibrationRow):
            session.execute(
                update(table)
                .where(table.device_id == device.id, table.round_id.in_(open_rounds))
                .values(lease_ends_unix_seconds=now)
            )
        device.name, device.removed_name = f"{device.id}/removed", name
        device.run_number = device.seen_unix_seconds = None
        session.flush()
        for run in open_runs(session):  # a round may have waited for this device alone
            advance(house, session, run, now)
        return note(house, session, "remove-device", "enrolled", "removed", who, device=name, detail=device.id)


def rename_device(house: House, name: str, new_name: str, who: str) -> HistoryEntry:
    """Raises UnknownNameError, and ConfigError if the new name is taken."""
    with house.database.write() as session:
        device = _by_name(session, name)
        if new_name != name and session.scalar(select(DeviceRow.id).where(DeviceRow.name == new_name)) is not None:
            raise ConfigError(f"another device is called {new_name!r}; choose another name")
        device.name = new_name
        return note(house, session, "rename-device", name, new_name, who, device=new_name, detail=device.id)


def _by_name(session: Session, name: str) -> DeviceRow:
    device = session.scalar(select(DeviceRow).where(DeviceRow.name == name, DeviceRow.removed_name.is_(None)))
    if device is None:
        raise UnknownNameError(f"there is no device {name[:80]!r} here; `lamina device list` shows them")
    return device
