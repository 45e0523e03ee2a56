"""The manifest: what the exporter wrote, so that a coordinator and its devices can use it without torch.

A program is a pure function without weights inside:

    train     (weights..., batch inputs...) -> loss, correct, gradient of the loss for each weight
    eval      (weights..., batch inputs...) -> loss, correct
    frozen    (weights..., one batch input) -> features

`weights` are the trained tensors of the stage's active segments (train, eval) or of one segment (frozen), in exchange order.
After them come the frozen tensors of the same segments, in the same order, where the model's author froze some
(`requires_grad=False`): constants without a gradient. A device fetches them once, by `Manifest.frozen_tensors`.

A contrastive loss joins the samples of a batch, and so do self-supervised ones. Micro-batches then need three steps for the
exact gradient: embed all micro-batches, differentiate the loss of the whole batch with respect to the embeddings, send that
back through each micro-batch. Where the plan asks for it, a stage's `train` is a `backward` program and its `eval` an `embed`
program:

    embed     (weights..., batch inputs...) -> one embedding (batch, output) for each modality, or each view; moco and byol:
              those of the predictor, and then one of each view by the momentum copy, which the program takes as a reference
    loss      (embeddings of the whole batch...) -> loss, correct, gradient of the loss for each embedding
    backward  (weights..., batch inputs..., gradients of the embeddings...) -> gradient for each weight

With a contrastive objective, a device with one modality has the programs of two views (`ModelDescription.of_device`), in
micro-batches with a loss of their own. Their inputs are `lamina.names.ANY_MODALITY` and its second view, whichever it is.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina.bounds import MAX_ITEMS, MAX_SEGMENTS, MAX_STAGES, Count, Difference, Note, PositiveCount, SegmentName, Shape, Text
from lamina.names import ENGINES, LABEL, EngineName, Precision, Reference, Role, gradient_input, second_view
from lamina.plans.model import Name
from lamina.plans.plan import Plan
from lamina.plans.segments import Segment, TensorSpec, belongs, segment_names
from lamina.record import Record

__all__ = [
    "ENGINES",
    "LABEL",
    "EngineName",
    "Manifest",
    "PartialStage",
    "Precision",
    "Program",
    "ProgramReference",
    "Reference",
    "Rewrite",
    "Role",
    "Sha256",
    "StageCost",
    "StagePrograms",
    "gradient_input",
    "second_view",
]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ProgramReference(Record):
    """Tensors that a program takes after its weights and frozen tensors: copies of those at these places of `Program.weights`,
    from another time (`lamina.names.Reference`). They are constants: the program gives no gradient for them."""

    kind: Reference
    tensors: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_ITEMS)]


class Program(Record):
    """One graph file: (weights..., frozen tensors..., tensors of each reference..., batch inputs...) -> outputs. `inputs` have
    shapes without the batch axis, which may be 1..max_batch.

    `weights` and `frozen` are the shapes of the float32 weights and of the tensors that nothing trains. With precision `int8`,
    each of both that has two axes is an int8 matrix followed by one float32 scale for each row: weight = scale * int8
    (`lamina.encoding.quantize`).
    """

    engine: EngineName
    role: Role
    blob: Sha256
    weights: Annotated[tuple[Shape, ...], Field(max_length=MAX_ITEMS)]
    inputs: Annotated[tuple[TensorSpec, ...], Field(max_length=1000)]
    max_batch: PositiveCount
    precision: Precision = "fp32"
    references: Annotated[tuple[ProgramReference, ...], Field(max_length=16)] = ()
    frozen: Annotated[tuple[Shape, ...], Field(max_length=MAX_ITEMS)] = ()
    activation_bytes: Count
    """Peak bytes of intermediate values at `max_batch`: the planned arena (ExecuTorch), else the peak of live tensors
    of the graph in its written order."""


class StageCost(Record):
    """What a stage costs one device. FLOPs are multiply-accumulates (methods, section 0.1): 3 x forward when trained,
    1 x forward when frozen; 4 x where micro-batches are embedded first (`lamina.plans.plan.Plan.embeds_first`)."""

    active_parameters: Count
    """Those that are trained, and no tensor that the model's author froze."""
    frozen_parameters: Count
    """Of the frozen prefix, and the frozen tensors of the active segments."""
    flops_per_sample: Count
    """One training step for one sample from cached features."""
    prefix_flops_per_sample: Count
    """One pass of the whole frozen prefix; with the feature cache, a device pays it once per sample, not per epoch."""
    planned_bytes: dict[EngineName, Count]
    """Weights + gradients + optimiser moments + frozen tensors + activations of one micro-batch. With contrastive
    micro-batches: of the largest of the three programs, and the embeddings of the whole batch."""
    round_bytes_down: Count
    """Active weights in the plan's download encoding, before compression."""
    round_bytes_up: Count
    """One update in the plan's upload encoding, before compression."""
    program_bytes: dict[EngineName, Count]
    """Programs that no earlier stage used; downloaded once."""
    frozen_bytes: Count
    """Weights of the frozen prefix in the download encoding, and the frozen tensors of all segments of the stage, which are
    fetched once and as float32: what a device that joins at this stage must fetch in addition."""


