"""Exporting: plan -> bundle. The ladder of this room, one rung after the other, each checked before the next:

    cut (cut.py) -> trace (trace.py) -> joint graph (joint.py) -> lower (worker.py, lower_*.py) -> parity -> pack (here)

Equal graphs are lowered once: the layer-wise stages after the first share their programs, and so do frozen layers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from export import lower_executorch, lower_onnx, lower_torch
from export.cache import ProgramCache, default_cache, program_key
from export.cost import TRAINING_FACTOR, forward_macs, peak_live_bytes, planned_bytes
from export.cut import StageCut, cut_stage, describe_segment, example_inputs, features, find_segments, raw_input
from export.joint import joint_graph
from export.models import build_model
from export.parity import check_parity
from export.trace import EXAMPLE_BATCH, Arrays, forward_graph, graph_text
from export.worker import LoweredProgram, lowering_pool
from lamina import __version__
from lamina.bundle import BLOBS, MANIFEST, blob_path
from lamina.errors import ConfigError, ExportError
from lamina.files import write_durably
from lamina.manifest import ENGINES, EngineName, Manifest, Program, Role, StageCost, StagePrograms
from lamina.plan import Plan, Stage
from lamina.segments import TensorSpec
from lamina.tensors import encode, hash_bytes

OnProgress = Callable[[str, int, int], None]
FROZEN_INPUT = "x"

# What the bytes of a program depend on, besides the graph: packages by engine, and our own lowering.
_PACKAGES: dict[EngineName, tuple[str, ...]] = {
    "executorch": ("torch", "executorch"),
    "onnxruntime": ("torch", "onnx", "onnxscript"),
    "torch": ("torch",),
}
_FORMATS: dict[EngineName, int] = {
    "executorch": lower_executorch.FORMAT,
    "onnxruntime": lower_onnx.FORMAT,
    "torch": lower_torch.FORMAT,
}


def export_bundle(
    plan: Plan,
    folder: Path,
    engines: Sequence[EngineName] = ("executorch", "onnxruntime"),
    *,
    model: nn.Module | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
    workers: int | None = None,
    cache: Path | None = None,
) -> Manifest:
    """Writes `manifest.json` and `blobs/` into the folder, and returns the manifest.

    `model` has the weights to start from and the shape described in `export.cut`; without it, the model of the plan is
    built with random weights from `plan.seed`. `on_progress(phase, done, total)` is called with the phases `trace` and
    `lower`. At most `workers` processes lower at the same time (default: one per core). `cache` holds lowered programs
    (default: `$LAMINA_CACHE` or `~/.cache/lamina/programs`).

    The same plan and versions give the same bundle. Raises ConfigError for a folder that holds anything else, CutError for
    a model that cannot be cut, and ParityError for a program that computes something else than the model.
    """
    if not engines or len(set(engines)) != len(engines) or not set(engines) <= set(ENGINES):
        raise ConfigError(f"engines must be one or more of {', '.join(ENGINES)}, each once; given {list(engines)}")
    versions = {engine: _versions(engine) for engine in engines}
    model = build_model(plan.model, plan.seed) if model is None else model
    segments = find_segments(model, plan.model)
    weights = {
        name: encode({key: value.detach().numpy() for key, value in module.named_parameters()})
        for name, module in segments.items()
    }
    initial = {name: hash_bytes(data) for name, data in weights.items()}
    _check_folder(folder, plan, initial)

    lowering = _Lowering(plan, versions, ProgramCache(cache or default_cache()), on_progress)
    steps = len(plan.stages) + len(_frozen_segments(plan))
    cuts: list[StageCut] = []
    chosen: list[dict[Role, dict[EngineName, str]]] = []
    frozen: dict[EngineName, dict[str, str]] = {engine: {} for engine in engines}
    with lowering_pool(workers or os.cpu_count() or 1) as start:
        on_progress("trace", 0, steps)
        for stage in plan.stages:
            cuts.append(cut_stage(segments, plan.model, stage))
            chosen.append(lowering.add_stage(start, stage, cuts[-1]))
            on_progress("trace", stage.index + 1, steps)
        for done, name in enumerate(_frozen_segments(plan), start=len(plan.stages) + 1):
            for engine, key in lowering.add_frozen(start, name, segments[name]).items():
                frozen[engine][name] = key
            on_progress("trace", done, steps)
        programs = lowering.finish()

    address = {key: hash_bytes(lowered.data) for key, lowered in programs.items()}
    blobs = {hash_bytes(data): data for data in (*weights.values(), *(lowered.data for lowered in programs.values()))}
    downloaded: dict[EngineName, set[str]] = {engine: set() for engine in engines}
    stages = []
    for stage, cut, keys in zip(plan.stages, cuts, chosen, strict=True):
        count = sum(spec.count for spec in cut.weights)
        planned = {
            engine: planned_bytes(count, plan.training.optimizer, lowering.activation_bytes(key, programs[key]))
            for engine, key in keys["train"].items()
        }
        new = {}
        for engine in engines:
            used = {keys["train"][engine], keys["eval"][engine], *(frozen[engine][name] for name in stage.frozen)}
            new[engine] = sum(len(programs[key].data) for key in used - downloaded[engine])
            downloaded[engine] |= used
        stages.append(
            StagePrograms(
                index=stage.index,
                train={engine: address[key] for engine, key in keys["train"].items()},
                eval={engine: address[key] for engine, key in keys["eval"].items()},
                cost=StageCost(
                    active_parameters=count,
                    frozen_parameters=sum(value.numel() for name in stage.frozen for value in segments[name].parameters()),
                    flops_per_sample=TRAINING_FACTOR * forward_macs(cut.module, example_inputs(plan.model, cut.inputs, 1)),
                    prefix_flops_per_sample=_prefix_macs(plan, stage, segments),
                    planned_bytes=planned,
                    round_bytes_down=sum(len(weights[name]) for name in stage.active),
                    round_bytes_up=len(_update_file(cut, plan)),
                    program_bytes=new,
                    frozen_bytes=sum(len(weights[name]) for name in stage.frozen),
                ),
            )
        )
    manifest = Manifest(
        plan=plan,
        segments=tuple(describe_segment(name, module, plan.model) for name, module in segments.items()),
        initial_weights=initial,
        programs={address[key]: lowering.describe(key, address[key], lowered) for key, lowered in programs.items()},
        frozen_programs={engine: {name: address[key] for name, key in chain.items()} for engine, chain in frozen.items()},
        stages=tuple(stages),
        blobs={digest: len(data) for digest, data in sorted(blobs.items())},
        versions={"lamina": __version__} | {name: number for found in versions.values() for name, number in found.items()},
    )
    for cut, stage in zip(cuts, plan.stages, strict=True):
        if manifest.exchange_specs(stage.index) != list(cut.weights):
            raise ExportError(f"stage {stage.index}: tensors are not in exchange order; this is a fault of lamina")
    _write(folder, manifest, blobs)
    return manifest


Start = Callable[[EngineName, ExportedProgram], Callable[[], LoweredProgram]]


@dataclass
class _Wanted:
    """A program that the bundle needs. `lowered` waits for its bytes."""

    engine: EngineName
    role: Role
    name: str
    graph: ExportedProgram  # of the values between inputs and outputs: for torch the joint graph, whatever the file holds
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    example: Arrays
    lowered: Callable[[], LoweredProgram]
    is_new: bool


@dataclass
class _Lowering:
    """Collects the programs of a bundle by cache key: a graph that was seen before is neither lowered nor checked again."""

    plan: Plan
    versions: dict[EngineName, dict[str, str]]
    cache: ProgramCache
    on_progress: OnProgress
    wanted: dict[str, _Wanted] = field(default_factory=dict)
    joint_of: dict[str, ExportedProgram] = field(default_factory=dict)  # by the text of the forward graph it is made from

    @property
    def max_batch(self) -> int:
        return self.plan.training.batch_size

    def add_stage(self, start: Start, stage: Stage, cut: StageCut) -> dict[Role, dict[EngineName, str]]:
        """Keys of the stage's training and evaluation programs, by engine."""
        example = example_inputs(self.plan.model, cut.inputs, EXAMPLE_BATCH)
        forward = forward_graph(cut.module, example, self.max_batch)
        text = graph_text(forward)
        if text not in self.joint_of:
            names = [spec.name for spec in cut.weights]
            self.joint_of[text] = joint_graph(forward, cut.module, names, example, self.max_batch)
        joint = self.joint_of[text]
        keys: dict[Role, dict[EngineName, str]] = {"train": {}, "eval": {}}
        for engine in self.versions:
            for role, file_graph, graph in (
                ("train", forward if engine == "torch" else joint, joint),
                ("eval", forward, forward),
            ):
                name = f"the {role} program of stage {stage.index}"
                keys[role][engine] = self._add(start, engine, role, name, file_graph, graph, cut.module, cut.inputs, example)
        return keys

    def add_frozen(self, start: Start, name: str, module: nn.Module) -> dict[EngineName, str]:
        """Keys of the program of one frozen segment, by engine."""
        encoder = self.plan.model.encoder(name.split(".")[0])
        spec = raw_input(encoder) if name.endswith(".stem") else features(encoder)
        example = example_inputs(self.plan.model, (spec,), EXAMPLE_BATCH)
        graph = forward_graph(module, example, self.max_batch)
        # Equal layers of two modalities are one program, so its input is named for neither.
        inputs = (spec.model_copy(update={"name": FROZEN_INPUT}),)
        label = f"the frozen program of {name}"
        return {
            engine: self._add(start, engine, "frozen", label, graph, graph, module, inputs, example) for engine in self.versions
        }

    def finish(self) -> dict[str, LoweredProgram]:
        """Waits for every program, checks the new ones against eager PyTorch, and stores them in the cache."""
        done: dict[str, LoweredProgram] = {}
        self.on_progress("lower", 0, len(self.wanted))
        for key, wanted in self.wanted.items():
            done[key] = wanted.lowered()
            if wanted.is_new:
                check_parity(done[key].data, wanted.engine, wanted.role, wanted.name, wanted.module, wanted.example)
                self.cache.put(key, done[key])
            self.on_progress("lower", len(done), len(self.wanted))
        return done

    def activation_bytes(self, key: str, lowered: LoweredProgram) -> int:
        if lowered.arena_bytes is not None:
            return lowered.arena_bytes
        return peak_live_bytes(self.wanted[key].graph, self.max_batch)

    def describe(self, key: str, blob: str, lowered: LoweredProgram) -> Program:
        wanted = self.wanted[key]
        return Program(
            engine=wanted.engine,
            role=wanted.role,
            blob=blob,
            weights=tuple(tuple(value.shape) for value in wanted.module.parameters()),
            inputs=wanted.inputs,
            max_batch=self.max_batch,
            activation_bytes=self.activation_bytes(key, lowered),
        )

    def _add(
        self,
        start: Start,
        engine: EngineName,
        role: Role,
        name: str,
        file_graph: ExportedProgram,
        graph: ExportedProgram,
        module: nn.Module,
        inputs: tuple[TensorSpec, ...],
        example: Arrays,
    ) -> str:
        key = program_key(graph_text(file_graph), engine, self.versions[engine] | {"format": str(_FORMATS[engine])})
        if key not in self.wanted:
            known = self.cache.get(key)
            lowered = start(engine, file_graph) if known is None else lambda: known
            self.wanted[key] = _Wanted(engine, role, name, graph, module, inputs, example, lowered, known is None)
        return key


