"""What an operator can do to a run. Each command is one transaction with its row in the history: done, or as if never asked.

    pause         no new work; devices finish what they have, and no lease or deadline runs
    resume        goes on, also after a failure: the open round then begins anew, with the updates that it has
    cancel        ends the run for good and frees its devices; its weights stay
    close_round   the open round goes on with the updates, the calibration or the evaluations that are there
    rollback      back to a round that closed, with its weights: all rounds after it are undone, and trained again

A command that finds what it would bring about changes nothing and says so, so it may be sent again when its answer was lost;
`rollback` again undoes what has begun since.
"""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.rounds import advance, count_updates, current_round, get_run, is_calibrated
from coordinator.rounds.stages import move_on, what_follows
from coordinator.rounds.timeline import make_up_for
from coordinator.rounds.transitions import move_round, move_run
from coordinator.store.snapshots import Position, forget, kept_rounds, read_snapshot
from coordinator.store.tables import (
    CalibrationRow,
    EvaluationRow,
    PlaceRow,
    RecallRow,
    RoundRow,
    RunRow,
    TeacherRow,
    UpdateRow,
)
from coordinator.store.weights import name_rule_state, name_weights
from coordinator.view.history import note
from lamina.errors import BundleError, ConfigError
from lamina.federation.state import RoundTransition, RunTransition
from lamina.wire import HistoryEntry, RunCommand


def operate(house: House, run_id: str, command: RunCommand, who: str) -> HistoryEntry:
    """Carries a command out. Not while a round is aggregated: the caller sees to that (`Worker.paused`).

    Raises UnknownNameError, ConfigError for what cannot be done in the run's state, BundleError for weights that are lost.
    """
    now = house.clock()
    undone: list[int] = []
    given_up: list[int] = []
    with house.database.write() as session:
        house.clock.store(session, now, is_urgent=True)
        run = get_run(session, run_id)
        advance(house, session, run, now)
        before, detail = _standing(run), command.reason
        match command.command:
            case "pause":
                _require(run, "pause", ("running", "paused"))
                if run.state == "running":
                    move_run(run, RunTransition.PAUSE, now, command.reason)
            case "resume":
                _require(run, "resume", ("paused", "failed", "running"))
                _resume(house, session, run, now)
            case "cancel":
                _require(run, "cancel", ("running", "paused", "failed", "cancelled"))
                if run.state != "cancelled":
                    move_run(run, RunTransition.CANCEL, now, command.reason)
                given_up = [row.id] if (row := current_round(session, run)) else []
            case "close_round":
                _require(run, "close a round of", ("running",))
                detail = _join(_close_round(house, session, run, command, now), detail)
            case "rollback":
                _require(run, "take back rounds of", ("running", "paused", "failed", "finished"))
                undone = _roll_back(house, session, run, command, now)
                detail = _join(f"{len(undone)} rounds undone", detail)
        session.flush()
        advance(house, session, run, now)
        after = _standing(run)
        was_done = before != after or bool(undone) or command.command == "close_round"
        entry = note(house, session, command.command, before, after, who, run, detail=detail, is_kept=was_done)
    for round_id in (*undone, *given_up):
        house.trouble.pop(round_id, None)
        house.remove_bodies(round_id)
    return entry


def _standing(run: RunRow) -> str:
    """State and place, as the history tells them."""
    return f"{run.state}, stage {run.stage} round {run.round}"


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _require(run: RunRow, what: str, states: Sequence[str]) -> None:
    if run.state not in states:
        raise ConfigError(f"{run.id} is {run.state}: one cannot {what} such a run, only one that is {' or '.join(states)}")


def _resume(house: House, session: Session, run: RunRow, now: float) -> None:
    cohort = house.manifest(run.manifest).plan.cohort
    if run.state == "paused":
        make_up_for(session, run, cohort, now - (run.halted_unix_seconds or now), now)
    elif run.state == "failed" and (row := current_round(session, run)) is not None:
        row.since_unix_seconds = now
        for place in session.scalars(select(PlaceRow).where(PlaceRow.round_id == row.id)):
            if session.get(UpdateRow, (row.id, place.device_id)) is None:
                session.delete(place)
        house.trouble.pop(row.id, None)
    move_run(run, RunTransition.RESUME, now)


