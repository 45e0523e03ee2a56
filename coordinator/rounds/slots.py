"""What may count an update: a device's place in the cohort, or the calibration of the round."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.rounds import get_round, get_run
from coordinator.rounds.waiting import describe_halt
from coordinator.store.tables import CalibrationRow, PlaceRow, RoundRow, RunRow, UpdateRow
from lamina.bundles.manifest import Manifest
from lamina.errors import RoundClosedError, UpdateRejectedError
from lamina.federation.content import MAX_DIFFERENCE
from lamina.federation.modalities import from_text
from lamina.plans.segments import TensorSpec
from lamina.record import Record


class Address(Record):
    """Which device sends, and for which round."""

    device_id: str
    run: str
    stage: int
    round: int

    @property
    def text(self) -> str:
        return f"round {self.round} of stage {self.stage} of {self.run}"


@dataclass(frozen=True)
class Expected:
    """What the body of an update must hold: these tensors, and no value beyond `max_difference`."""

    specs: list[TensorSpec]
    max_difference: float = MAX_DIFFERENCE


@dataclass(frozen=True)
class Slot:
    """`expected` is what the update must be to count there."""

    run: RunRow
    row: RoundRow
    place: PlaceRow | CalibrationRow
    expected: Expected


def require_open(run: RunRow, now: float) -> None:
    """Raises RoundClosedError if the run was cancelled or has failed."""
    if run.halt and run.has_ended:
        raise RoundClosedError(f"{describe_halt(run, now)}; check in for new work")


def find_slot(house: House, session: Session, address: Address, digest: str) -> Slot | None:
    """What may count the update with this body; None if the same one is counted already.

    Raises UnknownNameError, RoundClosedError, UpdateRejectedError.
    """
    run = get_run(session, address.run)
    row = get_round(house, session, run, address.stage, address.round)
    update = session.get(UpdateRow, (row.id, address.device_id))
    calibration = session.get(CalibrationRow, row.id)
    if calibration is not None and calibration.device_id != address.device_id:
        calibration = None
    if digest in (update and update.body_sha256, calibration and calibration.body_sha256):
        return None
    require_open(run, house.clock())
    manifest = house.manifest(run.manifest)
    if row.phase == "calibrating" and calibration is not None and calibration.body_sha256 is None:
        return Slot(run, row, calibration, Expected(manifest.specs(manifest.calibrated(row.stage))))
    counted = (update and update.body_sha256) or (calibration and calibration.body_sha256)
    if counted is not None:
        raise UpdateRejectedError(
            f"{address.text} has counted another update of this device, sha256 {counted}; "
            "a round counts one, check in for new work"
        )
    if row.phase != "training":
        raise RoundClosedError(f"{address.text} takes no more updates; check in for new work")
    place = session.get(PlaceRow, (row.id, address.device_id))
    if place is None and run.undone_round_id:
        raise RoundClosedError(f"this device has no place in {address.text}, which was taken back once; check in for new work")
    if place is None:
        raise UpdateRejectedError(f"this device has no place in {address.text}; check in to get one")
    if place.is_lost:
        raise RoundClosedError(
            f"the lease of this device in {address.text} was over and another one has its place; check in for new work"
        )
    return Slot(run, row, place, _expected(manifest, row, place))


def _expected(manifest: Manifest, row: RoundRow, place: PlaceRow) -> Expected:
    specs = manifest.exchange_specs(row.stage, from_text(place.modalities))
    plan = manifest.plan
    return Expected(specs, MAX_DIFFERENCE / max(1.0, plan.server_learning_rate * plan.aggregation.gain))