def _frozen_segments(plan: Plan) -> list[str]:
    """Segments that are frozen in some stage, in order of first appearance."""
    return list(dict.fromkeys(name for stage in plan.stages for name in stage.frozen))


def _prefix_macs(plan: Plan, stage: Stage, segments: dict[str, nn.Module]) -> int:
    total = 0
    for encoder in plan.model.encoders:
        for name in stage.frozen_chain(plan.model, encoder.modality):
            spec = raw_input(encoder) if name.endswith(".stem") else features(encoder)
            total += forward_macs(segments[name], example_inputs(plan.model, (spec,), 1))
    return total


def _update_file(cut: StageCut, plan: Plan) -> bytes:
    """An update as a device sends it; its size depends on the shapes alone."""
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in cut.weights}
    return encode(zeros, plan.training.upload_encoding)


def _versions(engine: EngineName) -> dict[str, str]:
    """Versions of the packages that write programs of this engine."""
    try:
        return {package: version(package) for package in _PACKAGES[engine]}
    except PackageNotFoundError as error:
        raise ExportError(f"{engine} cannot be exported here: {error}; pip install 'lamina[export,{engine}]'") from error


def _check_folder(folder: Path, plan: Plan, initial: dict[str, str]) -> None:
    """The folder must be empty, or hold this very bundle, whole or begun."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the bundle")
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, BLOBS))
    if strangers:
        raise ConfigError(f"{folder} holds other files ({', '.join(strangers[:3])}); give an empty folder for the bundle")
    if (folder / MANIFEST).exists():
        found = Manifest.from_file(folder / MANIFEST)
        if found.plan != plan or found.initial_weights != initial:
            raise ConfigError(f"{folder} holds the bundle of another plan ({found.plan.name!r}); give an empty folder")


def _write(folder: Path, manifest: Manifest, blobs: dict[str, bytes]) -> None:
    """Blobs first, the manifest last: a folder with a manifest is whole. Blobs of an earlier export are removed."""
    for digest, data in blobs.items():
        write_durably(blob_path(folder, digest), data)
    write_durably(folder / MANIFEST, manifest.to_json())
    for path in (folder / BLOBS).iterdir():
        if path.name not in blobs:
            path.unlink()
