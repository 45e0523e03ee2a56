"""Exporting: plan -> bundle. The ladder of this room, one rung after the other, each checked before the next:

    cut (cut.py) -> trace (trace.py) -> joint graph (joint.py) -> lower (worker.py, lower_*.py) -> parity -> pack (here)

`programs.py` climbs it for every program that the stages need. Equal graphs are lowered once: the layer-wise stages after
the first share their programs, and so do frozen layers.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.cost.counts import counted_views, embedding_bytes, forward_macs, held_values, planned_bytes
from export.cost.estimate import plan_examples
from export.faults.faults import Fault, fault_of, raise_first
from export.graphs.cut import StageCut, cut_stage, describe_segment, find_pools, find_segments, locate_pools, locate_segments
from export.graphs.stage_module import Terms
from export.inputs import example_inputs, segment_input
from export.lowering.cache import ProgramCache, default_cache
from export.lowering.prefix_errors import RANDOM_INPUTS, measure_prefix, random_sample, read_sample
from export.lowering.toolchain import check_folder, tool_versions, write_bundle
from export.lowering.worker import LoweredProgram, lower, lowering_pool
from export.models import parameters
from export.models.copies import copied
from export.models.models import build_model, zero_late_layers
from export.models.parameters import fixed_segments, trained
from export.models.proofs import by_modality, prove_model
from export.plans.notes import frozen_notes, notes_of
from export.programs import Keys, ProgramSet, stage_terms
from lamina import __version__
from lamina.bundles.bundle import hash_file
from lamina.bundles.keys import own_key
from lamina.bundles.manifest import ENGINES, EngineName, Manifest, PartialStage, Rewrite, StageCost, StagePrograms
from lamina.encoding.tensors import Encoding, encode, hash_bytes
from lamina.errors import ConfigError, CutError, ExportError
from lamina.plans.model import SelfSupervised
from lamina.plans.plan import Plan, Stage
from lamina.plans.segments import TensorSpec
from lamina.plans.strategies import freeze_fixed

OnProgress = Callable[[str, int, int], None]


def export_bundle(
    plan: Plan,
    folder: Path,
    engines: Sequence[EngineName] = ("executorch", "onnxruntime"),
    *,
    model: nn.Module | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
    workers: int | None = None,
    cache: Path | None = None,
    sample: Path | None = None,
    notes: Sequence[str] = (),
    rewrites: Sequence[Rewrite] = (),
) -> Manifest:
    """Writes `blobs/`, `manifest.json` and `manifest.sig` into the folder, and returns the manifest.

    `manifest.sig` is the exporter's signature of the manifest (`lamina.bundles.signing`), made with this machine's own key,
    which the first export makes (`lamina.bundles.keys`); devices run no program of a bundle that no key they trust has signed.

    `model` has the weights to start from and the shape described in `export.graphs.cut`; without it, the model of the plan is
    built (`export.models.models`). Its parameters with `requires_grad=False` are never trained, and a stem of which that holds
    for all is in every stage's frozen prefix (`lamina.plans.strategies.freeze_fixed`). With `zero_init`, layers that are
    attached later start as the identity, whatever weights they have.
    `notes`, with some of the export's own (`export.plans.notes`), and `rewrites` are written into the manifest.
    `on_progress(phase, done, total)` is called with the phases `trace` and `lower`. At most `workers` processes lower at the
    same time (default: one per core). `cache` holds lowered programs (default: `$LAMINA_CACHE` or
    `~/.cache/lamina/programs`).

    The error of an int8 prefix is measured on the first 64 training examples of `sample`, an .npz as devices have it, or else
    on random inputs; and on the weights of this bundle, that is before training. It tells whether a model bears int8 at all;
    for the error of trained weights, export again with `model`. Without an int8 prefix, `sample` changes nothing.

    The same plan, versions and sample give the same bundle. Raises ConfigError for a folder that holds anything else,
    DataError for a sample that the model cannot take, CutError for a model that cannot be cut, and ParityError for a program
    that computes something else than the model.
    """
    if not engines or len(set(engines)) != len(engines) or not set(engines) <= set(ENGINES):
        raise ConfigError(f"engines must be one or more of {', '.join(ENGINES)}, each once; given {list(engines)}")
    versions = {engine: tool_versions(engine) for engine in engines}
    measured_on = _measured_on(plan, sample)
    model = build_model(plan.model, plan.seed) if model is None else copied(model)
    model.eval()
    segments = find_segments(model, plan.model)
    zeroed = zero_late_layers(segments, plan)
    plan = freeze_fixed(plan, fixed_segments(segments, plan.model))
    weights = {name: _file(name, trained(module)) for name, module in segments.items()}
    constants = {name: _file(name, tensors) for name, module in segments.items() if (tensors := parameters.frozen(module))}
    initial = {name: hash_bytes(data) for name, data in weights.items()}
    kept = {name: hash_bytes(data) for name, data in constants.items()}
    check_folder(folder, lambda path: _other_plan(path, plan, initial, kept))
    signer = own_key()  # before the long work: what would keep it from being signed is known now

    pools = find_pools(model, plan.model)
    proved = prove_model(segments, pools, plan.model)
    work = PlanPrograms(plan, segments, pools, on_progress)
    with lowering_pool(workers or os.cpu_count() or 1) as start:
        programs = ProgramSet(plan, versions, ProgramCache(cache or default_cache()), start)
        raise_first(work.add_to(programs))
        programs.finish(lambda done, total: on_progress("lower", done, total))
    cuts, chosen, frozen, loss, view_loss = work.cuts, work.stages, work.frozen, work.loss, work.view_loss

    lowered = programs.lowered
    errors = {}
    for engine, chain in frozen.items():
        frozen_programs = {name: lowered[key].data for name, key in chain.items()}
        if measured_on and (found := measure_prefix(plan, segments, engine, frozen_programs, measured_on)):
            errors[engine] = found
    address = {key: hash_bytes(program.data) for key, program in lowered.items()}
    files = (*weights.values(), *constants.values(), *(program.data for program in lowered.values()))
    blobs = {hash_bytes(data): data for data in files}
    downloaded: dict[EngineName, set[str]] = {engine: set() for engine in engines}
    stages = []
    for stage, cut, keys in zip(plan.stages, cuts, chosen, strict=True):
        new: dict[EngineName, int] = {}
        for engine in engines:
            used = {keys.whole.train[engine], keys.whole.eval[engine], *(frozen[engine][name] for name in stage.frozen)}
            used |= {loss[engine]} if loss else set()
            new[engine] = sum(len(lowered[key].data) for key in used - downloaded[engine])
            downloaded[engine] |= used
        stages.append(
            StagePrograms(
                index=stage.index,
                train={engine: address[key] for engine, key in keys.whole.train.items()},
                eval={engine: address[key] for engine, key in keys.whole.eval.items()},
                partial=tuple(
                    PartialStage(
                        modalities=subset,
                        train={engine: address[key] for engine, key in part.train.items()},
                        eval={engine: address[key] for engine, key in part.eval.items()},
                        planned_bytes=_planned(plan, cut.partial[subset], programs, part, view_loss),
                    )
                    for subset, part in keys.partial.items()
                ),
                calibrate={engine: address[key] for engine, key in keys.calibrate.items()},
                cost=_stage_cost(plan, stage, cut.whole, segments, programs, keys.whole, loss, new),
            )
        )
    manifest = Manifest(
        plan=plan,
        segments=tuple(describe_segment(name, module, plan.model) for name, module in segments.items()),
        initial_weights=initial,
        frozen_tensors=kept,
        programs={address[key]: programs.describe(key, address[key]) for key in lowered},
        frozen_programs={engine: {name: address[key] for name, key in chain.items()} for engine, chain in frozen.items()},
        loss_programs={engine: address[key] for engine, key in loss.items()},
        view_loss_programs={engine: address[key] for engine, key in view_loss.items()},
        prefix_errors=errors,
        prefix_errors_on=(hash_file(sample) if sample else RANDOM_INPUTS) if errors else "",
        segment_macs={name: forward_macs(segments[name], example) for name, example in plan_examples(plan).items()},
        rewrites=tuple(by_modality((*rewrites, *proved))),
        notes=(*notes, *notes_of(plan, zeroed), *frozen_notes(segments)),
        stages=tuple(stages),
        blobs={digest: len(data) for digest, data in sorted(blobs.items())},
        versions={"lamina": __version__} | {name: number for found in versions.values() for name, number in found.items()},
    )
    for cut, stage in zip(cuts, plan.stages, strict=True):
        for subset, part in ((), cut.whole), *cut.partial.items():
            frozen_specs = manifest.frozen_specs(manifest.exchange(stage.index, subset))
            if (manifest.exchange_specs(stage.index, subset), frozen_specs) != (list(part.weights), list(part.frozen)):
                raise ExportError(f"stage {stage.index}: tensors are not in exchange order; this is a fault of lamina")
        if cut.calibrate and manifest.calibrated(stage.index) != list(cut.calibrate[0].active):
            raise ExportError(f"stage {stage.index}: calibration has other segments than the manifest says; a fault of lamina")
    write_bundle(folder, manifest.to_json(), blobs, signer)
    return manifest


Subset = tuple[str, ...]
"""Modalities of a device that has not all."""


@dataclass(frozen=True)
class _Cuts:
    """The cut modules of a stage; `calibrate` with the stage that it is the cut of, in which all is active."""

    whole: StageCut
    partial: dict[Subset, StageCut]
    calibrate: tuple[Stage, StageCut] | None


@dataclass(frozen=True)
class _Keys:
    """Keys of the programs that a device trains and evaluates with, by engine."""

    train: Keys
    eval: Keys


@dataclass(frozen=True)
class _StageKeys:
    whole: _Keys
    partial: dict[Subset, _Keys]
    calibrate: Keys


@dataclass
class PlanPrograms:
    """All programs of a plan: keys of those of each stage, of the frozen segments by engine, and of the losses."""

    plan: Plan
    segments: Mapping[str, nn.Module]
    pools: Mapping[str, nn.Module]
    on_progress: OnProgress = lambda phase, done, total: None
    cuts: list[_Cuts] = field(default_factory=list)
    stages: list[_StageKeys] = field(default_factory=list)
    frozen: dict[EngineName, dict[str, str]] = field(default_factory=dict)
    loss: Keys = field(default_factory=dict)
    view_loss: Keys = field(default_factory=dict)

    def add_to(self, programs: ProgramSet) -> Iterator[Fault]:
        """Cuts and traces what the plan needs. Yields what cannot be, in the order in which an export meets it, and goes on."""
        plan = self.plan
        self.frozen = {engine: {} for engine in programs.versions}
        steps = len(plan.stages) + len(_frozen_segments(plan))
        self.on_progress("trace", 0, steps)
        for stage in plan.stages:
            try:
                self.cuts.append(_cuts(plan, stage, self.segments, self.pools))
                self.stages.append(_add_programs(programs, stage, self.cuts[-1]))
            except ExportError as error:
                yield fault_of(f"(stage {stage.index})", error)
            yield from programs.new_faults()
            self.on_progress("trace", stage.index + 1, steps)
        for done, name in enumerate(_frozen_segments(plan), start=len(plan.stages) + 1):
            try:
                for engine, key in programs.add_frozen(name, self.segments[name]).items():
                    self.frozen[engine][name] = key
            except ExportError as error:
                yield fault_of(name, error)
            yield from programs.new_faults()
            self.on_progress("trace", done, steps)
        if plan.embeds_first:
            try:
                self.loss = programs.add_loss()
                self.view_loss = programs.add_view_loss() if plan.device_modalities else {}
            except ExportError as error:
                yield fault_of("(loss)", error)
            yield from programs.new_faults()


def program_faults(
    plan: Plan, model: nn.Module, engines: Sequence[EngineName], on_progress: OnProgress = lambda phase, done, total: None
) -> Iterator[Fault]:
    """Every fault of the programs of a plan, for a model without other faults, as an export meets it; nothing is lowered."""
    model = copied(model).eval()
    segments, pools = locate_segments(model, plan.model), locate_pools(model, plan.model)
    plan = freeze_fixed(plan, fixed_segments(segments, plan.model))
    try:
        zero_late_layers(segments, plan)
        prove_model(segments, pools, plan.model)
    except ExportError as error:
        yield fault_of("(model)", error)
        return

    def nothing(engine: EngineName, graph: ExportedProgram) -> Callable[[], LoweredProgram]:
        lower("torch", graph)  # every engine's program is read from this file
        return lambda: LoweredProgram(b"", None)

    programs = ProgramSet(plan, {engine: {} for engine in engines}, None, nothing)
    yield from PlanPrograms(plan, segments, pools, on_progress).add_to(programs)


def _cuts(plan: Plan, stage: Stage, segments: Mapping[str, nn.Module], pools: Mapping[str, nn.Module]) -> _Cuts:
    terms = stage_terms(plan, stage)
    calibrate = None
    if plan.calibration and stage.rounds:
        attached = {*stage.active, *stage.frozen}
        everything = stage.model_copy(update={"active": tuple(n for n in segments if n in attached), "frozen": ()})
        own = cut_stage(segments, plan.model, everything, pools=pools, terms=Terms(held=False))
        calibrate = (everything, own)
    in_three = plan.embeds_first
    return _Cuts(
        whole=cut_stage(segments, plan.model, stage, pools=pools, until_embeddings=in_three, terms=terms),
        partial={
            subset: cut_stage(segments, plan.model, stage, pools=pools, until_embeddings=in_three, terms=terms, present=subset)
            for subset in plan.device_modalities
        },
        calibrate=calibrate,
    )


def _add_programs(programs: ProgramSet, stage: Stage, cut: _Cuts) -> _StageKeys:
    training = programs.plan.training
    # A contrastive loss has the whole batch for its negatives; the server has the memory for that.
    max_batch = training.batch_size if programs.plan.embeds_first else training.samples_in_memory
    return _StageKeys(
        whole=_Keys(*programs.add_stage(stage, cut.whole)),
        partial={
            subset: _Keys(*programs.add_stage(stage, part, f" with {', '.join(subset)} alone"))
            for subset, part in cut.partial.items()
        },
        calibrate=programs.add_training(*cut.calibrate, " for calibration", max_batch) if cut.calibrate else {},
    )


def _stage_cost(
    plan: Plan,
    stage: Stage,
    cut: StageCut,
    segments: Mapping[str, nn.Module],
    programs: ProgramSet,
    keys: _Keys,
    loss: Keys,
    program_bytes: dict[EngineName, int],
) -> StageCost:
    count = sum(spec.count for spec in cut.weights)
    down, up = plan.training.download_encoding, plan.training.upload_encoding
    return StageCost(
        active_parameters=count,
        frozen_parameters=cut.frozen_values
        + sum(value.numel() for name in stage.frozen for value in segments[name].parameters()),
        flops_per_sample=plan.passes_of_a_step * _active_macs(plan, stage, cut, segments),
        prefix_flops_per_sample=_prefix_macs(plan, stage, segments),
        planned_bytes=_planned(plan, cut, programs, keys, loss),
        round_bytes_down=sum(_segment_bytes(name, segments[name], plan, down) for name in stage.active),
        round_bytes_up=_file_bytes(cut.weights, up),
        program_bytes=program_bytes,
        frozen_bytes=sum(_segment_bytes(name, segments[name], plan, down) for name in stage.frozen)
        + sum(_frozen_bytes(name, segments[name], plan) for name in (*stage.frozen, *stage.active)),
    )


def _planned(plan: Plan, cut: StageCut, programs: ProgramSet, keys: _Keys, loss: Keys) -> dict[EngineName, int]:
    """Bytes that a training step takes, by engine."""
    count = sum(spec.count for spec in cut.weights)
    held = held_values(plan, count, cut.reference_sizes) + cut.frozen_values
    planned = {}
    for engine, key in keys.train.items():
        peaks = [programs.activation_bytes(key)]
        if loss:
            peaks += [programs.activation_bytes(keys.eval[engine]), programs.activation_bytes(loss[engine])]
        # A device keeps the programs of a step loaded. ExecuTorch gives each its own arena; the others share one.
        at_once = (sum(peaks) if engine == "executorch" else max(peaks)) + (embedding_bytes(plan) if loss else 0)
        planned[engine] = planned_bytes(count, plan.training.optimizer, at_once, held)
    return planned


def _active_macs(plan: Plan, stage: Stage, cut: StageCut, segments: Mapping[str, nn.Module]) -> int:
    """Of what a step trains, for one sample (the convention of `export.cost.counts`)."""
    examples = plan_examples(plan)
    if isinstance(plan.model.objective, SelfSupervised):
        return counted_views(plan.model) * sum(forward_macs(segments[name], examples[name]) for name in stage.active)
    own = [name for name in stage.active if name.endswith(".classifier")]
    return forward_macs(cut.evaluation, example_inputs(plan.model, cut.inputs, 1)) + sum(
        forward_macs(segments[name], examples[name]) for name in own
    )


def _measured_on(plan: Plan, sample: Path | None) -> dict[str, Tensor]:
    """Raw inputs to measure an int8 prefix on; empty where there is none."""
    if plan.training.prefix_precision == "fp32" or not _frozen_segments(plan):
        return {}
    return random_sample(plan) if sample is None else read_sample(sample, plan)


def _frozen_segments(plan: Plan) -> list[str]:
    """Segments that are frozen in some stage, in order of first appearance."""
    return list(dict.fromkeys(name for stage in plan.stages for name in stage.frozen))


def _prefix_macs(plan: Plan, stage: Stage, segments: Mapping[str, nn.Module]) -> int:
    total = 0
    for encoder in plan.model.encoders:
        for name in stage.frozen_chain(plan.model, encoder.modality):
            total += forward_macs(segments[name], example_inputs(plan.model, (segment_input(plan.model, name),), 1))
    return total


def _segment_bytes(name: str, module: nn.Module, plan: Plan, encoding: Encoding) -> int:
    return _file_bytes(describe_segment(name, module, plan.model).tensors, encoding)


def _frozen_bytes(name: str, module: nn.Module, plan: Plan) -> int:
    specs = describe_segment(name, module, plan.model).frozen
    return _file_bytes(specs, "fp32") if specs else 0


def _file(name: str, tensors: Mapping[str, Tensor]) -> bytes:
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise CutError(
                f"parameter {key!r} of {name} holds NaN or infinity, which no device takes; in a mask, write a large negative "
                "number such as -1e9 for -inf"
            )
    return encode({key: value.detach().numpy() for key, value in tensors.items()})


def _file_bytes(specs: Iterable[TensorSpec], encoding: Encoding) -> int:
    """Bytes of a tensor file; its size depends on the shapes alone."""
    return len(encode({spec.name: np.zeros(spec.shape, np.float32) for spec in specs}, encoding))


def _other_plan(path: Path, plan: Plan, initial: dict[str, str], frozen: dict[str, str]) -> str | None:
    """The name of the plan that this manifest is of, if it is another plan or has other weights."""
    found = Manifest.from_file(path)
    return found.plan.name if (found.plan, found.initial_weights, found.frozen_tensors) != (plan, initial, frozen) else None
