"""What survives of a split run: one file for each run, written when a round ends or an evaluation arrives."""

from pydantic import Field

from coordinator.house import House
from lamina.bounds import Count
from lamina.bundles.manifest import Sha256
from lamina.files import write_durably
from lamina.record import Record
from lamina.split.wire import SplitRound


class SplitState(Record):
    """`round` is the next one to train; `evaluating` are the users (id -> name) whose evaluation of the round before it is
    awaited; `evaluated` those that have answered. `superseded` are the blobs that the last round's weights replaced."""

    format: int = 1
    run: str
    manifest: Sha256
    round: Count = 0
    fused: bool = False
    weights: dict[str, Sha256]
    superseded: tuple[Sha256, ...] = ()
    rounds: tuple[SplitRound, ...] = ()
    evaluating: dict[str, str] = Field(default_factory=dict)
    evaluated: tuple[str, ...] = ()


def save_state(house: House, state: SplitState) -> None:
    write_durably(house.settings.state / "split" / f"{state.run}.json", state.to_json())
