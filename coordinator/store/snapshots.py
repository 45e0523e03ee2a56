"""The weights with which the last rounds of a run closed, so that it can go back to one of them."""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import RoundRow, RunRow, SnapshotRow, SupersededRow, WeightRow

Position = tuple[int, int]
"""Stage and round."""


def keep_snapshot(house: House, session: Session, run: RunRow, row: RoundRow) -> None:
    """Remembers the weights of a round that closes, and forgets those of rounds before the last `keep_rounds`."""
    if house.settings.keep_rounds:
        for weight in session.scalars(select(WeightRow).where(WeightRow.run_number == run.number)):
            session.add(
                SnapshotRow(run_number=run.number, stage=row.stage, round=row.round, segment=weight.segment, blob=weight.blob)
            )
        session.flush()
    kept = kept_rounds(session, run)
    forget(session, run, kept[: max(len(kept) - house.settings.keep_rounds, 0)])


def kept_rounds(session: Session, run: RunRow) -> Sequence[Position]:
    """The closed rounds whose weights are kept, in their order."""
    found = session.execute(
        select(SnapshotRow.stage, SnapshotRow.round)
        .where(SnapshotRow.run_number == run.number)
        .distinct()
        .order_by(SnapshotRow.stage, SnapshotRow.round)
    ).all()
    return [(stage, number) for stage, number in found]


def read_snapshot(session: Session, run: RunRow, position: Position) -> dict[str, str]:
    """Segment -> blob."""
    found = session.execute(
        select(SnapshotRow.segment, SnapshotRow.blob).where(
            SnapshotRow.run_number == run.number, SnapshotRow.stage == position[0], SnapshotRow.round == position[1]
        )
    ).all()
    return {segment: blob for segment, blob in found}


def forget(session: Session, run: RunRow, positions: Sequence[Position]) -> None:
    """Their blobs are deleted when nothing else needs them (`coordinator.store.variants`)."""
    for position in positions:
        for blob in set(read_snapshot(session, run, position).values()):
            session.merge(SupersededRow(blob=blob))
        session.execute(
            delete(SnapshotRow).where(
                SnapshotRow.run_number == run.number, SnapshotRow.stage == position[0], SnapshotRow.round == position[1]
            )
        )
