"""Segments: the unit of freezing, exchange and caching.

    {modality}.stem   {modality}.layers.{i}   {modality}.norm   {modality}.projection   head
    {modality}.predictor    with a momentum branch: the prediction head of MoCo and BYOL
    {modality}.classifier   with gradient blending: the classifier of this modality alone

A segment owns an ordered list of named tensors that are trained, and one of those that are frozen. The order of segments given
by `segment_names` and of trained tensors within a segment is the one order of the exchange vector, for every engine.
"""

from collections.abc import Collection
from math import prod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina.bounds import MAX_COUNT, MAX_ITEMS, SegmentName, Shape, TensorName
from lamina.plans.model import ModelDescription, Name
from lamina.record import Record

DType = Literal["float32", "int64"]


class TensorSpec(Record):
    """Name, shape and dtype of one tensor."""

    name: TensorName
    shape: Shape
    dtype: DType = "float32"

    @model_validator(mode="after")
    def _is_countable(self) -> "TensorSpec":
        if self.count > MAX_COUNT:
            raise ValueError(f"tensor {self.name!r} of shape {self.shape} has {self.count} values, above {MAX_COUNT}")
        return self

    @property
    def count(self) -> int:
        return prod(self.shape)


class Segment(Record):
    """A named part of the model with its float32 tensors, in order: `tensors` are trained and exchanged, `frozen` are those
    that the model's author froze (`requires_grad=False`): constants of the run, which every program of the segment takes."""

    name: SegmentName
    modality: Name | None
    tensors: Annotated[tuple[TensorSpec, ...], Field(max_length=MAX_ITEMS)]
    frozen: Annotated[tuple[TensorSpec, ...], Field(max_length=MAX_ITEMS)] = ()

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(tensor.count for tensor in self.tensors)

    @property
    def all_tensors(self) -> tuple[TensorSpec, ...]:
        return (*self.tensors, *self.frozen)

    @property
    def constants(self) -> int:
        """Numbers that nothing changes."""
        return sum(tensor.count for tensor in self.frozen)


def stem(modality: str) -> str:
    return f"{modality}.stem"


def layer(modality: str, index: int) -> str:
    return f"{modality}.layers.{index}"


def norm(modality: str) -> str:
    return f"{modality}.norm"


def projection(modality: str) -> str:
    return f"{modality}.projection"


def predictor(modality: str) -> str:
    return f"{modality}.predictor"


def classifier(modality: str) -> str:
    return f"{modality}.classifier"


HEAD = "head"


def prefix_chain(model: ModelDescription, modality: str) -> list[str]:
    """The segments that a feature passes in order before the final norm: stem, then every layer."""
    return [stem(modality), *(layer(modality, i) for i in range(model.encoder(modality).layers))]


def belongs(segment: str, modalities: Collection[str]) -> bool:
    """Whether a segment is part of the model of a device with these modalities; none stand for all. The head belongs to all."""
    return not modalities or segment == HEAD or segment.partition(".")[0] in modalities


def heads_of(model: ModelDescription, modality: str) -> list[str]:
    """What follows the final norm of a modality, in exchange order: trained in every stage."""
    objective = model.objective
    names = [projection(modality)]
    if objective.kind == "self_supervised" and objective.has_predictor:
        names.append(predictor(modality))
    if objective.kind == "supervised" and objective.blend.get(modality):
        names.append(classifier(modality))
    return names


def segment_names(model: ModelDescription) -> list[str]:
    """All segments of the model in exchange order: encoder by encoder, the task head last."""
    names: list[str] = []
    for modality in model.modalities:
        names += [*prefix_chain(model, modality), norm(modality), *heads_of(model, modality)]
    if model.objective.kind == "supervised":
        names.append(HEAD)
    return names
