"""Split training: what the exporter writes. Programs by name, the parts' tensors, and how a program takes them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from lamina.bounds import MAX_ITEMS, MAX_SEGMENTS, Count, Note, SegmentName, Shape, TensorName
from lamina.bundles.manifest import Sha256
from lamina.encoding.quantize import frozen_weights
from lamina.encoding.tensors import Float32
from lamina.names import ENGINES, EngineName, Precision, ReferenceShape, Role
from lamina.plans.model import Positive
from lamina.plans.segments import Segment, TensorSpec
from lamina.record import Record
from lamina.split.plan import FUSION, Party, SplitPlan


class SplitProgram(Record):
    """One graph file: (tensors of `parts`..., inputs...) -> `outputs`. `inputs` have shapes without the batch axis.

    With precision `int8`, the matrices of frozen layers are int8 with row scales, and all other tensors are vectors, whatever
    their shape: an engine takes each weight of two axes for an int8 matrix (`lamina.bundles.manifest.Program`).
    """

    engine: EngineName
    blob: Sha256
    runs_on: Party
    parts: Annotated[tuple[SegmentName, ...], Field(max_length=MAX_SEGMENTS)]
    weights: Annotated[tuple[Shape, ...], Field(max_length=MAX_ITEMS)]
    inputs: Annotated[tuple[TensorSpec, ...], Field(max_length=1000)]
    outputs: Annotated[tuple[TensorName, ...], Field(max_length=1000)]
    max_batch: Positive
    precision: Precision = "fp32"
    activation_bytes: Count

    @property
    def role(self) -> Role:
        """For engines: a function that is run as it is. Its gradients are in the graph, also for torch."""
        return "frozen"

    @property
    def references(self) -> tuple[ReferenceShape, ...]:
        return ()

    @property
    def frozen(self) -> tuple[tuple[int, ...], ...]:
        """Whole parts are frozen here, and the tensors of those count as weights."""
        return ()


def taken_weights(plan: SplitPlan, precision: Precision, part: str, tensors: Sequence[Float32]) -> list[NDArray[Any]]:
    """A part's tensors as a program of this precision takes them."""
    if precision == "fp32":
        return list(tensors)
    if part in plan.frozen and plan.precision(part) == "int8":
        return frozen_weights(list(tensors), "int8")
    return [tensor.reshape(-1) for tensor in tensors]


class SplitManifest(Record):
    """What the exporter wrote: each hash is the address of a blob in `blobs`, which gives its size in bytes."""

    format: Literal[1] = 1
    kind: Literal["split"] = "split"
    plan: SplitPlan
    parts: Annotated[tuple[Segment, ...], Field(max_length=MAX_SEGMENTS)]
    initial_weights: Annotated[dict[SegmentName, Sha256], Field(max_length=MAX_SEGMENTS)]
    programs: dict[EngineName, Annotated[dict[SegmentName, SplitProgram], Field(max_length=1000)]]
    blobs: Annotated[dict[Sha256, Count], Field(max_length=MAX_ITEMS)]
    versions: Annotated[dict[Note, Note], Field(max_length=1000)]

    @model_validator(mode="after")
    def _is_whole(self) -> "SplitManifest":
        names = [part.name for part in self.parts]
        if names != [*self.plan.frozen, *self.plan.trained]:
            raise ValueError(f"parts {names} are not those of the plan")
        if set(self.initial_weights) != set(names):
            raise ValueError("initial_weights must hold one blob for each part")
        if not self.programs or not set(self.programs) <= set(ENGINES):
            raise ValueError("there are no programs")
        for engine, programs in self.programs.items():
            if set(programs) != set(program_names(self.plan)):
                raise ValueError(f"the programs for {engine} are not those that the plan needs")
            for name, program in programs.items():
                strangers = set(program.parts) - set(names)
                if strangers or program.max_batch != self.plan.training.batch_size:
                    raise ValueError(f"program {name} for {engine} is not one of this plan")
        referred = {*self.initial_weights.values(), *(p.blob for found in self.programs.values() for p in found.values())}
        lacking = referred - set(self.blobs)
        if lacking:
            raise ValueError(f"{len(lacking)} hashes are used but not listed in blobs, the first is {min(lacking)}")
        return self

    def part(self, name: str) -> Segment:
        return next(part for part in self.parts if part.name == name)

    def specs(self, parts: Sequence[str]) -> list[TensorSpec]:
        """Tensors of these parts, in order, named `part/tensor`."""
        return [
            TensorSpec(name=f"{name}/{tensor.name}", shape=tensor.shape) for name in parts for tensor in self.part(name).tensors
        ]


def program_names(plan: SplitPlan) -> list[str]:
    """The programs of a plan: by modality `prefix`, `low`, `low_backward`, `classify`, `transfer` on the device, `high`,
    `high_backward` and the fusion net on the coordinator; or, on the device alone, one step for each phase."""
    if plan.party == "device":
        return [*(f"{m}.prefix" for m in plan.modalities), "step", "step_transfer", "answer"]
    by_modality = ("prefix", "low", "low_backward", "classify", "transfer", "high", "high_backward")
    return [*(f"{m}.{name}" for m in plan.modalities for name in by_modality), FUSION, "fusion_backward"]


def float_arrays(vector: Float32, tensors: Sequence[TensorSpec]) -> list[Float32]:
    """Views into a flat vector, one for each tensor, in order."""
    views, start = [], 0
    for tensor in tensors:
        views.append(vector[start : start + tensor.count].reshape(tensor.shape))
        start += tensor.count
    return views


def flat(arrays: Sequence[NDArray[Any]]) -> Float32:
    """The arrays one after the other as one new vector."""
    return np.concatenate([array.reshape(-1) for array in arrays]).astype(np.float32, copy=False)
