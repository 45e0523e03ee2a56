"""Digests of messages, so that one that was damaged on its way is noticed and sent again.

`Content-Digest` (RFC 9530) is over a body. The first line and the headers of a request say as much as its body does, such as
which round an update is for and how many examples it stands for; `Lamina-Request-Digest` is over those.

This is against bad networks, and against nobody's intent: who can alter a message can alter its digest as well.
"""

from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256

CONTENT_DIGEST = "Content-Digest"
REQUEST_DIGEST = "Lamina-Request-Digest"
COVERED = ("Authorization", CONTENT_DIGEST, "Content-Encoding", "Lamina-Report", "Lamina-Signature")
"""The headers that a request digest covers, in this order; one that is absent counts as empty."""


def content_digest(body: bytes | bytearray) -> str:
    return _written(sha256(body).digest())


def written(sha256_hex: str) -> str:
    """The header for a sha256 of 64 hex digits."""
    return _written(bytes.fromhex(sha256_hex))


def request_digest(method: str, target: str, headers: Mapping[str, str]) -> str:
    """Of the method, the path with its query, and the covered headers, a line each. `headers` has their names as in
    COVERED."""
    lines = (method, target, *(headers.get(name, "") for name in COVERED))
    return _written(sha256("\n".join(lines).encode("latin-1", "replace")).digest())


def _written(digest: bytes) -> str:
    return f"sha-256=:{b64encode(digest).decode()}:"
