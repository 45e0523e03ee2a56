"""Manifests of any plan whose programs and weights are names alone: enough to prepare a job, which opens none of them."""

from pathlib import Path

from lamina.bundles.manifest import Manifest, PartialStage, Program, ProgramReference, StageCost, StagePrograms
from lamina.encoding.tensors import hash_bytes
from lamina.names import ANY_MODALITY, second_view
from lamina.plans.model import Contrastive
from lamina.plans.plan import Plan
from lamina.plans.segments import Segment, TensorSpec, segment_names

ENGINE = "torch"
COST = {
    "active_parameters": 0,
    "frozen_parameters": 0,
    "flops_per_sample": 0,
    "prefix_flops_per_sample": 0,
    "planned_bytes": {ENGINE: 0},
    "round_bytes_down": 0,
    "round_bytes_up": 0,
    "program_bytes": {ENGINE: 0},
    "frozen_bytes": 0,
}


def blob(name):
    return hash_bytes(name.encode())


def fake_manifest(plan: Plan, references=(), calibrate_batch=4) -> Manifest:
    """Each segment has one tensor `w` of 2 values. `references` are those of all train programs.

    The programs of a device with one modality of a contrastive model have the inputs of the real ones.
    """
    programs: dict[str, Program] = {}
    segments = [
        Segment(
            name=name, modality=None if name == "head" else name.partition(".")[0], tensors=(TensorSpec(name="w", shape=(2,)),)
        )
        for name in segment_names(plan.model)
    ]

    def program(name, role, count, given=(), max_batch=8, inputs=()):
        programs[blob(name)] = Program(
            engine=ENGINE,
            role=role,
            blob=blob(name),
            weights=((2,),) * count,
            inputs=inputs,
            max_batch=max_batch,
            references=tuple(ProgramReference(kind=kind, tensors=tensors) for kind, tensors in given),
            activation_bytes=0,
        )
        return {ENGINE: blob(name)}

    is_pair = isinstance(plan.model.objective, Contrastive)
    views = tuple(TensorSpec(name=name, shape=(2,)) for name in (ANY_MODALITY, second_view(ANY_MODALITY)) if is_pair)
    in_three = is_pair and plan.training.samples_in_memory < plan.training.batch_size
    stages = []
    for stage in plan.stages:
        active, attached = len(stage.active), len({*stage.active, *stage.frozen})
        parts = [
            PartialStage(
                modalities=subset,
                train=program(f"train {stage.index} {subset}", "train", active, inputs=views),
                eval=program(f"eval {stage.index} {subset}", "eval", active, inputs=views),
                planned_bytes={ENGINE: 0},
            )
            for subset in plan.device_modalities
        ]
        stages.append(
            StagePrograms(
                index=stage.index,
                train=program(f"train {stage.index}", "train", active, references),
                eval=program(f"eval {stage.index}", "eval", active),
                partial=tuple(parts),
                calibrate=program(f"calibrate {stage.index}", "train", attached, max_batch=calibrate_batch)
                if plan.calibration
                else {},
                cost=StageCost(**COST),
            )
        )
    chain = {name for stage in plan.stages for name in stage.frozen}
    frozen = {name: program(f"frozen {name}", "frozen", 1)[ENGINE] for name in chain}
    weights = {segment.name: blob(f"{segment.name} 0") for segment in segments}
    return Manifest(
        plan=plan,
        segments=tuple(segments),
        initial_weights=weights,
        programs=programs,
        frozen_programs={ENGINE: frozen},
        loss_programs=program("loss", "loss", 0) if in_three else {},
        view_loss_programs=program("view loss", "loss", 0, inputs=views) if in_three and plan.device_modalities else {},
        stages=tuple(stages),
        blobs=dict.fromkeys([*programs, *weights.values()], 100),
        versions={},
    )


class Fetched:
    """A `Fetch` that notes what was asked for, by the names behind the hashes."""

    def __init__(self, names):
        self._names, self.names = {blob(name): name for name in names}, []

    def __call__(self, digest):
        self.names.append(self._names.get(digest, digest))
        return Path("/blobs") / digest
