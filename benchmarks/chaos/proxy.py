"""A relay on loopback between devices and their coordinator. It damages what passes, and tells when something passes."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal

from benchmarks.chaos.faults import Fault, draw

Direction = Literal["up", "down"]
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Passing:
    """A piece that is about to be passed on. `request` is the first line of the request that it belongs to."""

    device: str
    direction: Direction
    request: bytes
    is_head: bool


@dataclass
class _Watch:
    is_wanted: Callable[[Passing], bool]
    act: Callable[[], Awaitable[None]]
    seen: asyncio.Event


class Proxy:
    """A port for each device. `mean_bytes` is the distance of faults in each direction; None: all arrives as it was sent.

    The same seed gives the n-th connection of a device the same faults; which request meets them is up to the clock.
    """

    def __init__(self, target_port: Callable[[], int], seed: int, mean_bytes: float | None) -> None:
        self._target_port, self._seed, self._mean_bytes = target_port, seed, mean_bytes
        self._servers: list[asyncio.Server] = []
        self._watches: list[_Watch] = []
        self._running: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.done: Counter[str] = Counter()
        """Faults that met bytes, as `<kind> <direction>`."""

    async def listen(self, device: str) -> str:
        """The address at which this device finds its coordinator."""
        numbers = count()
        self._servers.append(
            await asyncio.start_server(lambda *streams: self._handle(device, next(numbers), *streams), "127.0.0.1", 0)
        )
        return f"http://127.0.0.1:{self._servers[-1].sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def when(
        self, is_wanted: Callable[[Passing], bool], act: Callable[[], Awaitable[None]], timeout_seconds: float
    ) -> bool:
        """Calls `act` once, before the next such piece is passed on. False if none came in time."""
        watch = _Watch(is_wanted, act, asyncio.Event())
        self._watches.append(watch)
        try:
            await asyncio.wait_for(watch.seen.wait(), timeout_seconds)
        except TimeoutError:
            if watch in self._watches:
                self._watches.remove(watch)
                return False
            await watch.seen.wait()  # a piece is just passing
        return True

    async def _handle(self, name: str, number: int, device: asyncio.StreamReader, to_device: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self.connections += 1
        try:
            coordinator, to_coordinator = await asyncio.open_connection("127.0.0.1", self._target_port())
        except OSError:
            to_device.transport.abort()
            self._running.discard(task)
            return
        relay = _Relay(self, name, to_coordinator, to_device)
        try:
            await asyncio.gather(
                relay.pump("up", device, to_coordinator, self._faults(name, number, "up")),
                relay.pump("down", coordinator, to_device, self._faults(name, number, "down")),
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            relay.abort()
            self._running.discard(task)

    def _faults(self, device: str, number: int, direction: Direction) -> Iterator[Fault]:
        if self._mean_bytes is None:
            return iter(())
        return draw(Random(f"{self._seed} {device} {number} {direction}"), self._mean_bytes)

    async def tell(self, passing: Passing) -> None:
        for watch in list(self._watches):
            if watch in self._watches and watch.is_wanted(passing):
                self._watches.remove(watch)
                try:
                    await watch.act()
                finally:
                    watch.seen.set()


class _Relay:
    """One connection of a device, and that to the coordinator which belongs to it."""

    def __init__(self, proxy: Proxy, device: str, up: asyncio.StreamWriter, down: asyncio.StreamWriter) -> None:
        self._proxy, self._device, self._writers = proxy, device, (up, down)
        self._request = b""
        self._is_answered = True

    def abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def pump(
        self, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter, faults: Iterator[Fault]
    ) -> None:
        """Passes bytes on until the source ends, or a fault ends the connection."""
        fault = next(faults, None)
        left = fault.after_bytes if fault else 0
        while piece := await source.read(_PIECE_BYTES):
            await self._proxy.tell(self._passing(direction, piece))
            while fault is not None and len(piece) > left:
                sink.write(piece[:left])
                await sink.drain()
                piece = piece[left:]
                self._proxy.done[f"{fault.kind} {direction}"] += 1
                if fault.kind == "cut":
                    self.abort()
                    return
                if fault.kind == "truncate":
                    sink.close()
                    return
                if fault.kind == "delay":
                    await asyncio.sleep(fault.seconds)
                else:
                    piece = bytes([piece[0] ^ 1 << fault.bit]) + piece[1:]
                fault = next(faults)
                left = fault.after_bytes
            sink.write(piece)
            await sink.drain()
            left -= len(piece)
        if sink.can_write_eof():
            sink.write_eof()

    def _passing(self, direction: Direction, piece: bytes) -> Passing:
        """Requests of a connection follow one another, so the first piece up after an answer begins the next one."""
        if direction == "up":
            is_head = self._is_answered
            if is_head:
                self._request, self._is_answered = piece.partition(b"\r\n")[0], False
            return Passing(self._device, "up", self._request, is_head)
        is_head, self._is_answered = not self._is_answered, True
        return Passing(self._device, "down", self._request, is_head)
