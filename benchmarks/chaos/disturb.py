"""What is done to one run besides what the wire does: kills of both sides, full disks, and a clock that is set."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random

from benchmarks.chaos import disks
from benchmarks.chaos.house import COORDINATOR, House, Part
from benchmarks.chaos.moments import Moments
from benchmarks.chaos.proxy import Proxy

CLOCK_OFFSETS = (-400 * 86400, -2 * 86400, -3600, -70, 0, 70, 3600, 2 * 86400, 400 * 86400)
_ENROLLING = ("enrolment_asked", "enrolment_answered")
_COORDINATOR_MOMENTS = ("any_time", "update_asked", "update_answered", "aggregating", "starting")
_DEVICE_MOMENTS: dict[str, tuple[Part, ...]] = {
    "any_time": ("supervisor", "talker", "trainer"),
    "enrolment_asked": ("supervisor", "talker"),
    "enrolment_answered": ("supervisor", "talker"),
    "update_asked": ("supervisor", "talker"),
    "update_answered": ("supervisor", "talker"),
    "making_features": ("supervisor", "trainer"),
    "trained": ("supervisor", "trainer"),
}


@dataclass
class Tally:
    """What is still to be done in a run, and what was done."""

    coordinator_kills_left: int
    device_kills_left: int
    kills: Counter[str] = field(default_factory=Counter)
    """As `<who>: <when>`."""
    clock_jumps: int = 0
    full_disks: Counter[str] = field(default_factory=Counter)


@asynccontextmanager
async def disturbed(
    house: House, proxy: Proxy, small_disks: list[str], random: Random, tally: Tally, pause_seconds: float
) -> AsyncIterator[None]:
    """Disturbs within the block. `small_disks` are the names of the state folders that may be filled; `pause_seconds` is the
    mean time between the end of one kill and the search for the next, for each side."""
    moments = Moments(house, proxy, random)
    async with asyncio.TaskGroup() as group:  # a fault of the disturbance itself must not look like a calm run
        tasks = [
            group.create_task(_kill_coordinators(house, moments, random, tally, pause_seconds)),
            group.create_task(_kill_devices(house, moments, random, tally, pause_seconds)),
            group.create_task(_set_clock(house, random, tally)),
            group.create_task(_fill_disks(house, small_disks, random, tally)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _kill_coordinators(house: House, moments: Moments, random: Random, tally: Tally, pause_seconds: float) -> None:
    while tally.coordinator_kills_left:
        name = random.choice(_COORDINATOR_MOMENTS)
        if not all(house.is_enrolled(device) for device in house.devices) and random.random() < 0.6:
            name = random.choice(_ENROLLING)
        if name != "starting":
            await asyncio.sleep(random.uniform(0, 2 * pause_seconds))
        if when := await _killed(moments, name, house.kill_coordinator):
            tally.coordinator_kills_left -= 1
            tally.kills[f"{COORDINATOR}: {when}"] += 1


async def _kill_devices(house: House, moments: Moments, random: Random, tally: Tally, pause_seconds: float) -> None:
    while tally.device_kills_left:
        device, name = random.choice(house.devices), random.choice([*_DEVICE_MOMENTS])
        new = [device for device in house.devices if not house.is_enrolled(device)]
        if new and random.random() < 0.7:
            device, name = random.choice(new), random.choice(_ENROLLING)
        elif name in _ENROLLING:
            continue
        part = random.choice(_DEVICE_MOMENTS[name])
        await asyncio.sleep(random.uniform(0, 2 * pause_seconds))
        kill = partial(house.kill_device, device, part)
        if when := await _killed(moments, name, kill, device):
            tally.device_kills_left -= 1
            tally.kills[f"{part}: {when}"] += 1


async def _killed(moments: Moments, name: str, kill: Callable[[], bool], device: str | None = None) -> str:
    """Which moment it became: where the one that was looked for does not come, any other; empty if there was nobody to kill."""
    wait: Callable[..., Awaitable[bool]] = getattr(moments, name)
    if await wait(kill, device):
        return name.replace("_", " ")
    return "any time" if kill() else ""


async def _set_clock(house: House, random: Random, tally: Tally) -> None:
    try:
        while True:
            await asyncio.sleep(random.uniform(0.5, 5))
            house.set_clock(random.choice(CLOCK_OFFSETS))
            tally.clock_jumps += 1
    finally:
        house.set_clock(0)


async def _fill_disks(house: House, names: list[str], random: Random, tally: Tally) -> None:
    while names:
        await asyncio.sleep(random.uniform(5, 20))
        name = random.choice(names)
        left_bytes = random.choice((0, random.randrange(1 << 16)))
        await asyncio.to_thread(disks.fill, house.states[name], left_bytes)
        tally.full_disks[name.partition("-")[0]] += 1
        try:
            await asyncio.sleep(random.uniform(0.5, 3))
        finally:
            disks.free(house.states[name])
