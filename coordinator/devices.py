"""Devices: enrolment, and what the coordinator remembers of the last time a device asked for work."""

from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.losses import MAX_EXAMPLES
from coordinator.tables import DeviceRow, RunRow
from coordinator.tokens import hash_token, new_token
from lamina.errors import ConfigError, NotEnrolledError
from lamina.wire import CheckIn, Enrolled, Enrolment


def enrol(house: House, enrolment: Enrolment, is_trusted: bool) -> Enrolled:
    """A new device with its own token. Raises ConfigError if the name is taken."""
    enrolled = Enrolled(device_id=f"dev-{uuid4().hex[:16]}", device_token=new_token())
    with house.database.write() as session:
        if session.scalar(select(DeviceRow.id).where(DeviceRow.name == enrolment.name)) is not None:
            raise ConfigError(f"another device is called {enrolment.name!r}; choose another name and join again")
        session.add(
            DeviceRow(
                id=enrolled.device_id,
                name=enrolment.name,
                token_sha256=hash_token(enrolled.device_token),
                is_trusted=is_trusted,
            )
        )
    return enrolled


def get_device(session: Session, device_id: str) -> DeviceRow:
    device = session.get(DeviceRow, device_id)
    if device is None:
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