def _close_round(house: House, session: Session, run: RunRow, command: RunCommand, now: float) -> str:
    """What was done, for the history."""
    row = current_round(session, run)
    if row is None:
        raise ConfigError(f"round {run.round} of stage {run.stage} of {run.id} has not started, so there is nothing to close")
    if command.round is not None and (command.stage, command.round) != (row.stage, row.round):
        raise ConfigError(
            f"{run.id} stands in round {row.round} of stage {row.stage}, not in round {command.round} of stage "
            f"{command.stage}; look at `lamina status` and say again which one is to close"
        )
    if row.phase == "training":
        updates = count_updates(session, row)
        if updates == 0:
            raise ConfigError(
                f"round {row.round} of stage {row.stage} of {run.id} has no update yet, and a round closes with at least one; "
                "wait for one, or cancel the run"
            )
        move_round(row, RoundTransition.COMPLETE, now)
        return f"round {row.round} of stage {row.stage} closed with {updates} updates"
    if row.phase == "evaluating" or (row.phase == "calibrating" and not is_calibrated(session, row)):
        phase = row.phase
        row.since_unix_seconds = now - house.manifest(run.manifest).plan.cohort.deadline_seconds
        return f"round {row.round} of stage {row.stage} waits no longer in phase {phase}"
    return f"round {row.round} of stage {row.stage} is being aggregated already"


def _roll_back(house: House, session: Session, run: RunRow, command: RunCommand, now: float) -> list[int]:
    """Row ids of the rounds that were undone."""
    manifest = house.manifest(run.manifest)
    target: Position = (
        (-1, -1) if command.round is None else (run.stage if command.stage is None else command.stage, command.round)
    )
    kept = kept_rounds(session, run)
    if command.round is None:
        blobs = dict(manifest.initial_weights)
    elif target in kept:
        blobs = read_snapshot(session, run, target)
    else:
        known = ", ".join(f"{stage}.{number}" for stage, number in kept) or "none yet"
        raise ConfigError(
            f"the weights of round {target[1]} of stage {target[0]} of {run.id} are not kept. As STAGE.ROUND, these are: "
            f"{known}; and `start` for the initial ones. `lamina serve --keep-rounds` says how many"
        )
    if lost := [blob for blob in blobs.values() if house.blobs.find(blob) is None]:
        raise BundleError(f"blob {lost[0]} of those weights is gone from the coordinator's disk; go back to another round")
    rows = session.scalars(select(RoundRow).where(RoundRow.run_number == run.number)).all()
    undone = [row for row in rows if (row.stage, row.round) > target]
    if not undone and not run.has_ended:
        return []
    undone_ids = [row.id for row in undone]
    for row in undone:
        _recall(session, run, row)
        for table in (PlaceRow, UpdateRow, EvaluationRow, CalibrationRow):
            session.execute(delete(table).where(table.round_id == row.id))
        session.delete(row)
    forget(session, run, [position for position in kept if position > target])
    session.execute(delete(TeacherRow).where(TeacherRow.run_number == run.number, TeacherRow.stage > max(target[0], 0)))
    name_weights(session, run, blobs)
    name_rule_state(session, run, "")
    run.stage, run.round, run.since_unix_seconds = max(target[0], 0), target[1] + 1, now
    run.undone_round_id = max([run.undone_round_id, *undone_ids])
    if run.state in RunTransition.TAKE_BACK.sources:
        move_run(run, RunTransition.TAKE_BACK, now)
    session.flush()
    last = next((row for row in rows if (row.stage, row.round) == target), None)
    if last is not None:
        move_on(session, manifest, run, what_follows(session, manifest.plan, last), now)
    return undone_ids


def _recall(session: Session, run: RunRow, row: RoundRow) -> None:
    """Whoever may still be at work for an undone round is told to stop before it is given any of the same number."""
    sent = set(session.scalars(select(UpdateRow.device_id).where(UpdateRow.round_id == row.id)))
    asked = set(session.scalars(select(PlaceRow.device_id).where(PlaceRow.round_id == row.id))) - sent
    asked |= set(
        session.scalars(
            select(EvaluationRow.device_id).where(EvaluationRow.round_id == row.id, EvaluationRow.evaluation.is_(None))
        )
    )
    asked |= set(
        session.scalars(
            select(CalibrationRow.device_id).where(CalibrationRow.round_id == row.id, CalibrationRow.body_sha256.is_(None))
        )
    )
    for device_id in asked:
        session.merge(RecallRow(run_number=run.number, device_id=device_id))
