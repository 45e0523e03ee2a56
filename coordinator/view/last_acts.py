"""What each device did last, and the last refusal that it got, with their times: one of each, however many messages it sends.

For those who look at the status; nothing is decided by it.
"""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from starlette.concurrency import run_in_threadpool

from coordinator.house import House
from coordinator.store.tables import DeviceRow
from lamina.errors import DiskFullError, LaminaError, StoreError
from lamina.printable import printable

log = logging.getLogger("lamina.coordinator")

_MOST_CHARACTERS = 300
_AGAIN_SECONDS = 10.0
"""The same refusal is written down again after so long: a device that repeats itself costs few disk writes."""


def note_act(device: DeviceRow, what: str, now: float) -> None:
    """`what` reads on from the device's name, e.g. `sent its update of round 0 of stage 0 of run-1`."""
    device.did, device.did_unix_seconds = what, now


def note_refusal(house: House, device_id: str, code: str, detail: str) -> None:
    """A failure to write it down is none of the device's, and stays unsaid."""
    text, now = printable(f"{code}: {detail}", _MOST_CHARACTERS), house.clock()
    with suppress(LaminaError), house.database.write() as session:
        device = session.get(DeviceRow, device_id)
        if device is None:
            return
        last = device.refused_unix_seconds
        if device.refusal == text and last is not None and abs(now - last) < _AGAIN_SECONDS:
            return
        device.refusal, device.refused_unix_seconds = text, now
        log.warning("%s is refused: %s", device.name, text)


@contextmanager
def noting_refusals(house: House, device_id: str) -> Iterator[None]:
    """Notes the error that ends the block, unless it is the coordinator's own trouble."""
    try:
        yield
    except LaminaError as error:
        if not isinstance(error, _OWN_TROUBLE):
            note_refusal(house, device_id, error.code, error.message)
        raise


@asynccontextmanager
async def noting_refusals_of_body(house: House, device_id: str) -> AsyncIterator[None]:
    """As `noting_refusals`, where a body is read: the database is not waited for in the event loop."""
    try:
        yield
    except LaminaError as error:
        if not isinstance(error, _OWN_TROUBLE):
            await run_in_threadpool(note_refusal, house, device_id, error.code, error.message)
        raise


_OWN_TROUBLE = (DiskFullError, StoreError)
