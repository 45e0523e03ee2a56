"""Instants that are worth a kill: each waits until it comes, kills within a few milliseconds of it, and says if it did."""

import asyncio
from collections.abc import Callable
from random import Random

from benchmarks.chaos.house import House
from benchmarks.chaos.proxy import Passing, Proxy

WAIT_SECONDS = 8.0
"""After so long without its moment, a kill comes at any time."""
_LOOK_SECONDS = 0.004

Kill = Callable[[], bool]


class Moments:
    def __init__(self, house: House, proxy: Proxy, random: Random) -> None:
        self._house, self._proxy, self._random = house, proxy, random

    async def any_time(self, kill: Kill, device: str | None = None) -> bool:
        await asyncio.sleep(self._random.uniform(0, 2))
        return kill()

    async def enrolment_asked(self, kill: Kill, device: str | None = None) -> bool:
        """The request is on its way, or just being answered."""
        return await self._passing(kill, device, "up", _is_enrolment, 0.02)

    async def enrolment_answered(self, kill: Kill, device: str | None = None) -> bool:
        """The coordinator has counted a device, which has no answer yet, or no file with it."""
        return await self._passing(kill, device, "down", _is_enrolment, 0.01)

    async def update_asked(self, kill: Kill, device: str | None = None) -> bool:
        """An update is being received."""
        return await self._passing(kill, device, "up", _is_update, 0.02)

    async def update_answered(self, kill: Kill, device: str | None = None) -> bool:
        """An update was accepted, and its device does not know it yet."""
        return await self._passing(kill, device, "down", _is_update, 0.01)

    async def aggregating(self, kill: Kill, device: str | None = None) -> bool:
        """All updates of a round are there, and the new weights not yet."""
        updates = self._house.state / "updates"
        return await self._seen(kill, lambda: len(list(updates.glob("[0-9]*"))) == len(self._house.devices), 0.05)

    async def starting(self, kill: Kill, device: str | None = None) -> bool:
        """The coordinator comes up again, and finishes what a crash interrupted."""
        if self._random.random() < 0.5:
            await asyncio.sleep(self._random.uniform(0.3, 1.5))
            return kill()
        return await self._seen(kill, (self._house.state / "address").exists, 0.02)

    async def making_features(self, kill: Kill, device: str) -> bool:
        """A device runs a layer that was frozen over its examples, and writes what comes out."""
        folder = self._house.states[device] / "features"
        return await self._seen(kill, lambda: next(folder.glob("*.partial"), None) is not None, 0.01)

    async def trained(self, kill: Kill, device: str) -> bool:
        """A device has written its update, and perhaps not yet that it did."""
        return await self._seen(kill, (self._house.states[device] / "work" / "update.safetensors").exists, 0.005)

    async def _passing(
        self, kill: Kill, device: str | None, direction: str, is_wanted: Callable[[bytes], bool], most_seconds: float
    ) -> bool:
        """Kills before such a message of a device (None: of any) is passed on, or some milliseconds after it."""
        killed = [False]
        late = self._random.choice((0.0, self._random.uniform(0, most_seconds)))

        async def act() -> None:
            if late:
                asyncio.get_running_loop().call_later(late, lambda: killed.append(kill()))
            else:
                killed.append(kill())

        def wanted(passing: Passing) -> bool:
            is_its = device in (None, passing.device)
            return is_its and passing.is_head and passing.direction == direction and is_wanted(passing.request)

        if not await self._proxy.when(wanted, act, WAIT_SECONDS):
            return False
        await asyncio.sleep(late + 0.01)
        return killed[-1]

    async def _seen(self, kill: Kill, is_so: Callable[[], bool], most_seconds: float) -> bool:
        """Kills some milliseconds after something is seen on the disk."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not is_so():
                    await asyncio.sleep(_LOOK_SECONDS)
        except TimeoutError:
            return False
        await asyncio.sleep(self._random.uniform(0, most_seconds))
        return kill()


def _is_enrolment(request: bytes) -> bool:
    return request.startswith(b"POST /v1/devices")


def _is_update(request: bytes) -> bool:
    return request.startswith(b"PUT") and b"/update" in request
