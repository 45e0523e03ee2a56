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


class Training(Record):
    """What a device does in one round. The optimiser starts fresh in each round, as in FedMML."""

    batch_size: Annotated[int, Field(ge=2)] = 32
    local_epochs: Annotated[int, Field(ge=1)] = 1
    optimizer: OptimizerSettings = AdamW()
    upload_encoding: Literal["fp32", "fp16"] = "fp32"


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
        if not any(stage.rounds for stage in self.stages):
            raise ValueError("every stage has 0 rounds: nothing would be trained")
        return self
