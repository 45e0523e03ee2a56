"""From accepted updates to new weights: read what was accepted, apply the plan's rule, store what it gives, and move on.

A crash anywhere repeats the whole from the same rows and gives the same bytes: the round leaves the phase in the one
transaction that also names the new weights.
"""

import logging

from sqlalchemy import select

from coordinator.aggregation.calibration import apply_calibration, due_calibrations
from coordinator.house import House
from coordinator.rounds.evaluating import begin_evaluation
from coordinator.rounds.rounds import advance, fail_run
from coordinator.rounds.transitions import move_round
from coordinator.store.tables import RoundRow, RunRow, UpdateRow
from coordinator.store.weights import (
    name_rule_state,
    name_weights,
    put_rule_state,
    put_segments,
    read_rule_state,
    read_weights,
)
from lamina.errors import LaminaError, StoreError
from lamina.federation.aggregation import Contribution, aggregate
from lamina.federation.content import check_accepted
from lamina.federation.influence import Size
from lamina.federation.modalities import from_text
from lamina.federation.policies import policy_of
from lamina.federation.state import RoundTransition
from lamina.files import raise_if_full

log = logging.getLogger("lamina.coordinator")

ATTEMPTS = 3
"""So often is a round aggregated that fails for a reason which cannot pass, such as a damaged file; then its run fails."""


