"""Reading request bodies: JSON up to a limit into memory, everything else as a stream to disk, and nothing for ever.

A body has to come at `MIN_BYTES_PER_SECOND` on the whole, after `GRACE_SECONDS` in which it may stand still. A device sends few
at a time (`InFlight`); whatever may be large waits for its end on disk.
"""

import asyncio
import base64
import binascii
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from coordinator.store.incoming import Incoming
from lamina.digests import CONTENT_DIGEST
from lamina.encoding.compression import Compression
from lamina.errors import BusyError, ProtocolError, TooLargeError
from lamina.wire import MAX_JSON_BYTES, SMALL_JSON_BYTES

GRACE_SECONDS = 10.0
MIN_BYTES_PER_SECOND = 1000
MOST_UPDATES = 8
MOST_STEPS = 3  # these are in memory
_WRITE_BYTES = 16 << 10  # collected before a write: one hop to a thread per so much instead of one per network packet
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")


async def read_json(request: Request) -> bytes:
    """The body of a JSON message. Raises TooLargeError above SMALL_JSON_BYTES, before more than that has been read."""
    return await read(request, SMALL_JSON_BYTES)


async def read(request: Request, limit_bytes: int) -> bytes:
    """The body. Raises TooLargeError above the limit, before more than that has been read."""
    data = bytearray()
    async for piece in pieces(request, limit_bytes):
        data += piece
    return bytes(data)


async def read_manifest(request: Request, incoming: Incoming) -> None:
    """The body of a manifest, of at most MAX_JSON_BYTES, into a file."""
    check_length(request, MAX_JSON_BYTES)
    await receive(request, incoming)


async def receive(request: Request, incoming: Incoming) -> None:
    """Streams the body into a file. Raises ProtocolError if fewer bytes arrive than Content-Length said."""
    pending = b""
    async for piece in pieces(request):
        pending = pending + piece if pending else piece
        if len(pending) >= _WRITE_BYTES:
            await run_in_threadpool(incoming.write, pending)
            pending = b""
    if pending:
        await run_in_threadpool(incoming.write, pending)
    promised = content_length(request)
    if promised is not None and incoming.size_bytes != promised:
        raise ProtocolError(f"the body ended after {incoming.size_bytes} of {promised} bytes; send it again")


async def pieces(request: Request, limit_bytes: int | None = None) -> AsyncIterator[bytes]:
    """The body as it comes. Raises TooLargeError above the limit, and refuses with 408 a body that comes too slowly.

    Only the time of waiting for the sender counts, not that of whoever takes the pieces.
    """
    if limit_bytes is not None:
        check_length(request, limit_bytes)
    loop, stream = asyncio.get_running_loop(), request.stream()
    size, waited = 0, 0.0
    while True:
        began = loop.time()
        try:
            async with asyncio.timeout_at(began + GRACE_SECONDS + size / MIN_BYTES_PER_SECOND - waited):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            waits = f"{size} bytes of the body came in {waited + loop.time() - began:.0f} s"
            raise HTTPException(408, f"{waits}; send it again", {"Connection": "close"}) from None
        waited += loop.time() - began
        size += len(piece)
        if limit_bytes is not None and size > limit_bytes:
            raise TooLargeError(f"the body is larger than the {limit_bytes} bytes that are legal here")
        yield piece


class InFlight:
    """How many bodies each device is sending, at most `most`. Used from the event loop alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bodies: Counter[str] = Counter()

    @contextmanager
    def one_more(self, device: str) -> Iterator[None]:
        """Raises BusyError for one that is sending so many already."""
        if self._bodies[device] >= self._most:
            raise BusyError(f"this device is sending {self._most} other bodies; finish one of them first", 5)
        self._bodies[device] += 1
        try:
            yield
        finally:
            self._bodies[device] -= 1
            if not self._bodies[device]:
                del self._bodies[device]


def manifest_file(folder: Path) -> Incoming:
    """Where a manifest waits for its end."""
    return Incoming(folder, MAX_JSON_BYTES)


def check_length(request: Request, limit_bytes: int) -> None:
    """Refuses a body by its announced length, before any of it is read."""
    length = content_length(request)
    if length is not None and length > limit_bytes:
        raise TooLargeError(f"the body has {length} bytes, at most {limit_bytes} are legal here")


def content_length(request: Request) -> int | None:
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ProtocolError(f"Content-Length {text[:40]!r} is no length of a body")
    return int(text)


def content_compression(request: Request) -> Compression:
    """What the Content-Encoding header says. Raises ProtocolError for a coding that lamina does not know."""
    text = request.headers.get("content-encoding", "identity").strip().lower()
    if text not in ("identity", "zstd"):
        raise ProtocolError(f"Content-Encoding {text[:40]!r} is not known; send the body as it is, or as zstd")
    return "zstd" if text == "zstd" else "none"


def content_digest(request: Request) -> str:
    """The sha256 of the Content-Digest header as 64 hex digits. Raises ProtocolError if it is missing or malformed."""
    text = request.headers.get(CONTENT_DIGEST, "")
    match = _DIGEST.fullmatch(text.strip())
    try:
        raw = base64.b64decode(match.group(1), validate=True) if match else b""
    except binascii.Error:
        raw = b""
    if len(raw) != 32:
        raise ProtocolError(f"{CONTENT_DIGEST} must be `sha-256=:<base64 of 32 bytes>:`, given {text[:80]!r}")
    return raw.hex()
