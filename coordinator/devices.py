"""Devices: enrolment, and what the coordinator remembers of the last time a device asked for work."""

import hmac
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.losses import MAX_EXAMPLES
from coordinator.tables import DeviceRow, RunRow
from coordinator.tokens import hash_token, new_token
from lamina.errors import ConfigError, NotEnrolledError
from lamina.wire import CheckIn, Enrolled, Enrolment


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
            raise ConfigError("another device has this token; delete identity.json in the device's state folder and join again")
        device = DeviceRow(id=f"dev-{uuid4().hex[:16]}", name=enrolment.name, token_sha256=token_sha256, is_trusted=is_trusted)
        session.add(device)
        return Enrolled(device_id=device.id, device_token=token), True


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
