"""What a bad network does to the bytes of one direction of a connection, drawn from a seed.

cut        the connection ends with a reset, for both sides
truncate   the receiver sees a regular end, and the rest never comes
delay      the bytes stand still for a while
flip       one bit arrives inverted
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal["cut", "truncate", "delay", "flip"]
SHARES: dict[Kind, float] = {"cut": 0.2, "truncate": 0.2, "delay": 0.2, "flip": 0.4}
LONGEST_DELAY_SECONDS = 1.0


@dataclass(frozen=True)
class Fault:
    """After `after_bytes` more bytes in order. `bit` is that of the next byte which a flip inverts."""

    kind: Kind
    after_bytes: int
    seconds: float = 0.0
    bit: int = 0


def draw(random: Random, mean_bytes: float) -> Iterator[Fault]:
    """An endless row of faults, `mean_bytes` apart on average: every byte is as likely as any other to be hit."""
    while True:
        (kind,) = random.choices(tuple(SHARES), tuple(SHARES.values()))
        yield Fault(
            kind,
            after_bytes=int(random.expovariate(1 / mean_bytes)),
            seconds=random.uniform(0, LONGEST_DELAY_SECONDS),
            bit=random.randrange(8),
        )
