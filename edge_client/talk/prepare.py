"""From an assignment to a job: downloads what is missing, verifies it, and writes down where everything lies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_client.job import Heartbeat, Job, ProgramFile, SegmentFile, Split
from edge_client.rows.local_data import LocalData, limits_of
from edge_client.talk.identity import IDENTITY_FILE
from edge_client.talk.prepare_features import FeatureWork
from edge_client.talk.program_files import Fetch, frozen_file, program_file, segment_file
from lamina.bundles.manifest import EngineName, Manifest, PartialStage, StagePrograms
from lamina.errors import EngineError, ProtocolError
from lamina.names import ANY_MODALITY, LABEL, Role, second_view
from lamina.plans.plan import Plan, Stage
from lamina.wire import Assignment, CheckIn

__all__ = ["Fetch", "prepare_job"]


def prepare_job(
    work: Assignment,
    manifest: Manifest,
    data: LocalData,
    fetch: Fetch,
    state: Path,
    device: str,
    engine: EngineName,
    check_in: CheckIn,
    url: str,
    disk_bytes: int | None,
) -> Job:
    """Blobs are fetched only for what will run: of a frozen prefix, the segments whose features are not on disk yet.

    Raises EngineError if the bundle has no programs for this engine and the device's modalities, ProtocolError for an
    assignment that lacks weights, DataError for data that changed meanwhile.
    """
    plan = manifest.plan
    model = plan.model.of_device(work.modalities)
    split: Split = "test" if work.phase == "evaluate" else "train"
    encoders = tuple(each for each in model.encoders if not work.modalities or each.modality in work.modalities)
    programs = {
        role: program_file(manifest.programs[blob], role, fetch(blob)) for role, blob in _roles(manifest, work, engine).items()
    }
    if model.objective.kind != plan.model.objective.kind:
        programs = {role: _named(program, *model.modalities) for role, program in programs.items()}
    names = manifest.calibrated(work.stage) if work.phase == "calibrate" else manifest.exchange(work.stage, work.modalities)
    features = FeatureWork(work, manifest, data, fetch, engine, state, encoders).plan(split, disk_bytes)
    return Job(
        phase=work.phase,
        run=work.run,
        stage=work.stage,
        round=work.round,
        device=device,
        engine=engine,
        seed=plan.seed,
        objective=model.objective.kind,
        limits=limits_of(model),
        **_settings(work, plan, names, programs),
        upload_encoding=work.upload_encoding,
        upload_compression=work.upload_compression,
        programs=programs,
        active=tuple(
            segment_file(manifest.segment(name), fetch(_weights_of(name, work)), frozen_file(manifest, name, fetch))
            for name in names
        ),
        features=features.plans,
        keep_keys=features.keep_keys,
        feature_encoding=plan.training.features.encoding,
        feature_folder=str(state / "features"),
        stored_examples=features.stored[split],
        label=data.location(split, LABEL) if model.labels is not None and data.examples(split) else None,
        examples=data.examples(split),
        work_folder=str(state / "work"),
        heartbeat=Heartbeat(
            url=f"{url}/v1/check-in",
            body=check_in.to_json().decode(),
            token_file=str(state / IDENTITY_FILE),
            lease_seconds=work.lease_seconds,
        ),
        kept_folder=str(state / "kept"),
        teacher=_teacher(manifest, work, names, programs, fetch),
    )


def _roles(manifest: Manifest, work: Assignment, engine: EngineName) -> dict[Role, str]:
    """Role -> blob of the programs of this phase."""
    stage = manifest.stages[work.stage]
    if engine not in stage.train:
        raise EngineError(f"run {manifest.plan.name!r} has no programs for {engine!r}; it has {list(manifest.engines)}")
    if work.phase == "calibrate":
        if engine not in stage.calibrate:
            raise EngineError(f"run {manifest.plan.name!r} has no program for {engine!r} that calibrates stage {stage.index}")
        return {"train": stage.calibrate[engine]}
    training = work.phase == "train"
    if set(work.modalities) not in (set(), set(manifest.plan.model.modalities)):
        subset = next((part for part in stage.partial if part.modalities == work.modalities), None)
        if subset is None:
            raise EngineError(
                f"run {manifest.plan.name!r} has no programs for devices with {list(work.modalities)} alone; it has them for "
                f"{[list(part.modalities) for part in stage.partial]}: name the set in the plan's device_modalities"
            )
        return _roles_of(subset, manifest.view_loss_programs, engine, training)
    return _roles_of(stage, manifest.loss_programs, engine, training)


def _roles_of(
    programs: StagePrograms | PartialStage, loss: Mapping[EngineName, str], engine: EngineName, training: bool
) -> dict[Role, str]:
    """One program for the step, or three where there is one for the loss of a whole batch (`lamina.bundles.manifest`)."""
    if engine not in loss:
        return {"train": programs.train[engine]} if training else {"eval": programs.eval[engine]}
    roles: dict[Role, str] = {"embed": programs.eval[engine], "loss": loss[engine]}
    return roles | {"backward": programs.train[engine]} if training else roles


def _named(program: ProgramFile, modality: str) -> ProgramFile:
    """A program for one modality, whichever it is, with the name of this one."""
    names = {ANY_MODALITY: modality, second_view(ANY_MODALITY): second_view(modality)}
    inputs = tuple(replace(each, name=names.get(each.name, each.name)) for each in program.inputs)
    return replace(program, inputs=inputs)


def _settings(work: Assignment, plan: Plan, names: Sequence[str], programs: Mapping[Role, ProgramFile]) -> dict[str, Any]:
    """The fields of a job that say how it trains."""
    training, stage, objective = plan.training, plan.stages[work.stage], plan.model.objective
    settings: dict[str, Any] = {
        "batch_size": training.batch_size,
        "micro_batch": training.samples_in_memory,
        "optimizer": training.optimizer.model_dump(),
        "momentum": objective.momentum if objective.kind == "self_supervised" else 0.0,
    }
    if work.phase == "calibrate":
        if plan.calibration is None:
            raise ProtocolError(f"run {plan.name!r} has no calibration, and the assignment asks for one")
        # Its program takes a whole batch, whatever the plan says of micro-batches.
        most = programs["train"].max_batch
        batch_size = min(training.batch_size, most) if objective.kind != "supervised" else training.batch_size
        return settings | {
            "batch_size": batch_size,
            "micro_batch": min(batch_size, most),
            "local_epochs": plan.calibration.epochs,
            "learning_rate": plan.calibration.learning_rate,
        }
    return settings | {
        "local_epochs": training.local_epochs,
        "learning_rate": stage.learning_rate * _warm_up(stage, work.round, training.warm_up_rounds),
        "rate_scales": tuple(stage.rate_scale(name) for name in names) if stage.rate_scales else (),
        "proximal": training.proximal,
        "keep_optimizer": training.keep_optimizer,
    }


def _warm_up(stage: Stage, round_number: int, rounds: int) -> float:
    """The factor of the learning rate in the first rounds of every stage but the first."""
    return (round_number + 1) / (rounds + 1) if stage.index and round_number < rounds else 1.0


def _teacher(
    manifest: Manifest, work: Assignment, names: Sequence[str], programs: Mapping[Role, ProgramFile], fetch: Fetch
) -> tuple[SegmentFile, ...]:
    """The segments of the stage before, as far as a program asks for them."""
    references = [each for program in programs.values() for each in program.references if each.kind == "teacher"]
    owners = [name for name in names for _ in manifest.segment(name).tensors]
    wanted = {owners[place] for each in references for place in each.tensors}
    lacking = sorted(wanted - set(work.teacher_weights))
    if lacking:
        raise ProtocolError(f"the assignment of stage {work.stage} has no weights of the teacher's {lacking[0]}")
    return tuple(segment_file(manifest.segment(name), fetch(work.teacher_weights[name])) for name in names if name in wanted)


def _weights_of(name: str, work: Assignment) -> str:
    try:
        return work.weights[name]
    except KeyError:
        raise ProtocolError(f"the assignment of stage {work.stage} has no weights of {name}, which it trains") from None
