"""What a device is given to do: the weights that its work needs, and no other."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.terms import Terms
from coordinator.store.tables import DeviceRow, RoundRow, RunRow, TeacherRow, WeightRow
from lamina.bundles.manifest import Manifest
from lamina.plans.depth import drawn_prefix
from lamina.plans.segments import belongs
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
    manifest = house.manifest(run.manifest)
    names = needed_segments(manifest, phase, row.stage, row.round, device.name, modalities)
    return Assignment(
        phase=phase,
        run=run.id,
        manifest=run.manifest,
        stage=row.stage,
        round=row.round,
        weights={name: session.get_one(WeightRow, (run.number, name)).blob for name in names},
        lease_seconds=manifest.plan.cohort.lease_seconds,
        upload_encoding=terms.upload_encoding,
        download_encoding=terms.download_encoding,
        download_compression=terms.compression,
        upload_compression=terms.compression,
        modalities=modalities,
        teacher_weights=_teacher(session, run, row, modalities) if phase == "train" else {},
    )


def needed_segments(
    manifest: Manifest, phase: Phase, stage_index: int, round_number: int, device: str, modalities: tuple[str, ...]
) -> list[str]:
    """The segments whose weights the work needs: with depth dropout, training leaves out frozen ones, by the device's name."""
    if phase == "calibrate":
        return manifest.calibrated(stage_index)
    plan, dropped = manifest.plan, set[str]()
    stage = plan.stages[stage_index]
    dropout = plan.training.depth_dropout
    if dropout is not None and phase == "train":
        for modality in plan.model.modalities:
            chain = stage.frozen_chain(plan.model, modality)
            active_layers = sum(".layers." in name for name in stage.active_chain(plan.model, modality))
            dropped |= {*chain} - {*drawn_prefix(chain, active_layers, dropout, plan.seed, stage_index, round_number, device)}
    return [name for name in (*stage.frozen, *stage.active) if belongs(name, modalities) and name not in dropped]


def _teacher(session: Session, run: RunRow, row: RoundRow, modalities: tuple[str, ...]) -> dict[str, str]:
    """What was remembered when the stage began (`coordinator.rounds.stages`); nothing unless its programs ask for it."""
    found = session.execute(
        select(TeacherRow.segment, TeacherRow.blob).where(TeacherRow.run_number == run.number, TeacherRow.stage == row.stage)
    ).all()
    return {segment: blob for segment, blob in found if belongs(segment, modalities)}
