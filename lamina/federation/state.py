"""Where a run and its round stand, and every way from one state to another, by name.

    round    training -> aggregating (-> calibrating) -> evaluating -> closed; it never goes back
    run      running <-> paused; running or paused -> failed, cancelled; running -> finished

Whoever keeps the state, in rows or in memory, moves it by these names alone; no other way exists.
"""

from enum import Enum
from typing import Literal

from lamina.wire import RunState

RoundPhase = Literal["training", "aggregating", "calibrating", "evaluating", "closed"]


class RoundTransition(Enum):
    """FROM and TO of a round."""

    COMPLETE = (("training",), "aggregating")
    """It has the updates that it waits for, or takes what has come: at its deadline, or because an operator said so."""
    CALIBRATE = (("aggregating",), "calibrating")
    """The new weights are named, and a calibrator trains them once more."""
    EVALUATE = (("aggregating", "calibrating"), "evaluating")
    """The weights of the round are final."""
    CLOSE = (("evaluating",), "closed")
    """Whoever was asked has answered, or is not awaited any longer."""

    def __init__(self, sources: tuple[RoundPhase, ...], target: RoundPhase) -> None:
        self.sources, self.target = sources, target

    def after(self, phase: RoundPhase) -> RoundPhase:
        """The phase that follows. Raises ValueError if there is no such way."""
        if phase not in self.sources:
            raise ValueError(f"a round in phase {phase!r} cannot {self.name.lower()}: that starts from {_listed(self.sources)}")
        return self.target


class RunTransition(Enum):
    """FROM and TO of a run."""

    PAUSE = (("running",), "paused")
    RESUME = (("running", "paused", "failed"), "running")
    CANCEL = (("running", "paused", "failed"), "cancelled")
    FAIL = (("running", "paused"), "failed")
    FINISH = (("running", "paused", "failed", "finished"), "finished")
    """Its last stage is over. Not only from running: a run may be taken back to its very end."""
    TAKE_BACK = (("failed", "finished"), "running")
    """To a round that closed; a paused run that is taken back stays paused."""

    def __init__(self, sources: tuple[RunState, ...], target: RunState) -> None:
        self.sources, self.target = sources, target

    def after(self, state: RunState) -> RunState:
        """The state that follows. Raises ValueError if there is no such way."""
        if state not in self.sources:
            raise ValueError(f"a run that is {state} cannot {self.name.lower()}: that starts from {_listed(self.sources)}")
        return self.target


def _listed(states: tuple[str, ...]) -> str:
    return " or ".join(states)
