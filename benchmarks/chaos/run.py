"""One run from the first enrolment to the final weights: in peace, or disturbed."""

import asyncio
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.chaos.disks import small_disk
from benchmarks.chaos.disturb import Tally, disturbed
from benchmarks.chaos.house import COORDINATOR, House
from benchmarks.chaos.left import Left, read_left
from benchmarks.chaos.proxy import Proxy
from lamina.bundles.manifest import Manifest
from lamina.client import Client, read_token
from lamina.errors import LaminaError
from lamina.files import write_durably

_DISK_MEGABYTES = 16
_ASK_SECONDS = 0.25


@dataclass(frozen=True)
class Bundle:
    folder: Path
    manifest: Manifest
    data: list[Path]


@dataclass(frozen=True)
class Storm:
    """How a run is disturbed: `mean_bytes` between two faults of a direction, `pause_seconds` between two kills of a side."""

    seed: int
    mean_bytes: float
    pause_seconds: float
    with_full_disks: bool = True


@dataclass(frozen=True)
class Outcome:
    """Of one run. `ended` counts processes that ended without having been killed; `no_disks` says why disks were not filled."""

    left: Left
    seconds: float
    rounds: int
    connections: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    no_disks: str = ""


async def calm_run(bundle: Bundle, folder: Path, timeout_seconds: float) -> Outcome:
    """The reference."""
    started = time.monotonic()
    house = House(folder, _states(folder, bundle), bundle.data, seed=0)
    try:
        run = await _published(house, bundle)
        house.urls = dict.fromkeys(house.devices, house.url)
        house.start_devices()
        rounds = await _finished(house, run, timeout_seconds)
    finally:
        await house.close()
    return Outcome(_left(house), time.monotonic() - started, rounds)


async def stormy_run(bundle: Bundle, folder: Path, storm: Storm, tally: Tally, timeout_seconds: float) -> Outcome:
    """The same run under disturbance, until it is finished all the same.

    Raises LaminaError if it is not within the time.
    """
    started = time.monotonic()
    states = _states(folder, bundle)
    with ExitStack() as stack:
        small = [COORDINATOR, "device-0"] if storm.with_full_disks else []
        reasons = [stack.enter_context(small_disk(states[name], _DISK_MEGABYTES)) for name in small]
        no_disks = next(filter(None, reasons), "" if small else "not asked for")
        house = House(folder, states, bundle.data, storm.seed)
        proxy = Proxy(lambda: house.port, storm.seed, storm.mean_bytes)
        try:
            run = await _published(house, bundle)
            house.urls = {name: await proxy.listen(name) for name in house.devices}
            random = Random(f"{storm.seed} kills")
            async with disturbed(house, proxy, [] if no_disks else small, random, tally, storm.pause_seconds):
                house.start_devices()
                rounds = await _finished(house, run, timeout_seconds)
        finally:
            await house.close()
            await proxy.close()
        left = _left(house)
    seconds = time.monotonic() - started
    return Outcome(left, seconds, rounds, proxy.connections, proxy.done, house.ended, no_disks)


def _states(folder: Path, bundle: Bundle) -> dict[str, Path]:
    names = [COORDINATOR, *(f"device-{index}" for index in range(len(bundle.data)))]
    return {name: folder / "states" / name for name in names}


async def _published(house: House, bundle: Bundle) -> str:
    await house.start_coordinator()
    # The devices' copy of the token: somebody brought it to them.
    write_durably(house.folder / "enrolment.token", (house.state / "enrolment.token").read_bytes())

    def publish() -> str:
        with _admin(house) as client:
            return client.publish(bundle.folder, bundle.manifest).run

    return await asyncio.to_thread(publish)


async def _finished(house: House, run: str, timeout_seconds: float) -> int:
    """How many rounds the run had, when it is finished."""

    def rounds() -> int | None:
        with _admin(house) as client:
            status = client.run(run)
        return len(status.rounds) if status.state == "finished" else None

    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        await asyncio.sleep(_ASK_SECONDS)
        try:
            if (number := await asyncio.to_thread(rounds)) is not None:
                return number
        except LaminaError:  # it is being killed, or its disk is full
            pass
    words = "; ".join(f"{name}: {house.last_words(name)}" for name in house.states)
    raise LaminaError(f"the run was not finished within {timeout_seconds:.0f} s, see {house.folder}. Last words: {words}")


def _admin(house: House) -> Client:
    return Client(house.url, read_token(house.state / "admin.token"))


def _left(house: House) -> Left:
    return read_left(house.state, {name: house.log(name) for name in house.devices})
