"""What a run has done and what it waits for, as a user sees it."""

from math import isfinite

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.rounds import get_run
from coordinator.rounds.waiting import describe, describe_round
from coordinator.store.old_messages import read_stored
from coordinator.store.tables import SHOWN_NAME, DeviceRow, EvaluationRow, RoundRow, RunRow, UpdateRow, WeightRow
from coordinator.view.notes import last_end, notes_of
from lamina.encoding.tensors import ENCODINGS
from lamina.federation.losses import mean_by_examples
from lamina.federation.modalities import from_text, is_measured_alike
from lamina.wire import DeviceReport, Evaluation, RoundStatus, RunList, RunStatus, TrainReport


def list_runs(house: House) -> RunList:
    """All runs in the order of publishing."""
    with house.database.read() as session:
        return RunList(runs=tuple(run.id for run in session.scalars(select(RunRow).order_by(RunRow.number))))


def run_status(house: House, run_id: str) -> RunStatus:
    """A run with all of its rounds so far. Raises UnknownNameError."""
    now = house.clock()
    with house.database.read() as session:
        run = get_run(session, run_id)
        rows = session.scalars(
            select(RoundRow).where(RoundRow.run_number == run.number).order_by(RoundRow.stage, RoundRow.round)
        ).all()
        ended = last_end(session, house.manifest(run.manifest).plan, run)
        weights = session.execute(select(WeightRow.segment, WeightRow.blob).where(WeightRow.run_number == run.number)).all()
        return RunStatus(
            run=run.id,
            name=run.name,
            state=run.state,
            manifest=run.manifest,
            stage=run.stage,
            round=run.round,
            detail="; ".join(part for part in (ended, describe(house, session, run, now)) if part),
            rounds=tuple(_round_status(house, session, run, row, now) for row in rows),
            weights={segment: blob for segment, blob in weights},
        )


def _round_status(house: House, session: Session, run: RunRow, row: RoundRow, now: float) -> RoundStatus:
    answered = session.scalars(
        select(EvaluationRow).where(EvaluationRow.round_id == row.id, EvaluationRow.evaluation.is_not(None))
    ).all()
    plan = house.manifest(run.manifest).plan
    alike = [answer for answer in answered if is_measured_alike(plan, from_text(answer.modalities))]
    evaluations = [read_stored(Evaluation, answer.evaluation or "") for answer in alike]
    examples = sum(evaluation.num_examples for evaluation in evaluations)
    loss = mean_by_examples((evaluation.loss, evaluation.num_examples) for evaluation in evaluations)
    return RoundStatus(
        stage=row.stage,
        round=row.round,
        # To a user, a round whose new weights are being made is still the training part of it; `waiting_for` says which.
        state="training" if row.phase == "aggregating" or row.phase == "calibrating" else row.phase,
        waiting_for=describe_round(house, session, run, row, now),
        updates=_reports(session, row),
        test_examples=examples,
        test_correct=sum(evaluation.correct for evaluation in evaluations),
        test_loss=loss if isfinite(loss) else None,
        evaluated_encodings=tuple(
            encoding for encoding in ENCODINGS[1:] if any(answer.download_encoding == encoding for answer in answered)
        ),
        notes=notes_of(house, session, run, row),
    )


def _reports(session: Session, row: RoundRow) -> tuple[DeviceReport, ...]:
    found = session.execute(
        select(SHOWN_NAME, UpdateRow)
        .join(DeviceRow, DeviceRow.id == UpdateRow.device_id)
        .where(UpdateRow.round_id == row.id)
        .order_by(SHOWN_NAME)
    ).all()
    return tuple(
        DeviceReport(
            device=name,
            engine=update.engine,
            report=read_stored(TrainReport, update.report),
            download_encoding=update.download_encoding,
            upload_encoding=update.upload_encoding,
            upload_compression=update.upload_compression,
            modalities=from_text(update.modalities),
        )
        for name, update in found
    )
