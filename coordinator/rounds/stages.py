"""When a stage ends, and what is remembered when the next one begins. Decided by stored rows alone: a restart decides the same.

With `plan.self_tuning`, a stage may end before its last round. The losses are what the devices told: one that lies can
end a stage early, or keep it going to its last round, and nothing else.
"""

import logging
from collections.abc import Iterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.rounds.transitions import move_run
from coordinator.store.old_messages import read_stored
from coordinator.store.tables import EvaluationRow, RoundRow, RunRow, TeacherRow, UpdateRow, WeightRow
from lamina.bundles.manifest import Manifest
from lamina.federation.assignment import teacher_segments
from lamina.federation.losses import mean_by_examples
from lamina.federation.modalities import from_text, is_measured_alike
from lamina.federation.policies import policy_of
from lamina.federation.policy import Position
from lamina.federation.state import RunTransition
from lamina.plans.plan import Plan
from lamina.wire import Evaluation, TrainReport

log = logging.getLogger("lamina.coordinator")


def ends_with(session: Session, plan: Plan, row: RoundRow) -> bool:
    """Whether a round is the last one of its stage, as far as its rows say by now.

    With the measure `test_loss` they say so only once the round is evaluated.
    """
    return policy_of(plan).ends_stage(Position(row.stage, row.round), stage_losses(session, plan, row))


def what_follows(session: Session, plan: Plan, row: RoundRow) -> Position | None:
    """What comes after a round that is closed; None: the run's end."""
    return policy_of(plan).next(Position(row.stage, row.round), stage_losses(session, plan, row))


def stage_losses(session: Session, plan: Plan, row: RoundRow) -> list[float]:
    """What self-tuning measures, for each round of the stage up to this one; nothing in a plan without.

    A round that nobody evaluated has no test loss, and one of devices whose loss is another than the plan's
    (`is_measured_alike`) has none at all.
    """
    if plan.self_tuning is None:
        return []
    rounds = session.scalars(
        select(RoundRow.id)
        .where(RoundRow.run_number == row.run_number, RoundRow.stage == row.stage, RoundRow.round <= row.round)
        .order_by(RoundRow.round)
    ).all()
    measure = _test_losses if plan.self_tuning.measure == "test_loss" else _train_losses
    measured = [list(measure(session, plan, round_id)) for round_id in rounds]
    return [mean_by_examples(losses) for losses in measured if losses]


def move_on(session: Session, manifest: Manifest, run: RunRow, to: Position | None, now: float) -> None:
    """Moves a run to a round, or to its end.

    A finished run stays at its last stage and its number of rounds, so that its status still points at something that exists.
    """
    is_stage_over = to is None or to.stage != run.stage
    if is_stage_over and (ended := early_end(session, manifest.plan, run.number, run.stage)):
        log.info("%s: %s", run.id, ended)
    if to is None:
        run.since_unix_seconds = now
        move_run(run, RunTransition.FINISH, now)
        log.info("%s is finished", run.id)
        return
    run.stage, run.round, run.since_unix_seconds = to.stage, to.round, now
    if not is_stage_over:
        return
    for name in teacher_segments(manifest, run.stage):
        blob = session.get_one(WeightRow, (run.number, name)).blob
        session.add(TeacherRow(run_number=run.number, stage=run.stage, segment=name, blob=blob))


def early_end(session: Session, plan: Plan, run_number: int, stage: int) -> str:
    """Why a stage that is over had fewer rounds than planned; empty if it had them all."""
    rounds = session.scalars(
        select(func.count()).select_from(RoundRow).where(RoundRow.run_number == run_number, RoundRow.stage == stage)
    ).one()
    tuning, planned = plan.self_tuning, plan.stages[stage].rounds
    if tuning is None or rounds == planned:
        return ""
    share = f" by {100 * tuning.min_improvement:g} %" if tuning.min_improvement else ""
    counted = "rounds" if tuning.measure == "train_loss" else "evaluated rounds"
    return (
        f"stage {stage} ended after {rounds} of {planned} rounds: {tuning.measure.replace('_', ' ')} did not improve{share} "
        f"in {tuning.patience} {counted}"
    )


def _train_losses(session: Session, plan: Plan, round_id: int) -> Iterator[tuple[float, int]]:
    for update in session.scalars(select(UpdateRow).where(UpdateRow.round_id == round_id)):
        if is_measured_alike(plan, from_text(update.modalities)):
            report = read_stored(TrainReport, update.report)
            yield report.loss, report.num_examples


def _test_losses(session: Session, plan: Plan, round_id: int) -> Iterator[tuple[float, int]]:
    answers = select(EvaluationRow).where(EvaluationRow.round_id == round_id, EvaluationRow.evaluation.is_not(None))
    for answer in session.scalars(answers):
        if is_measured_alike(plan, from_text(answer.modalities)):
            evaluation = read_stored(Evaluation, answer.evaluation or "")
            yield evaluation.loss, evaluation.num_examples
