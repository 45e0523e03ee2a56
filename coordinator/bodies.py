"""Reading request bodies: JSON up to a limit into memory, everything else as a stream to disk."""

import base64
import binascii
import re

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from coordinator.incoming import Incoming
from lamina.compression import Compression
from lamina.digests import CONTENT_DIGEST
from lamina.errors import ProtocolError, TooLargeError
from lamina.wire import MAX_JSON_BYTES

_WRITE_BYTES = 1 << 20  # collected before a write: one hop to a thread per MiB instead of one per network packet
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")


async def read_json(request: Request) -> bytes:
    """The body of a JSON request. Raises TooLargeError above MAX_JSON_BYTES, before more than that has been read."""
    check_length(request, MAX_JSON_BYTES)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_JSON_BYTES:
            raise TooLargeError(f"the body is larger than the {MAX_JSON_BYTES} bytes that a JSON message may have")
    return bytes(data)


async def receive(request: Request, incoming: Incoming) -> None:
    """Streams the body into a file. Raises ProtocolError if fewer bytes arrive than Content-Length said."""
    pending = bytearray()
    async for piece in request.stream():
        pending += piece
        if len(pending) >= _WRITE_BYTES:
            await run_in_threadpool(incoming.write, bytes(pending))
            pending.clear()
    if pending:
        await run_in_threadpool(incoming.write, bytes(pending))
    promised = content_length(request)
    if promised is not None and incoming.size_bytes != promised:
        raise ProtocolError(f"the body ended after {incoming.size_bytes} of {promised} bytes; send it again")


def check_length(request: Request, limit_bytes: int) -> None:
    """Refuses a body by its announced length, before any of it is read."""
    length = content_length(request)
    if length is not None and length > limit_bytes:
        raise TooLargeError(f"the body has {length} bytes, at most {limit_bytes} are legal here")


def content_length(request: Request) -> int | None:
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ProtocolError(f"Content-Length {text[:40]!r} is no number")
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