class Aggregator:
    """Aggregates whatever is due, one round at a time, for the worker (`coordinator.worker`)."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._hopeless: dict[int, int] = {}
        """How often a round (by row id) failed for a reason that will not pass by itself."""

    def run_due(self) -> None:
        """A failure is logged, told in the status, and tried again at the next call; one that cannot pass ends the run."""
        attempted: set[tuple[str, int]] = set()
        while (due := self._due() - attempted) != set():
            work = min(due)
            attempted.add(work)
            self._attempt(*work)

    def _due(self) -> set[tuple[str, int]]:
        """What is to be done, and for which round (by row id)."""
        with self._house.database.read() as session:
            aggregating = session.scalars(
                select(RoundRow.id)
                .join(RunRow, RunRow.number == RoundRow.run_number)
                .where(RoundRow.phase == "aggregating", RunRow.halt.in_(("", "paused")))
            ).all()
            due = {("aggregation", round_id) for round_id in aggregating}
            return due | {("calibration", round_id) for round_id in due_calibrations(session)}

    def _attempt(self, work: str, round_id: int) -> None:
        house = self._house
        try:
            if work == "aggregation":
                aggregate_round(house, round_id)
            else:
                apply_calibration(house, round_id)
            house.trouble.pop(round_id, None)
            self._hopeless.pop(round_id, None)
            house.variants.remove_outdated(house.manifest)
        except Exception as error:
            reason = _as_lamina(error, house).message
            house.trouble[round_id] = reason
            log.error("%s of %s failed", work, self._text_of(round_id), exc_info=error)
            if not _may_pass(error):
                self._hopeless[round_id] = self._hopeless.get(round_id, 0) + 1
            if self._hopeless.get(round_id, 0) >= ATTEMPTS:
                del self._hopeless[round_id]
                fail_round(house, round_id, f"the {work} failed {ATTEMPTS} times: {reason}")

    def _text_of(self, round_id: int) -> str:
        with self._house.database.read() as session:
            row = session.get_one(RoundRow, round_id)
            return f"{row.text} of run-{row.run_number}"


def fail_round(house: House, round_id: int, reason: str) -> None:
    """Ends the run of a round that cannot be aggregated."""
    with house.database.read() as session:
        row = session.get_one(RoundRow, round_id)
        run_id = session.get_one(RunRow, row.run_number).id
    fail_run(house, run_id, f"round {row.round} of stage {row.stage}: {reason}")


def aggregate_round(house: House, round_id: int) -> None:
    """Makes the new weights of a round in phase `aggregating` and moves its run on. Raises DiskFullError, StoreError."""
    with house.database.read() as session:
        row = session.get_one(RoundRow, round_id)
        run = session.get_one(RunRow, row.run_number)
        stage, manifest = row.stage, house.manifest(run.manifest)
        plan = manifest.plan
        start = read_weights(house, session, run, plan.stages[stage].active)
        state = read_rule_state(house, run)
        updates = session.scalars(select(UpdateRow).where(UpdateRow.round_id == round_id)).all()
        sets = {update.modalities: from_text(update.modalities) for update in updates}
        specs = {text: manifest.exchange_specs(stage, modalities) for text, modalities in sets.items()}
        sizes = [Size(update.num_examples, update.norm, specs[update.modalities]) for update in updates]
        contributions = [
            Contribution(
                update.content_sha256,
                counted.num_examples,
                house.update_file(round_id, update.device_id),
                specs[update.modalities],
                counted.scale,
                update.norm or 0.0,
            )
            for update, counted in zip(updates, policy_of(plan).weight(sizes), strict=True)
        ]
    for contribution in contributions:
        check_accepted(contribution.path, contribution.content_sha256, contribution.specs or manifest.exchange_specs(stage))
    trained = {name for modalities in sets.values() for name in manifest.exchange(stage, modalities)}
    specs_of_round = manifest.exchange_specs(stage)
    new, state = aggregate(start, contributions, specs_of_round, plan.aggregation, plan.server_learning_rate, state)
    blobs = put_segments(house, manifest, sorted(trained), new)
    commit_round(house, round_id, blobs, put_rule_state(house, state))
    remove_updates(house, round_id)


def commit_round(house: House, round_id: int, blobs: dict[str, str], rule_state: str) -> None:
    """In one transaction: name the new weights, ask for the calibration or for evaluations, leave the phase."""
    now = house.clock()
    with house.database.write() as session:
        row = session.get_one(RoundRow, round_id)
        run = session.get_one(RunRow, row.run_number)
        name_weights(session, run, blobs)
        name_rule_state(session, run, rule_state)
        log.info("%s: round %d of stage %d is aggregated", run.id, row.round, row.stage)
        if house.manifest(run.manifest).plan.calibration:
            move_round(row, RoundTransition.CALIBRATE, now)
        else:
            begin_evaluation(house, session, run, row, now)
        session.flush()
        advance(house, session, run, now)


def remove_updates(house: House, round_id: int) -> None:
    """Deletes the bodies of an aggregated round; the rows stay, so that repeats are still known."""
    for path in house.settings.updates.glob(f"{round_id}-*"):
        path.unlink()


def remove_leftovers(house: House) -> None:
    """Deletes bodies that a crash left behind: of cancelled runs, and of rounds whose aggregation or calibration is over."""
    open_round = select(RoundRow.id).join(RunRow, RunRow.number == RoundRow.run_number).where(RunRow.halt != "cancelled")
    with house.database.read() as session:
        needed = set(session.scalars(open_round.where(RoundRow.phase.in_(("training", "aggregating")))))
        calibrating = set(session.scalars(open_round.where(RoundRow.phase == "calibrating")))
    kept = {house.calibration_file(round_id) for round_id in calibrating}
    for path in house.settings.updates.iterdir():
        round_id = path.name.partition("-")[0]
        is_past = int(round_id) not in needed if round_id.isdecimal() else round_id == "calibration" and path not in kept
        if is_past:
            path.unlink()


def _may_pass(error: Exception) -> bool:
    """Whether the same attempt may succeed later, as with a full disk. A damaged file stays damaged."""
    if isinstance(error, LaminaError):
        return isinstance(error, StoreError)
    return isinstance(error, OSError | MemoryError) and not isinstance(error, FileNotFoundError)


def _as_lamina(error: Exception, house: House) -> LaminaError:
    if isinstance(error, LaminaError):
        return error
    if not isinstance(error, OSError):
        return LaminaError(f"{type(error).__name__}: {error}")
    try:
        raise_if_full(error, house.settings.blobs / "any")
    except LaminaError as full:
        return full
    return LaminaError(f"{type(error).__name__}: {error.strerror} {error.filename or ''}".rstrip())
