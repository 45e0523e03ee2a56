"""What a device is given to do: the weights that its work needs, and no other; and what is remembered for it."""

from collections.abc import Mapping

from lamina.bundles.manifest import Manifest
from lamina.federation.policy import Position
from lamina.federation.terms import Terms
from lamina.plans.depth import drawn_prefix
from lamina.plans.segments import belongs
from lamina.wire import Assignment, Phase


def assign(
    manifest: Manifest,
    digest: str,
    run: str,
    phase: Phase,
    position: Position,
    device: str,
    terms: Terms,
    modalities: tuple[str, ...],
    newest: Mapping[str, str],
    teacher: Mapping[str, str],
) -> Assignment:
    """The work of a device in a round, with the float32 blobs of the weights: `newest` and, at the end of the stage before,
    `teacher`, by segment. `digest` is the manifest's.
    """
    names = needed_segments(manifest, phase, position.stage, position.round, device, modalities)
    return Assignment(
        phase=phase,
        run=run,
        manifest=digest,
        stage=position.stage,
        round=position.round,
        weights={name: newest[name] for name in names},
        lease_seconds=manifest.plan.cohort.lease_seconds,
        upload_encoding=terms.upload_encoding,
        download_encoding=terms.download_encoding,
        download_compression=terms.compression,
        upload_compression=terms.compression,
        modalities=modalities,
        teacher_weights={name: blob for name, blob in teacher.items() if belongs(name, modalities)} if phase == "train" else {},
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


def needs_teacher(manifest: Manifest, stage: int) -> bool:
    """Whether a program that trains this stage compares with the model at the end of the stage before."""
    programs = manifest.stages[stage]
    trains = [*programs.train.values(), *(digest for part in programs.partial for digest in part.train.values())]
    return any(reference.kind == "teacher" for digest in trains for reference in manifest.programs[digest].references)


def teacher_segments(manifest: Manifest, stage: int) -> list[str]:
    """What is remembered when a stage begins, if a program compares with it: those active segments that were part of the model
    before, norms and heads in layer-wise stages."""
    if stage == 0 or not needs_teacher(manifest, stage):
        return []
    before = manifest.plan.stages[stage - 1]
    return [name for name in manifest.plan.stages[stage].active if name in before.active or name in before.frozen]
