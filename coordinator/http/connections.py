"""Connections with limits in number and silence: uvicorn's own protocol waits for ever for a request that never comes.

    too many                the one that has waited longest for its next request makes room, of the address that has the most
    no whole request head   closed after `idle_seconds`, counted from the connection's beginning or its last answer
    an answer nobody takes  closed when the peer has taken next to nothing of it for `stall_seconds`

A body that does not end is the business of whoever reads it (`coordinator.http.bodies`); one that nobody reads counts as
silence.
"""

import asyncio
import logging
import resource
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.http.problems import problem
from lamina.errors import BusyError, LaminaError, ProtocolError

_RESERVED_FILES = 200
"""For the database, the log and whatever else; each connection may have one more open, its blob or its upload."""
_MANY_FILES = 8192
_STALL_BYTES = 16 << 10
_READ_BYTES = 32 << 10


@dataclass(frozen=True)
class Limits:
    """`per_address` is of one address, `connections` of all."""

    connections: int = 400
    per_address: int = 200
    idle_seconds: float = 10.0
    stall_seconds: float = 60.0

    @classmethod
    def of_machine(cls, connections: int, idle_seconds: float) -> "Limits":
        """At most `connections`, and fewer where the process may not open enough files. Raises its own limit where it may."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        files = _MANY_FILES if soft == resource.RLIM_INFINITY else soft
        connections = max(8, min(connections, (files - _RESERVED_FILES) // 2))
        return cls(connections, max(4, connections // 2), idle_seconds)


class Connection(H11Protocol):
    """One connection; `limits` are those of the class that `protocol` makes."""

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_BYTES  # asyncio's own is 256 KiB: too much for each of many that say a lot at once
        self.waits_since = self.loop.time()
        self._unsent = (0, self.waits_since)
        self._make_room()

    def on_response_complete(self) -> None:
        self.waits_since = self.loop.time()
        super().on_response_complete()

    @property
    def is_waiting(self) -> bool:
        """No request is being served."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_closing(self) -> bool:
        return self.transport.is_closing()

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    def check(self, now: float) -> None:
        """Ends what is silent; called every second or so."""
        unsent = self.transport.get_write_buffer_size()
        before, since = self._unsent
        if unsent == 0 or unsent > before or before - unsent >= _STALL_BYTES:
            self._unsent = (unsent, now)
        elif now - since > self.limits.stall_seconds:
            self.transport.abort()
        if unsent == 0 and self.is_waiting and now - self.waits_since > self.limits.idle_seconds:
            if self.cycle is None and self.conn.trailing_data[0]:
                self.refuse(ProtocolError("the request did not come within the time for it; send it again"), 408)
            self.transport.abort() if self.transport.is_closing() else self.transport.close()

    def refuse(self, error: LaminaError, status: int | None = None) -> None:
        """Answers what never became a request, and closes."""
        answer = problem(error, status, {"Connection": "close"})
        try:
            head = h11.Response(status_code=answer.status_code, headers=answer.raw_headers)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # an answer is under way already; what follows on this connection makes no sense
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status >= 500:  # h11's 501 of a Transfer-Encoding that it does not know: the request is at fault, not the server
            status = 400
        way_out = "its head is too large" if status == 431 else "see docs/protocol.md"
        self.refuse(ProtocolError(f"this is no HTTP/1.1 request that can be served: {way_out}"), status)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing is upgraded here, and the request is served as it is."""

    def _make_room(self) -> None:
        if len(self.connections) <= self.limits.per_address:
            return
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self and not one.is_closing]
        mine = [one for one in others if one.address == self.address]
        waiting = [one for one in others if one.is_waiting]
        if len(mine) >= self.limits.per_address:
            waiting = [one for one in mine if one.is_waiting]
        elif len(others) < self.limits.connections:
            return
        elif waiting:
            most = Counter(one.address for one in waiting).most_common(1)[0][0]
            waiting = [one for one in waiting if one.address == most]
        if waiting:
            # Who has never asked for anything first: a device that waits between two check-ins has. Several of them at a time,
            # so that a flood is not looked through for each of its connections.
            waiting.sort(key=lambda one: (one.cycle is not None, one.waits_since))
            for victim in (waiting[0], *(one for one in waiting[1 : len(waiting) // 8] if one.cycle is None)):
                victim.transport.abort()
        else:
            self.refuse(BusyError("there are too many connections; ask again a little later", 2), 503)


def protocol(limits: Limits) -> type[Connection]:
    return type("BoundedConnection", (Connection,), {"limits": limits})


def check_all(connections: Iterable[Any], now: float) -> None:
    for connection in list(connections):
        if isinstance(connection, Connection):
            connection.check(now)


class Sparse(logging.Filter):
    """Lets each warning pass a few times a minute for each peer: what they send must not fill the disk with lines about it."""

    MOST, SECONDS = 5, 60.0

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        about = record.args[0] if isinstance(record.args, tuple) and record.args else ""
        key = f"{str(record.msg)[:200]} {str(about)[:100]}"
        since, count = self._seen.get(key, (record.created, 0))
        if record.created - since > self.SECONDS:
            since, count = record.created, 0
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] = (since, count + 1)
        if count + 1 == self.MOST:
            record.msg = f"{record.msg} (more of these are not logged for a minute)"
        return count < self.MOST


def quiet_on_exhaustion(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio tells of each connection that it could not accept, with a traceback."""
    if "out of system resource" in context.get("message", ""):
        logging.getLogger("asyncio").error("no file can be opened for a new connection: %s", context.get("exception"))
    else:
        loop.default_exception_handler(context)
