"""Network streams that end: a peer that says or takes a byte now and then runs into no time-out of a socket."""

import time
from collections.abc import Callable, Iterable
from ssl import SSLContext
from typing import Any

import httpcore

HEAD_SECONDS = 60.0
"""From the end of a request to the end of the head of its answer, whatever comes in between."""
_WRITE_BYTES = 16 << 10
_WRITE_BYTES_PER_SECOND = 500

Clock = Callable[[], float]


class BoundedBackend(httpcore.NetworkBackend):
    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._inner, self._clock = httpcore.SyncBackend(), clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return BoundedStream(stream, self._clock)


class BoundedStream(httpcore.NetworkStream):
    """Reads have `HEAD_SECONDS` in all since the last write, until `head_came`; the reader of a body has bounds of its own."""

    def __init__(self, inner: httpcore.NetworkStream, clock: Clock) -> None:
        self._inner, self._clock = inner, clock
        self._head_ends: float | None = None
        self._is_body = False

    def head_came(self) -> None:
        self._is_body = True

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self._is_body:
            if self._head_ends is None:
                self._head_ends = self._clock() + HEAD_SECONDS
            left = self._head_ends - self._clock()
            if left <= 0:
                raise httpcore.ReadTimeout(f"the head of the answer did not end within {HEAD_SECONDS:.0f} s")
            timeout = left if timeout is None else min(timeout, left)
        return self._inner.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._head_ends, self._is_body = None, False
        ends = self._clock() + HEAD_SECONDS + len(buffer) / _WRITE_BYTES_PER_SECOND
        for start in range(0, len(buffer), _WRITE_BYTES):
            if (left := ends - self._clock()) <= 0:
                raise httpcore.WriteTimeout(f"the peer took only {start} of {len(buffer)} bytes in the time for them")
            self._inner.write(buffer[start : start + _WRITE_BYTES], left if timeout is None else min(timeout, left))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return BoundedStream(self._inner.start_tls(ssl_context, server_hostname, timeout), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
