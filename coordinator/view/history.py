"""What was done to runs and devices, by whom, and how runs ended: rows that are never changed."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import HistoryRow, RunRow
from lamina.wire import History, HistoryEntry

COORDINATOR = "coordinator"
"""Who does what nobody asked for."""


def note(
    house: House,
    session: Session,
    what: str,
    before: str,
    after: str,
    who: str = COORDINATOR,
    run: RunRow | None = None,
    device: str = "",
    detail: str = "",
    is_kept: bool = True,
) -> HistoryEntry:
    """Adds a row, with the time of the wall clock; it is there when the transaction that did it is. The row as a message."""
    row = HistoryRow(
        unix_seconds=max(house.clock.wall(), 0.0),
        who=who,
        what=what,
        run=run.id if run else "",
        device=device,
        before=before,
        after=after,
        detail=detail,
    )
    if is_kept:
        session.add(row)
    return entry_of(row)


def entry_of(row: HistoryRow) -> HistoryEntry:
    return HistoryEntry(
        unix_seconds=row.unix_seconds,
        who=row.who,
        what=row.what,
        run=row.run,
        device=row.device,
        before=row.before,
        after=row.after,
        detail=row.detail,
    )


def read_history(house: House, run: str | None, most: int) -> History:
    """The newest `most` rows, of one run or of all and the devices, the oldest of them first."""
    rows = select(HistoryRow).order_by(HistoryRow.id.desc()).limit(most)
    with house.database.read() as session:
        found = session.scalars(rows if run is None else rows.where(HistoryRow.run == run)).all()
        return History(entries=tuple(entry_of(row) for row in reversed(found)))
