"""Verifying an Ed25519 signature (RFC 8032, section 5.1.7) with Python's integers and nothing else.

Why not a library: a device verifies one signature for each round, and `cryptography` would cost its talking process 6.7 MiB
of 51; this costs nothing that can be measured, and 5 ms. Coordinators and exporters verify with it too, so that all come to the
same verdict. What is verified is public, so that time may depend on it. Nothing here can sign: a secret needs arithmetic whose
time does not depend on it, and `lamina.bundles.keys` has a library do that.

The rules are the strict ones. S must be below the order L, points must be written in their only canonical form, and a key of
small order, under which one signature fits any message, is no key. So a signature cannot be turned into another one that is
also valid, and what one machine accepts all machines accept.
"""

from hashlib import sha512

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, P) % P
_SQRT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)

Point = tuple[int, int, int, int]
"""(X, Y, Z, T) of the affine point x = X/Z, y = Y/Z, with T = XY/Z."""
_NEUTRAL: Point = (0, 1, 1, 0)


def is_public_key(public_key: bytes) -> bool:
    """Whether these are the 32 bytes of a point that may be a key: canonical, and not of small order."""
    point = _decode(public_key)
    return point is not None and not _is_neutral(_double(_double(_double(point))))


def is_valid(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the 64 bytes of `signature` are the key's signature of the message. Never raises for bytes of any length."""
    if len(signature) != 64 or not is_public_key(public_key):
        return False
    s = int.from_bytes(signature[32:], "little")
    key = _decode(public_key)
    if s >= L or key is None:
        return False
    k = int.from_bytes(sha512(signature[:32] + public_key + message).digest(), "little") % L
    x, y, z, t = key
    # R must be s*B - k*A; comparing its bytes also refuses every R that is not written in canonical form.
    return _encode(_sum_of_multiples(s, _BASE, k, (P - x, y, z, P - t))) == signature[:32]


def _sum_of_multiples(a: int, first: Point, b: int, second: Point) -> Point:
    """a * first + b * second, both in one pass over the bits."""
    both = _add(first, second)
    total = _NEUTRAL
    for bit in range(max(a.bit_length(), b.bit_length()) - 1, -1, -1):
        total = _double(total)
        match a >> bit & 1, b >> bit & 1:
            case 1, 1:
                total = _add(total, both)
            case 1, 0:
                total = _add(total, first)
            case 0, 1:
                total = _add(total, second)
    return total


def _add(p: Point, q: Point) -> Point:
    """On this curve (a = -1, d no square) the formula holds for every pair of points, equal and neutral ones included."""
    a = (p[1] - p[0]) * (q[1] - q[0])
    b = (p[1] + p[0]) * (q[1] + q[0])
    c = 2 * p[3] * q[3] % P * _D
    d = 2 * p[2] * q[2]
    e, f, g, h = (b - a) % P, (d - c) % P, (d + c) % P, (b + a) % P
    return e * f % P, g * h % P, f * g % P, e * h % P


def _double(p: Point) -> Point:
    a, b, c = p[0] * p[0], p[1] * p[1], 2 * p[2] * p[2]
    h = (a + b) % P
    e = (h - (p[0] + p[1]) ** 2) % P
    g = (a - b) % P
    f = (c + g) % P
    return e * f % P, g * h % P, f * g % P, e * h % P


def _is_neutral(p: Point) -> bool:
    return p[0] % P == 0 and (p[1] - p[2]) % P == 0


def _encode(p: Point) -> bytes:
    inverse = pow(p[2], -1, P)
    x, y = p[0] * inverse % P, p[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _decode(data: bytes) -> Point | None:
    """The point of 32 bytes; None if there is none, or if they are not its canonical form."""
    if len(data) != 32:
        return None
    number = int.from_bytes(data, "little")
    y, sign = number & (1 << 255) - 1, number >> 255
    if y >= P:
        return None
    square = (y * y - 1) * pow(_D * y * y + 1, -1, P) % P  # d is no square, so the divisor is never 0
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * _SQRT_OF_MINUS_1 % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


def _base() -> Point:
    """The base point: y = 4/5, x even."""
    point = _decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    assert point is not None
    return point


_BASE = _base()
