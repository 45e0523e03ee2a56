"""Running the coordinator: one process, one state folder, one listening socket."""

import asyncio
import errno
import fcntl
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import uvicorn

from coordinator import heap
from coordinator.app import create_app
from coordinator.http.connections import Limits, Sparse, check_all, protocol, quiet_on_exhaustion
from coordinator.rounds.timeline import Clock
from coordinator.security.private import make_private
from coordinator.settings import Settings
from coordinator.worker import Worker
from lamina.errors import ConfigError, PortInUseError
from lamina.files import write_durably

_LISTEN_BACKLOG = 1024
_ACCEPTED_AT_ONCE = 64  # asyncio accepts so many before the first of them can be told that there are too many
_TICKS_PER_SECOND = 10  # of uvicorn's main loop


def serve(
    settings: Settings,
    on_listening: Callable[[str], None] = lambda url: None,
    clock: Clock = time.time,
) -> None:
    """Serves until SIGINT or SIGTERM; `on_listening` gets the address as URL, which also stands in `<state>/address`.

    Raises PortInUseError, ConfigError if another coordinator has the state folder, StoreError.
    """
    heap.keep_small()
    make_private(settings.state)
    with _only_user_of(settings.state), _bind(settings.host, settings.port) as listener:
        settings.address.unlink(missing_ok=True)
        url = _url(settings.host, listener.getsockname()[1])

        def announce() -> None:
            write_durably(settings.address, url.encode() + b"\n")
            on_listening(url)

        # No access log: it would be the one place where every request of every device is written down.
        app = create_app(settings, clock, time.monotonic)
        config = uvicorn.Config(
            app,
            http=protocol(Limits.of_machine(settings.connections, settings.idle_seconds)),
            ws="none",
            timeout_keep_alive=ceil(settings.idle_seconds),
            backlog=_ACCEPTED_AT_ONCE,
            access_log=False,
            log_level="warning",
            lifespan="on",
        )
        for name in ("uvicorn.error", "asyncio", "lamina.coordinator"):
            logging.getLogger(name).addFilter(Sparse())
        asyncio.run(_Server(config, announce, settings.address, app.state.worker).serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """A uvicorn server that tells when it listens, and takes its address back when it stops."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], address: Path, worker: Worker) -> None:
        super().__init__(config)
        self._announce = announce
        self._address = address
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(quiet_on_exhaustion)
        await super().startup(sockets)
        self._worker.start()
        for listener in sockets or ():
            listener.listen(_LISTEN_BACKLOG)
        if self.started:
            self._announce()

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_SECOND == 0:
            check_all(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await asyncio.to_thread(self._worker.stop)
        # Here and not after serve(): uvicorn ends the process with the signal that stopped it.
        self._address.unlink(missing_ok=True)


@contextmanager
def _only_user_of(state: Path) -> Iterator[None]:
    """Holds the state folder's lock; the kernel drops it with the process, however that ends."""
    with (state / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another coordinator works on {state}; stop it, or give this one another --state folder"
            ) from error
        yield


@contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket; port 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} is no address of this machine: {error.strerror}") from error
    # With the protocol named: asyncio turns off Nagle's delay (40 ms for each answer) only where it sees IPPROTO_TCP.
    with socket.socket(family, kind, protocol) as listener:
        # A restart must not wait for the old connections' TIME_WAIT; a listening socket is refused all the same.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_LISTEN_BACKLOG)
        except OSError as error:
            raise _bind_error(host, port, error) from error
        yield listener


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {port} of {host} is taken by another process; stop it, or choose another with --port (0 takes a free one)"
        )
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port")


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
