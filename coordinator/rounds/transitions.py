"""The rows of runs and rounds change their states here and nowhere else, by the ways that `lamina.federation.state` names."""

from coordinator.store.tables import RoundRow, RunRow
from lamina.federation.state import RoundTransition, RunTransition


def move_round(row: RoundRow, transition: RoundTransition, now: float) -> None:
    """Raises ValueError if the round's phase has no such way."""
    row.phase, row.since_unix_seconds = transition.after(row.phase), now


def move_run(run: RunRow, transition: RunTransition, now: float, reason: str = "") -> None:
    """`reason` is told of a run that was halted. Raises ValueError if the run's state has no such way."""
    state = transition.after(run.state)
    run.is_finished = state == "finished"
    run.halt = state if state in ("paused", "cancelled", "failed") else ""
    run.halt_reason, run.halted_unix_seconds = (reason, now) if run.halt else ("", None)
