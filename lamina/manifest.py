"""The manifest: what the exporter wrote, so that a coordinator and its devices can use it without torch.

A program is a pure function without weights inside:

    train    (weights..., batch inputs...) -> loss, correct, gradient of the loss for each weight
    eval     (weights..., batch inputs...) -> loss, correct
    frozen   (weights..., one batch input) -> features

`weights` are the tensors of the stage's active segments (train, eval) or of one segment (frozen), in exchange order.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina.plan import Plan
from lamina.record import Record
from lamina.segments import Segment, TensorSpec, segment_names
from lamina.tensors import hash_bytes

EngineName = Literal["executorch", "onnxruntime", "torch"]
ENGINES: tuple[EngineName, ...] = ("executorch", "onnxruntime", "torch")
Role = Literal["train", "eval", "frozen"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
LABEL = "label"  # the batch input that holds int64 classes; the other inputs are named by modality


class Program(Record):
    """One graph file. `inputs` have shapes without the batch axis, which may be 1..max_batch."""

    engine: EngineName
    role: Role
    blob: Sha256
    weights: tuple[tuple[int, ...], ...]
    inputs: tuple[TensorSpec, ...]
    max_batch: Annotated[int, Field(ge=1)]
    activation_bytes: Count
    """Peak bytes of intermediate values at `max_batch`: the planned arena (ExecuTorch), else the peak of live tensors
    of the graph in its written order."""


class StageCost(Record):
    """What a stage costs one device. FLOPs are multiply-accumulates (methods, section 0.1): 3 x forward when trained,
    1 x forward when frozen."""

    active_parameters: Count
    frozen_parameters: Count
    flops_per_sample: Count
    """One training step for one sample from cached features: 3 x the forward pass of the active part."""
    prefix_flops_per_sample: Count
    """One pass of the whole frozen prefix; with the feature cache, a device pays it once per sample, not per epoch."""
    planned_bytes: dict[EngineName, Count]
    """Weights + gradients + optimiser moments + activations of one batch."""
    round_bytes_down: Count
    round_bytes_up: Count
    program_bytes: dict[EngineName, Count]
    """Programs that no earlier stage used; downloaded once."""
    frozen_bytes: Count
    """Weights of the frozen prefix: what a device that joins at this stage must fetch in addition."""


class StagePrograms(Record):
    """The programs and the cost of one stage of the plan."""

    index: Count
    train: dict[EngineName, Sha256]
    eval: dict[EngineName, Sha256]
    cost: StageCost


class Manifest(Record):
    """Everything that a bundle holds. Each hash is the address of a blob in `blobs`, which gives its size in bytes."""

    format: Literal[1] = 1
    plan: Plan
    segments: tuple[Segment, ...]
    initial_weights: dict[str, Sha256]
    programs: dict[Sha256, Program]
    frozen_programs: dict[EngineName, dict[str, Sha256]]
    stages: tuple[StagePrograms, ...]
    blobs: dict[Sha256, Count]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _is_whole(self) -> "Manifest":
        names = [segment.name for segment in self.segments]
        if names != segment_names(self.plan.model):
            raise ValueError(f"segments {names} are not those of the plan's model")
        if set(self.initial_weights) != set(names):
            raise ValueError("initial_weights must hold one blob for each segment")
        if len(self.stages) != len(self.plan.stages):
            raise ValueError(f"{len(self.stages)} stages of programs for {len(self.plan.stages)} stages of the plan")
        referred = set(self.initial_weights.values()) | set(self.programs)
        for stage in self.stages:
            referred |= set(stage.train.values()) | set(stage.eval.values())
        for chain in self.frozen_programs.values():
            referred |= set(chain.values())
        lacking = referred - set(self.blobs)
        if lacking:
            raise ValueError(f"{len(lacking)} hashes are used but not listed in blobs, the first is {min(lacking)}")
        return self

    @property
    def engines(self) -> tuple[EngineName, ...]:
        return tuple(self.stages[0].train)

    @property
    def digest(self) -> str:
        """sha256 of the manifest's own bytes: the identity of the bundle."""
        return hash_bytes(self.to_json())

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def exchange_specs(self, stage: int) -> list[TensorSpec]:
        """Tensors of the exchange vector of a stage, in order, named `segment/tensor`."""
        return [
            TensorSpec(name=f"{name}/{tensor.name}", shape=tensor.shape)
            for name in self.plan.stages[stage].active
            for tensor in self.segment(name).tensors
        ]
