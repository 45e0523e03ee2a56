"""Names that every room shares and that cost nothing to import: a device's training process loads no pydantic."""

from typing import Literal, Protocol

EngineName = Literal["executorch", "onnxruntime", "torch"]
ENGINES: tuple[EngineName, ...] = ("executorch", "onnxruntime", "torch")
Role = Literal["train", "eval", "frozen", "embed", "loss", "backward"]
Precision = Literal["fp32", "int8"]
Reference = Literal["momentum", "start", "previous", "teacher"]
"""Copies of some of the active tensors, from another time, that a program takes after its weights:

    momentum   a moving average of the weights; it starts each round as a copy of them
    start      the weights as they came at the start of the round
    previous   those that this device ended its last round of this stage with; in its first round, `start`
    teacher    those of the end of the previous stage
"""
MOST_INPUT = 1e6
"""Values of an example lie within +- this: larger ones make losses that no learning rate can mend."""
MOST_LOSS = 1e6
"""A mean loss beyond this is no result of training, and an error, as one that is not finite is."""
LABEL = "label"  # the batch input that holds int64 classes; the other inputs are named by modality


def second_view(modality: str) -> str:
    """The batch input with the second view of the same examples, for self-supervised programs."""
    return f"{modality}_second"


def key_of(view: str) -> str:
    """The input of a `loss` program with the embeddings of a view by the momentum copy: what the other view should meet."""
    return f"{view}_key"


ANY_MODALITY = "x"
"""What the programs for a device with one modality call it where they do not depend on which one it is: equal programs of two
modalities are one file. The device puts the modality's own name there."""


def gradient_input(modality: str) -> str:
    """The input of a `backward` program that takes the gradient of the loss for a modality's embeddings, (batch, output)."""
    return f"{modality}_gradient"


class TensorShape(Protocol):
    """Name, shape and dtype of a tensor: `lamina.plans.segments.TensorSpec` in a manifest, `edge_client.job.Tensor` in a
    job."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def count(self) -> int: ...


class ReferenceShape(Protocol):
    """A reference of a program: `lamina.bundles.manifest.ProgramReference` or `edge_client.job.ReferenceFile`."""

    @property
    def kind(self) -> Reference: ...
    @property
    def tensors(self) -> tuple[int, ...]: ...


class ProgramShape(Protocol):
    """What a runtime has to know of a program: `lamina.bundles.manifest.Program`, or `edge_client.job.ProgramFile`."""

    @property
    def role(self) -> Role: ...
    @property
    def weights(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def frozen(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def inputs(self) -> "tuple[TensorShape, ...]": ...
    @property
    def max_batch(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def references(self) -> "tuple[ReferenceShape, ...]": ...
