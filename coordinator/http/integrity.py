"""Messages arrive as they were sent, or the sender learns that they did not: digests of every request and every answer.

A request is checked against the digests that it brings; one without them, of an older device or another client, is taken as it
is. Every answer but the stream of a blob, whose address is its digest, brings one of its body.
"""

from hashlib import sha256

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.http.problems import problem
from lamina.digests import CONTENT_DIGEST, COVERED, REQUEST_DIGEST, content_digest, request_digest, written
from lamina.errors import HashMismatchError
from lamina.printable import printable


class Integrity:
    """An ASGI middleware. The problem document of a damaged request has the code `hash-mismatch`, whatever was damaged: its
    sender must not take it for a refusal of what it meant to say."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        answer = send if scope["method"] == "HEAD" else _with_digest(send)
        if REQUEST_DIGEST in headers and headers[REQUEST_DIGEST] != request_digest(scope["method"], _target(scope), headers):
            damaged = HashMismatchError("the head of the request is not the one that was sent; send it again")
            await problem(damaged)(scope, receive, answer)
            return
        await self._app(scope, _checked(receive, headers.get(CONTENT_DIGEST)), answer)


def _headers(scope: Scope) -> dict[str, str]:
    """The headers that digests are about, by the names that `lamina.digests` has for them."""
    names = {name.lower().encode(): name for name in (*COVERED, REQUEST_DIGEST)}
    return {names[name]: value.decode("latin-1").strip() for name, value in scope["headers"] if name in names}


def _target(scope: Scope) -> str:
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope.get("query_string", b"")
    return str((path + b"?" + query if query else path).decode("latin-1"))


def _checked(receive: Receive, announced: str | None) -> Receive:
    """Raises HashMismatchError, where the body is read, at the end of one that is not as announced. A header that is no sha256
    is left to whoever needs it."""
    if announced is None or not announced.startswith("sha-256=:"):
        return receive
    seen = sha256()

    async def checked() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            seen.update(message.get("body", b""))
            if not message.get("more_body", False) and (arrived := written(seen.hexdigest())) != announced:
                raise HashMismatchError(f"the body has {arrived}, its header says {printable(announced, 80)}; send it again")
        return message

    return checked


def _with_digest(send: Send) -> Send:
    """Holds the head of an answer back until its body is known, and adds the digest where that is all of it."""
    start: Message | None = None

    async def digested(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        if start is not None:
            if not message.get("more_body", False):
                digest = content_digest(message.get("body", b"")).encode()
                start["headers"] = [*start.get("headers", ()), (CONTENT_DIGEST.lower().encode(), digest)]
            head, start = start, None
            await send(head)
        await send(message)

    return digested
