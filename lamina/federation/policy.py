"""A round policy: when a round may start, who may join, when it closes, what an update weighs, and what comes next.

A policy decides from counts and seconds alone. Whoever drives it, the coordinator with rows or the simulation in memory, counts
the devices, keeps the clock and does what the policy says.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from lamina.encoding.rng import Stream
from lamina.federation.influence import Counted, Size


class Position(NamedTuple):
    """A round of a stage, both counted from 0; round -1 is the moment before a stage's first one."""

    stage: int
    round: int


class RoundPolicy(Protocol):
    """One policy is one file: `lamina.federation.synchronous` is the first."""

    def may_start(self, here: int) -> bool:
        """Whether a round may start with so many devices that ask for work."""
        ...

    def draw(self, names: Iterable[str], position: Position) -> list[str] | None:
        """The devices that have a place from the start, of those that are here; None: places go to whoever asks first."""
        ...

    def may_join(self, held: int) -> bool:
        """Whether one more device may take a place where so many are held."""
        ...

    def closes(self, updates: int, seconds: float) -> bool:
        """Whether a round with so many updates, so many seconds after it started, takes no more of them."""
        ...

    def weight(self, sizes: Sequence[Size]) -> list[Counted]:
        """What of each update of a round counts."""
        ...

    def ends_stage(self, position: Position, losses: Sequence[float]) -> bool:
        """Whether this round is the last one of its stage. `losses` are what the plan measures, for each round so far."""
        ...

    def next(self, position: Position, losses: Sequence[float]) -> Position | None:
        """What comes after a round that is closed, or at the beginning of a stage; None: the run is finished. A stage may have
        no rounds: then this is asked again."""
        ...


def draw_cohort(names: Iterable[str], size: int, seed: int, stage: int, round_number: int) -> list[str]:
    """`size` of these devices, uniformly and without replacement. The arguments alone decide, not the order of the names."""
    ordered = sorted(names)
    return [ordered[place] for place in Stream(f"{seed}/{stage}/{round_number}/cohort").shuffled(len(ordered))[:size]]
