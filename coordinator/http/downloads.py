"""Answering a request for a blob: whole, a range of it, or `not modified` (RFC 9110)."""

import re
from collections.abc import Iterable

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from coordinator.http.problems import problem
from coordinator.store.blobs import Blobs
from lamina.errors import ProtocolError

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def answer_blob(blobs: Blobs, digest: str, request: Request) -> Response:
    """The answer to GET or HEAD. Raises UnknownNameError."""
    size = blobs.path(digest).stat().st_size
    tag = f'"{digest}"'
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Length": str(size),
    }
    if _names(request.headers.get("if-none-match", ""), tag):
        headers.pop("Content-Length")
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    if request.headers.get("if-range", tag) != tag or (wanted and "," in wanted):
        wanted = None  # RFC 9110: another version or several ranges may be answered with the whole
    first, length, status = 0, size, 200
    if wanted is not None:
        found = parse_range(wanted, size)
        if found is None:
            refusal = ProtocolError(f"range {wanted[:60]!r} does not lie within the blob's {size} bytes")
            return problem(refusal, 416, {"Content-Range": f"bytes */{size}"})
        (first, length), status = found, 206
        headers["Content-Range"] = f"bytes {first}-{first + length - 1}/{size}"
        headers["Content-Length"] = str(length)
    body: Iterable[bytes] = () if request.method == "HEAD" else blobs.pieces(digest, first, length)
    return StreamingResponse(body, status, headers, "application/octet-stream")


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """(first byte, length) of `bytes=a-b`, `bytes=a-` or `bytes=-n`; None if it names no byte of the blob."""
    match = _RANGE.fullmatch(text.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    if match.group(1) == "":
        length = min(int(match.group(2)), size)
        return (size - length, length) if length else None
    first = int(match.group(1))
    last = min(int(match.group(2)), size - 1) if match.group(2) else size - 1
    return (first, last - first + 1) if first <= last else None


def _names(header: str, tag: str) -> bool:
    """Whether an If-None-Match header lists the tag."""
    return any(part.strip().removeprefix("W/") in (tag, "*") for part in header.split(","))
