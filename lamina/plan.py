"""The plan: model + strategy + stages + training settings; all that is decided before the first round."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina.model import ModelDescription, Name
from lamina.record import Record
from lamina.segments import prefix_chain, segment_names

StrategyName = Literal["layerwise", "progressive", "end_to_end"]
PositiveFloat = Annotated[float, Field(gt=0)]


class Stage(Record):
    """One step of the plan: which segments train, which are frozen, for how many rounds.

    `active` is in exchange order. `frozen` are the segments below the active ones; a segment in neither list is not part
    of the model yet. `rounds` may be 0: the segments are attached and never trained.
    """

    index: Annotated[int, Field(ge=0)]
    active: Annotated[tuple[str, ...], Field(min_length=1)]
    frozen: tuple[str, ...] = ()
    rounds: Annotated[int, Field(ge=0)]
    learning_rate: PositiveFloat

    def frozen_chain(self, model: ModelDescription, modality: str) -> list[str]:
        """The frozen prefix of a modality, in the order its features pass it; empty when the stem is active."""
        return [name for name in prefix_chain(model, modality) if name in self.frozen]

    def active_chain(self, model: ModelDescription, modality: str) -> list[str]:
        """The active part of stem and layers of a modality, in order."""
        return [name for name in prefix_chain(model, modality) if name in self.active]


class SGD(Record):
    """torch.optim.SGD: momentum without dampening, L2 weight decay."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class AdamW(Record):
    """torch.optim.AdamW: decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


OptimizerSettings = Annotated[SGD | AdamW, Field(discriminator="kind")]


class FeatureStore(Record):
    """How a device keeps the features of its frozen prefix on disk.

    `encoding` is what a stored value takes: 4 bytes, 2, or 1 with one scale for each token. With augmented data, `views`
    versions of every example are stored; epoch e trains on version e mod views.
    """

    encoding: Literal["fp32", "fp16", "int8"] = "fp32"
    views: Annotated[int, Field(ge=1, le=64)] = 1


class Augmentation(Record):
    """Random changes of one modality's training examples; they depend on seed, example and view, and on nothing else.

    `shift` moves the example by up to so many steps of its last axis (pixels, samples; for audio frames the first axis) and
    fills with zeros, `noise` is the standard deviation of added Gaussian noise, `flip` mirrors half of the images.
    """

    shift: Annotated[int, Field(ge=0)] = 0
    noise: Annotated[float, Field(ge=0)] = 0.0
    flip: bool = False


class Training(Record):
    """What a device does in one round. The optimiser starts fresh in each round, as in FedMML.

    `micro_batch` samples are in memory at a time (None: the whole batch); the gradient is that of the whole batch.
    `prefix_precision` is that of the frozen layers' weights. `download_encoding` and `upload_encoding` are the smallest
    encodings that a device may be given and asked for; one that cannot read them gets the next larger one that it knows.
    """

    batch_size: Annotated[int, Field(ge=2)] = 32
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    local_epochs: Annotated[int, Field(ge=1)] = 1
    optimizer: OptimizerSettings = AdamW()
    features: FeatureStore = FeatureStore()
    augmentation: dict[Name, Augmentation] = Field(default_factory=dict)
    prefix_precision: Literal["fp32", "int8"] = "fp32"
    download_encoding: Literal["fp32", "fp16", "int8"] = "fp32"
    upload_encoding: Literal["fp32", "fp16", "int8"] = "fp32"
    compression: Literal["none", "zstd"] = "none"

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> "Training":
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch_size {self.batch_size}")
        if self.features.views > 1 and not self.augmentation:
            raise ValueError(f"features.views is {self.features.views}, but without augmentation all views are equal")
        return self

    @property
    def samples_in_memory(self) -> int:
        """The largest batch that a program with activations has to take."""
        return self.micro_batch or self.batch_size


class Cohort(Record):
    """Who takes part in a round.

    A round starts when `size` devices have checked in and closes when all of them have sent an update, or at
    `deadline_seconds` after its start with at least `min_updates`. A device that stays silent for `lease_seconds`
    loses its place to another one that asks for work.
    """

    size: Annotated[int, Field(ge=1)] = 4
    min_updates: Annotated[int, Field(ge=1)] = 1
    deadline_seconds: PositiveFloat = 3600.0
    lease_seconds: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _min_fits(self) -> "Cohort":
        if self.min_updates > self.size:
            raise ValueError(f"min_updates {self.min_updates} is larger than the cohort size {self.size}")
        return self


class Plan(Record):
    """Everything that is decided before the first round."""

    version: Literal[1] = 1
    name: Name
    model: ModelDescription
    strategy: StrategyName
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    training: Training = Training()
    cohort: Cohort = Cohort()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _stages_fit_the_model(self) -> "Plan":
        known = segment_names(self.model)
        for position, stage in enumerate(self.stages):
            if stage.index != position:
                raise ValueError(f"stage {position} has index {stage.index}; stages count up from 0")
            unknown = [name for name in (*stage.active, *stage.frozen) if name not in known]
            if unknown:
                raise ValueError(f"stage {position} names segments that model {self.model.name!r} lacks: {unknown}")
            both = set(stage.active) & set(stage.frozen)
            if both:
                raise ValueError(f"stage {position} has segments both active and frozen: {sorted(both)}")
            if list(stage.active) != [name for name in known if name in stage.active]:
                raise ValueError(f"stage {position}: active segments must be in exchange order {known}")
            for modality in self.model.modalities:
                chain = prefix_chain(self.model, modality)
                present = stage.frozen_chain(self.model, modality) + stage.active_chain(self.model, modality)
                if present != chain[: len(present)] or not present:
                    raise ValueError(f"stage {position}: {modality} has {present}, which is no prefix of {chain}")
        for modality, augmentation in self.training.augmentation.items():
            if modality not in self.model.modalities:
                raise ValueError(f"augmentation names {modality!r}; the model has {list(self.model.modalities)}")
            kind = self.model.encoder(modality).input.kind
            if kind == "text_tokens" or (augmentation.flip and kind not in ("image_patches", "image")):
                raise ValueError(f"augmentation of {modality!r}: texts cannot be changed, and only images can be flipped")
        if not any(stage.rounds for stage in self.stages):
            raise ValueError("every stage has 0 rounds: nothing would be trained")
        return self
