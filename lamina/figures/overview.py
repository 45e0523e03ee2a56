"""What a bundle costs its devices, by stage and modality: read off the manifest, for `lamina export` and `lamina inspect`."""

from collections.abc import Iterable

from lamina.bundles.manifest import EngineName, Manifest, Rewrite
from lamina.encoding.tensors import Encoding
from lamina.figures.cost_report import file_bytes
from lamina.plans.plan import Stage
from lamina.plans.segments import HEAD, prefix_chain, segment_names
from lamina.record import Record


class ModalityRow(Record):
    """One modality of one stage. FLOPs are multiply-accumulates for one sample; bytes are files in the plan's encodings, and of
    frozen tensors in float32, which count as part of the prefix wherever they are: they are fetched once."""

    modality: str
    """A modality, or `head`: the task head, which belongs to all of them."""
    active: tuple[str, ...]
    frozen: tuple[str, ...]
    active_parameters: int
    frozen_parameters: int
    training_flops_per_sample: int
    prefix_flops_per_sample: int
    round_bytes_down: int
    round_bytes_up: int
    prefix_bytes: int


class StageRow(Record):
    """One stage, with what only all modalities together have: programs, memory, and what it takes on the device's disk."""

    index: int
    rounds: int
    modalities: tuple[ModalityRow, ...]
    planned_bytes: dict[EngineName, int]
    program_bytes: dict[EngineName, int]
    disk_bytes: dict[EngineName, int]
    """Programs of this stage and weights, frozen and active, as they lie on the device; stored features are not in it."""
    feature_bytes_per_sample: int
    """What one example takes in the feature cache, all views."""


class Overview(Record):
    """A bundle in figures."""

    name: str
    digest: str
    engines: tuple[EngineName, ...]
    stages: tuple[StageRow, ...]
    program_bytes: int
    """All programs of all engines."""
    bundle_bytes: int
    rewrites: tuple[Rewrite, ...]
    notes: tuple[str, ...]


def overview(manifest: Manifest, digest: str) -> Overview:
    """`digest` is the bundle's identity (`lamina.bundles.bundle.bundle_digest`)."""
    return Overview(
        name=manifest.plan.name,
        digest=digest,
        engines=manifest.engines,
        stages=tuple(_stage_row(manifest, stage) for stage in manifest.plan.stages),
        program_bytes=sum(manifest.blobs[digest] for digest in manifest.programs),
        bundle_bytes=sum(manifest.blobs.values()),
        rewrites=manifest.rewrites,
        notes=manifest.notes,
    )


def plan_picture(manifest: Manifest) -> list[tuple[str, str]]:
    """Segment -> one letter for each stage: `A` active, `f` frozen, `.` not attached yet; in exchange order."""

    def letter(name: str, stage: Stage) -> str:
        return "A" if name in stage.active else "f" if name in stage.frozen else "."

    return [(name, "".join(letter(name, s) for s in manifest.plan.stages)) for name in segment_names(manifest.plan.model)]


def _stage_row(manifest: Manifest, stage: Stage) -> StageRow:
    cost = manifest.stages[stage.index].cost
    owners = [*manifest.plan.model.modalities, *([HEAD] if HEAD in stage.active else [])]
    rows = tuple(_modality_row(manifest, stage, owner) for owner in owners)
    weights = sum(row.round_bytes_down + row.prefix_bytes for row in rows)
    return StageRow(
        index=stage.index,
        rounds=stage.rounds,
        modalities=rows,
        planned_bytes=cost.planned_bytes,
        program_bytes=cost.program_bytes,
        disk_bytes={engine: weights + _programs_of_stage(manifest, stage, engine) for engine in manifest.engines},
        feature_bytes_per_sample=_feature_bytes(manifest, stage),
    )


def _modality_row(manifest: Manifest, stage: Stage, owner: str) -> ModalityRow:
    training = manifest.plan.training
    active = tuple(name for name in stage.active if _owner(name) == owner)
    frozen = tuple(name for name in stage.frozen if _owner(name) == owner)
    return ModalityRow(
        modality=owner,
        active=active,
        frozen=frozen,
        active_parameters=_parameters(manifest, active),
        frozen_parameters=_parameters(manifest, frozen) + _constants(manifest, (*active, *frozen)),
        training_flops_per_sample=manifest.plan.passes_of_a_step * sum(manifest.segment_macs.get(name, 0) for name in active),
        prefix_flops_per_sample=sum(manifest.segment_macs.get(name, 0) for name in frozen),
        round_bytes_down=sum(_file(manifest, name, training.download_encoding) for name in active),
        round_bytes_up=sum(_file(manifest, name, training.upload_encoding) for name in active),
        prefix_bytes=sum(_file(manifest, name, training.download_encoding) for name in frozen)
        + sum(manifest.blobs[manifest.frozen_tensors[n]] for n in (*active, *frozen) if n in manifest.frozen_tensors),
    )


def _owner(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def _parameters(manifest: Manifest, names: Iterable[str]) -> int:
    return sum(manifest.segment(name).parameters for name in names)


def _constants(manifest: Manifest, names: Iterable[str]) -> int:
    return sum(manifest.segment(name).constants for name in names)


def _file(manifest: Manifest, name: str, encoding: Encoding) -> int:
    return file_bytes(manifest.segment(name).tensors, encoding)


def _programs_of_stage(manifest: Manifest, stage: Stage, engine: EngineName) -> int:
    programs = manifest.stages[stage.index]
    used = {programs.train[engine], programs.eval[engine], *(manifest.frozen_programs[engine][n] for n in stage.frozen)}
    used |= {manifest.loss_programs[engine]} if engine in manifest.loss_programs else set()
    return sum(manifest.blobs[digest] for digest in used)


def _feature_bytes(manifest: Manifest, stage: Stage) -> int:
    store = manifest.plan.training.features
    value = {"fp32": 4, "fp16": 2, "int8": 1}[store.encoding]
    total = 0
    for encoder in manifest.plan.model.encoders:
        chain = stage.frozen_chain(manifest.plan.model, encoder.modality)
        if chain:
            shape = encoder.feature_shape(prefix_chain(manifest.plan.model, encoder.modality).index(chain[-1]))
            numbers = 1
            for size in shape:
                numbers *= size
            scales = 4 * (numbers // shape[-1]) if store.encoding == "int8" else 0
            total += (value * numbers + scales) * store.views
    return total
