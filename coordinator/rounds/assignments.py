"""What a device is given to do, from the rows of its run."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import DeviceRow, RoundRow, RunRow, TeacherRow, WeightRow
from lamina.federation.assignment import assign
from lamina.federation.policy import Position
from lamina.federation.terms import Terms
from lamina.wire import Assignment, Phase


def make_assignment(
    house: House,
    session: Session,
    run: RunRow,
    row: RoundRow,
    device: DeviceRow,
    phase: Phase,
    terms: Terms,
    modalities: tuple[str, ...] = (),
) -> Assignment:
    """The work of a device in a round, with the float32 blobs of the weights. Stored facts alone decide it."""
    newest = session.execute(select(WeightRow.segment, WeightRow.blob).where(WeightRow.run_number == run.number)).all()
    teacher = session.execute(
        select(TeacherRow.segment, TeacherRow.blob).where(TeacherRow.run_number == run.number, TeacherRow.stage == row.stage)
    ).all()
    return assign(
        house.manifest(run.manifest),
        run.manifest,
        run.id,
        phase,
        Position(row.stage, row.round),
        device.name,
        terms,
        modalities,
        {segment: blob for segment, blob in newest},
        {segment: blob for segment, blob in teacher},
    )
