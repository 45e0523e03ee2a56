"""From an assignment to a job: downloads what is missing, verifies it, and writes down where everything lies."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_client.data import LocalData, limits_of
from edge_client.identity import IDENTITY_FILE
from edge_client.job import (
    SPLITS,
    Augmentation,
    FeaturePlan,
    FrozenStep,
    Heartbeat,
    Job,
    ProgramFile,
    SegmentFile,
    Split,
    Tensor,
)
from edge_client.stored import row_dtype
from lamina.errors import EngineError
from lamina.manifest import EngineName, Manifest, Program
from lamina.model import Encoder, ModuleEncoder
from lamina.names import LABEL, Role
from lamina.plan import Training
from lamina.segments import Segment, TensorSpec
from lamina.tensors import hash_bytes
from lamina.wire import Assignment, CheckIn

Fetch = Callable[[str], Path]
"""A blob's file by its sha256, downloaded if it is not there yet, and verified."""


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

    Raises EngineError if the bundle has no programs for this engine, DataError for data that changed meanwhile.
    """
    plan, stage = manifest.plan, manifest.plan.stages[work.stage]
    split: Split = "train" if work.phase == "train" else "test"
    supervised = plan.model.objective.kind == "supervised"
    chains = {modality: stage.frozen_chain(plan.model, modality) for modality in plan.model.modalities}
    stored = _stored_examples(manifest, data, chains, disk_bytes)
    keys = {
        (encoder.modality, each): _keys(manifest, work, data, engine, encoder, each, chains[encoder.modality], stored[each])
        for encoder in plan.model.encoders
        for each in SPLITS
    }
    folder = state / "features"
    return Job(
        phase=work.phase,
        run=work.run,
        stage=work.stage,
        round=work.round,
        device=device,
        engine=engine,
        seed=plan.seed,
        objective=plan.model.objective.kind,
        limits=limits_of(plan.model),
        batch_size=plan.training.batch_size,
        micro_batch=plan.training.samples_in_memory,
        local_epochs=plan.training.local_epochs,
        learning_rate=stage.learning_rate,
        optimizer=plan.training.optimizer.model_dump(),
        upload_encoding=work.upload_encoding,
        upload_compression=work.upload_compression,
        programs={role: _program(manifest, blob, role, fetch) for role, blob in _roles(manifest, work, engine).items()},
        active=tuple(_segment(manifest.segment(name), fetch(work.weights[name])) for name in stage.active),
        features=tuple(
            _feature_plan(manifest, work, data, fetch, engine, folder, encoder, split, chains, keys, stored[split])
            for encoder in plan.model.encoders
            if data.examples(split)
        ),
        keep_keys=tuple(chain for chains_of_views in keys.values() for chain in chains_of_views),
        feature_encoding=plan.training.features.encoding,
        feature_folder=str(folder),
        stored_examples=stored[split],
        label=data.location(split, LABEL) if supervised and data.examples(split) else None,
        examples=data.examples(split),
        work_folder=str(state / "work"),
        heartbeat=Heartbeat(
            url=f"{url}/v1/check-in",
            body=check_in.to_json().decode(),
            token_file=str(state / IDENTITY_FILE),
            lease_seconds=work.lease_seconds,
        ),
    )


def _roles(manifest: Manifest, work: Assignment, engine: EngineName) -> dict[Role, str]:
    """Role -> blob of the programs of this phase."""
    stage = manifest.stages[work.stage]
    if engine not in stage.train:
        raise EngineError(f"run {manifest.plan.name!r} has no programs for {engine!r}; it has {list(manifest.engines)}")
    training = work.phase == "train"
    if engine not in manifest.loss_programs:
        return {"train": stage.train[engine]} if training else {"eval": stage.eval[engine]}
    roles: dict[Role, str] = {"embed": stage.eval[engine], "loss": manifest.loss_programs[engine]}
    return roles | {"backward": stage.train[engine]} if training else roles


def _feature_plan(
    manifest: Manifest,
    work: Assignment,
    data: LocalData,
    fetch: Fetch,
    engine: EngineName,
    folder: Path,
    encoder: Encoder | ModuleEncoder,
    split: Split,
    chains: dict[str, list[str]],
    keys: dict[tuple[str, Split], tuple[tuple[str, ...], ...]],
    stored: int,
) -> FeaturePlan:
    modality, training = encoder.modality, manifest.plan.training
    own = keys[modality, split]
    names = chains[modality]
    # What is computed in part, or is not there, needs its segments; behind a whole file nothing does.
    first_missing = min((_depth(folder, chain) for chain in own), default=0) if stored == data.examples(split) else 0
    steps = []
    for place, name in enumerate(names):
        blob = _frozen_program(manifest, engine, name)
        program = manifest.programs[blob]
        if place >= first_missing:
            step = FrozenStep(
                _segment(manifest.segment(name), fetch(work.weights[name])),
                _program(manifest, blob, "frozen", fetch),
                limits_of(manifest.plan.model).get(modality) if place == 0 else None,
            )
        else:
            step = FrozenStep(_segment(manifest.segment(name), None), _program_file(program, "frozen", None))
        steps.append(step)
    return FeaturePlan(
        modality=modality,
        rows=data.location(split, modality),
        steps=tuple(steps),
        keys=own,
        augmentation=_augmentation(training, encoder, manifest.plan.seed) if split == "train" else None,
    )


def _stored_examples(
    manifest: Manifest, data: LocalData, chains: dict[str, list[str]], disk_bytes: int | None
) -> dict[Split, int]:
    """How many examples of each split have their features on disk, so that all files together stay within the budget.

    While one file is extended by a segment, its old and its new form exist: room for the largest file is kept free.
    """
    if disk_bytes is None:
        return {split: data.examples(split) for split in SPLITS}
    training = manifest.plan.training
    sizes: dict[Split, int] = {}
    largest = 0
    for split in SPLITS:
        row = 0
        for encoder in manifest.plan.model.encoders:
            if chains[encoder.modality]:
                depths = range(len(chains[encoder.modality]))
                dtypes = [row_dtype(encoder.feature_shape(depth), training.features.encoding) for depth in depths]
                dtype = max(dtypes, key=lambda each: each.itemsize)
                views = training.features.views if split == "train" else 1
                row += views * dtype.itemsize
                largest = max(largest, dtype.itemsize * data.examples(split))
        sizes[split] = row * data.examples(split)
    needed = sum(sizes.values()) + largest
    share = min(1.0, disk_bytes / needed) if needed else 1.0
    return {split: int(data.examples(split) * share) for split in SPLITS}


def _keys(
    manifest: Manifest,
    work: Assignment,
    data: LocalData,
    engine: EngineName,
    encoder: Encoder | ModuleEncoder,
    split: Split,
    names: Sequence[str],
    stored: int,
) -> tuple[tuple[str, ...], ...]:
    """Cache keys after each frozen step, for each view.

    The program is part of a key: the same weights in another graph, or in another engine, give other features.
    """
    training = manifest.plan.training
    augmentation = training.augmentation.get(encoder.modality) if split == "train" else None
    steps = [(name, work.weights[name], _frozen_program(manifest, engine, name)) for name in names]
    views = []
    for view in range(training.features.views if augmentation else 1):
        version = None if augmentation is None else [view, manifest.plan.seed, augmentation.model_dump()]
        facts = [data.fingerprint, encoder.modality, split, training.features.encoding, stored, version]
        views.append(tuple(hash_bytes(json.dumps([facts, steps[: depth + 1]]).encode())[:40] for depth in range(len(names))))
    return tuple(views)


def _depth(folder: Path, keys: Sequence[str]) -> int:
    """How many steps are on disk; whether the file is undamaged, the trainer finds out."""
    return next((depth for depth in range(len(keys), 0, -1) if any(folder.glob(f"{keys[depth - 1]}-*.npy"))), 0)


def _augmentation(training: Training, encoder: Encoder | ModuleEncoder, seed: int) -> Augmentation | None:
    found = training.augmentation.get(encoder.modality)
    if found is None:
        return None
    axes = {"audio_frames": (0,), "sensor_windows": (-1,), "values": (-1,)}.get(encoder.input.kind, (-2, -1))
    return Augmentation(
        axes, found.shift, found.noise, found.flip, int(hash_bytes(f"{seed}/{encoder.modality}".encode())[:15], 16)
    )


def _frozen_program(manifest: Manifest, engine: EngineName, name: str) -> str:
    try:
        return manifest.frozen_programs[engine][name]
    except KeyError:
        raise EngineError(f"run {manifest.plan.name!r} has no frozen program of {name} for {engine!r}") from None


def _program(manifest: Manifest, blob: str, role: Role, fetch: Fetch) -> ProgramFile:
    return _program_file(manifest.programs[blob], role, fetch(blob))


def _program_file(program: Program, role: Role, path: Path | None) -> ProgramFile:
    """One file may serve two roles (torch derives the gradients itself), so the role is that of the place, not the file's."""
    return ProgramFile(
        path=str(path or ""),
        blob=program.blob,
        role=role,
        weights=program.weights,
        inputs=_tensors(program.inputs),
        max_batch=program.max_batch,
        precision=program.precision,
    )


def _segment(segment: Segment, path: Path | None) -> SegmentFile:
    return SegmentFile(segment.name, str(path or ""), _tensors(segment.tensors))


def _tensors(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    return tuple(Tensor(spec.name, spec.shape, spec.dtype) for spec in specs)
