"""What a user should know of a round beside its numbers, one sentence each."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.rounds import is_calibrated
from coordinator.rounds.stages import early_end
from coordinator.store.old_messages import read_stored
from coordinator.store.tables import SHOWN_NAME, DeviceRow, EvaluationRow, PlaceRow, RoundRow, RunRow, UpdateRow
from lamina.bundles.manifest import Manifest
from lamina.federation.influence import MOST_MEDIANS, Size, count_within_bounds
from lamina.federation.modalities import from_text, is_measured_alike
from lamina.federation.terms import Terms, shortfall
from lamina.plans.plan import Plan
from lamina.wire import Evaluation

_MOST_NOTES = 20


def notes_of(house: House, session: Session, run: RunRow, row: RoundRow) -> tuple[str, ...]:
    """Larger transfers than the plan allows, updates that count in part, accuracy by modalities, a missing calibration, a stage
    that ended early."""
    manifest = house.manifest(run.manifest)
    plan = manifest.plan
    notes = [*_transfers(session, plan, row), *_bounded(session, manifest, row), *_accuracies(session, plan, row)]
    if plan.calibration and row.phase in ("evaluating", "closed") and not is_calibrated(session, row):
        notes.append(f"not calibrated: no calibrator sent an update within {plan.cohort.deadline_seconds:g} s")
    if ended := _end_of_stage(session, plan, run, row):
        notes.append(ended)
    return tuple(notes)


def last_end(session: Session, plan: Plan, run: RunRow) -> str:
    """Why the stage before the one where the run stands ended early, or the last one of a finished run; empty if it did not."""
    stage = run.stage if run.is_finished else run.stage - 1
    return early_end(session, plan, run.number, stage) if stage >= 0 else ""


def _transfers(session: Session, plan: Plan, row: RoundRow) -> list[str]:
    found = session.execute(
        select(SHOWN_NAME, PlaceRow)
        .join(DeviceRow, DeviceRow.id == PlaceRow.device_id)
        .where(PlaceRow.round_id == row.id, PlaceRow.is_lost.is_(False), PlaceRow.has_asked)
        .order_by(SHOWN_NAME)
    ).all()
    larger = (
        (name, shortfall(plan.training, Terms(place.download_encoding, place.upload_encoding, place.compression)))
        for name, place in found
    )
    return [f"{name} takes {note}" for name, note in larger if note]


def _bounded(session: Session, manifest: Manifest, row: RoundRow) -> list[str]:
    """The updates of which the plan's bounds let only a part count; how long they are next to others shows once all are in."""
    cohort = manifest.plan.cohort
    rows = session.execute(
        select(SHOWN_NAME, UpdateRow)
        .join(DeviceRow, DeviceRow.id == UpdateRow.device_id)
        .where(UpdateRow.round_id == row.id)
        .order_by(SHOWN_NAME)
    ).all()
    specs = {update.modalities: manifest.exchange_specs(row.stage, from_text(update.modalities)) for _, update in rows}
    sizes = [Size(update.num_examples, update.norm, specs[update.modalities]) for _, update in rows]
    notes = []
    for (name, update), size, counted in zip(rows, sizes, count_within_bounds(cohort, sizes), strict=True):
        if counted.num_examples < size.num_examples:
            told = f"{counted.num_examples} of the {size.num_examples} examples that it tells of"
            notes.append(f"{name} counts with {told} (cohort.max_examples)")
        if counted.scale < 1 and row.phase != "training":
            length = f"its update of norm {update.norm or 0:.4g} is {counted.ratio:.4g} times the median of the round"
            notes.append(f"{name} is clipped: {length}, at most {cohort.max_norm or MOST_MEDIANS:g} count (cohort.max_norm)")
    if cohort.max_norm is not None and len(sizes) == 1 and row.phase != "training":
        notes.append(
            f"cohort.max_norm: {rows[0][0]} sent the only update, which has no other to compare with and counts as it is"
        )
    return [
        *notes[:_MOST_NOTES],
        *([f"and {len(notes) - _MOST_NOTES} more updates are bounded"] if notes[_MOST_NOTES:] else []),
    ]


def _accuracies(session: Session, plan: Plan, row: RoundRow) -> list[str]:
    """The accuracy of each set of modalities, where devices with different ones evaluated: one number would mix them."""
    answers = session.scalars(
        select(EvaluationRow).where(EvaluationRow.round_id == row.id, EvaluationRow.evaluation.is_not(None))
    ).all()
    by_set: dict[tuple[str, ...], list[Evaluation]] = {}
    for answer in answers:
        modalities = from_text(answer.modalities)
        by_set.setdefault(modalities, []).append(read_stored(Evaluation, answer.evaluation or ""))
    if set(by_set) <= {()}:
        return []
    sets = ((), *plan.device_modalities)
    return [f"{_measure(plan, key)}: {_accuracy(by_set[key])}" for key in sets if key in by_set]


def _measure(plan: Plan, modalities: tuple[str, ...]) -> str:
    words = f"{' and '.join(modalities)} alone" if modalities else "all modalities"
    if is_measured_alike(plan, modalities):
        return f"accuracy with {words}"
    return f"other view found first with {words} (not part of the accuracy)"


def _accuracy(evaluations: Sequence[Evaluation]) -> str:
    examples = sum(evaluation.num_examples for evaluation in evaluations)
    correct = sum(evaluation.correct for evaluation in evaluations)
    return f"{correct / examples:.4f} of {examples} examples"


def _end_of_stage(session: Session, plan: Plan, run: RunRow, row: RoundRow) -> str:
    """Why the stage of a round ended early, if this round was its last."""
    if plan.self_tuning is None or row.phase != "closed" or (row.stage == run.stage and not run.is_finished):
        return ""
    following = session.scalar(
        select(RoundRow.id).where(
            RoundRow.run_number == run.number, RoundRow.stage == row.stage, RoundRow.round == row.round + 1
        )
    )
    return "" if following is not None else early_end(session, plan, run.number, row.stage)