class PartialStage(Record):
    """The programs of a stage for devices that have these modalities only: the segments of the others are neither trained nor
    exchanged. To a supervised objective they count as zeros after their projection; a contrastive one compares two views."""

    modalities: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)]
    train: dict[EngineName, Sha256]
    eval: dict[EngineName, Sha256]
    planned_bytes: dict[EngineName, Count]


class StagePrograms(Record):
    """The programs and the cost of one stage of the plan.

    `calibrate` trains all that is attached so far, on the server's own data (`lamina.plans.plan.Calibration`).
    """

    index: Count
    train: dict[EngineName, Sha256]
    eval: dict[EngineName, Sha256]
    partial: Annotated[tuple[PartialStage, ...], Field(max_length=1000)] = ()
    calibrate: dict[EngineName, Sha256] = Field(default_factory=dict)
    cost: StageCost


class Rewrite(Record):
    """A change that made the model exportable: what, how often, and the largest measured difference to the original."""

    where: Note
    kind: Note
    count: PositiveCount
    largest_difference: Difference
    note: Text = ""


class Manifest(Record):
    """Everything that a bundle holds. Each hash is the address of a blob in `blobs`, which gives its size in bytes."""

    format: Literal[1] = 1
    plan: Plan
    segments: Annotated[tuple[Segment, ...], Field(max_length=MAX_SEGMENTS)]
    initial_weights: Annotated[dict[SegmentName, Sha256], Field(max_length=MAX_SEGMENTS)]
    frozen_tensors: Annotated[dict[SegmentName, Sha256], Field(max_length=MAX_SEGMENTS)] = Field(default_factory=dict)
    """Segment -> a float32 file of its frozen tensors, for the segments that have any. They are the same in every round."""
    programs: Annotated[dict[Sha256, Program], Field(max_length=MAX_ITEMS)]
    frozen_programs: dict[EngineName, Annotated[dict[SegmentName, Sha256], Field(max_length=MAX_SEGMENTS)]]
    loss_programs: dict[EngineName, Sha256] = Field(default_factory=dict)
    """Only for micro-batches where samples are compared: the loss of a whole batch of embeddings, the same in every stage."""
    view_loss_programs: dict[EngineName, Sha256] = Field(default_factory=dict)
    """The same for devices with one modality: the loss of the embeddings of two views."""
    prefix_errors: dict[EngineName, Annotated[dict[SegmentName, Difference], Field(max_length=MAX_SEGMENTS)]] = Field(
        default_factory=dict
    )
    """With an int8 prefix: |int8 - fp32| / |fp32| (Euclidean norms) of the features after each frozen segment, measured with
    the initial weights of the bundle."""
    prefix_errors_on: Note = ""
    """What those errors were measured on: the sha256 of a data file, or random inputs."""
    segment_macs: Annotated[dict[SegmentName, Count], Field(max_length=MAX_SEGMENTS)] = Field(default_factory=dict)
    """Multiply-accumulates of one forward pass of each segment for one sample."""
    rewrites: Annotated[tuple[Rewrite, ...], Field(max_length=MAX_ITEMS)] = ()
    notes: Annotated[tuple[Text, ...], Field(max_length=MAX_ITEMS)] = ()
    """What the adapters changed or left out of the user's model, one sentence each."""
    stages: Annotated[tuple[StagePrograms, ...], Field(max_length=MAX_STAGES)]
    blobs: Annotated[dict[Sha256, Count], Field(max_length=MAX_ITEMS)]
    versions: Annotated[dict[Note, Note], Field(max_length=1000)]

    @model_validator(mode="after")
    def _is_whole(self) -> "Manifest":
        names = [segment.name for segment in self.segments]
        if names != segment_names(self.plan.model):
            raise ValueError(f"segments {names} are not those of the plan's model")
        if set(self.initial_weights) != set(names):
            raise ValueError("initial_weights must hold one blob for each segment")
        if set(self.frozen_tensors) != {segment.name for segment in self.segments if segment.frozen}:
            raise ValueError("frozen_tensors must hold one blob for each segment that has frozen tensors, and no other")
        if len(self.stages) != len(self.plan.stages):
            raise ValueError(f"{len(self.stages)} stages of programs for {len(self.plan.stages)} stages of the plan")
        referred = {*self.initial_weights.values(), *self.frozen_tensors.values(), *self.programs}
        for stage in self.stages:
            referred |= set(stage.train.values()) | set(stage.eval.values()) | set(stage.calibrate.values())
            for part in stage.partial:
                referred |= set(part.train.values()) | set(part.eval.values())
        for chain in self.frozen_programs.values():
            referred |= set(chain.values())
        referred |= set(self.loss_programs.values()) | set(self.view_loss_programs.values())
        lacking = referred - set(self.blobs)
        if lacking:
            raise ValueError(f"{len(lacking)} hashes are used but not listed in blobs, the first is {min(lacking)}")
        return self

    @property
    def engines(self) -> tuple[EngineName, ...]:
        return tuple(self.stages[0].train)

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def exchange(self, stage: int, modalities: Sequence[str] = ()) -> list[str]:
        """The segments that a device trains and sends in a stage: all active ones, or those of its modalities and the head."""
        return [name for name in self.plan.stages[stage].active if belongs(name, modalities)]

    def specs(self, segments: Sequence[str]) -> list[TensorSpec]:
        """Trained tensors of these segments, in order, named `segment/tensor`."""
        return [
            TensorSpec(name=f"{name}/{tensor.name}", shape=tensor.shape)
            for name in segments
            for tensor in self.segment(name).tensors
        ]

    def frozen_specs(self, segments: Sequence[str]) -> list[TensorSpec]:
        """Frozen tensors of these segments, in order, named `segment/tensor`."""
        return [
            TensorSpec(name=f"{name}/{tensor.name}", shape=tensor.shape)
            for name in segments
            for tensor in self.segment(name).frozen
        ]

    def exchange_specs(self, stage: int, modalities: Sequence[str] = ()) -> list[TensorSpec]:
        """Tensors of the exchange vector of a stage, in order."""
        return self.specs(self.exchange(stage, modalities))

    def calibrated(self, stage: int) -> list[str]:
        """The segments that the server trains in a stage: all that are attached so far, in exchange order."""
        attached = {*self.plan.stages[stage].active, *self.plan.stages[stage].frozen}
        return [segment.name for segment in self.segments if segment.name in attached]
