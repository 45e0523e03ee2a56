"""The part of a round in which devices evaluate its new weights: who is asked, and who is still awaited.

A round that nobody is asked to evaluate (`cohort.evaluate_every`, or no device with test data) passes it at once.
"""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.stages import ends_with
from coordinator.rounds.timeline import deadline_of
from coordinator.rounds.transitions import move_round
from coordinator.store.tables import EvaluationRow, RoundRow, RunRow, UpdateRow
from lamina.federation.state import RoundTransition


def begin_evaluation(house: House, session: Session, run: RunRow, row: RoundRow, now: float) -> None:
    """Asks those who trained and have test data, where the plan wants this round evaluated."""
    plan = house.manifest(run.manifest).plan
    if plan.cohort.evaluates(row.round, ends_with(session, plan, row)):
        lease_ends = now + plan.cohort.lease_seconds
        for update in session.scalars(select(UpdateRow).where(UpdateRow.round_id == row.id, UpdateRow.test_examples > 0)).all():
            session.add(EvaluationRow(round_id=row.id, device_id=update.device_id, lease_ends_unix_seconds=lease_ends))
    move_round(row, RoundTransition.EVALUATE, now)
    session.flush()


def awaited_evaluations(house: House, session: Session, run: RunRow, row: RoundRow, now: float) -> Sequence[EvaluationRow]:
    """Devices that still may answer. A device that renews its lease for ever is waited for until the round's deadline."""
    if now >= deadline_of(row, house.manifest(run.manifest).plan.cohort):
        return []
    return session.scalars(
        select(EvaluationRow).where(
            EvaluationRow.round_id == row.id,
            EvaluationRow.evaluation.is_(None),
            EvaluationRow.lease_ends_unix_seconds > now,
        )
    ).all()
