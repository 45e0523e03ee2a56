"""The description of a model: encoders, projection heads, objective. Words only, no tensors.

An encoder is `stem -> layers[0..n) -> norm -> mean pool`; a projection head follows each encoder; the objective joins
them. `export.models` builds the PyTorch modules from this description, and nobody else needs to.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina.record import Record

Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class ImagePatches(Record):
    """Images (channels, height, width) float32, cut into squares of `patch` pixels; one token each."""

    kind: Literal["image_patches"] = "image_patches"
    channels: Positive
    height: Positive
    width: Positive
    patch: Positive

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> "ImagePatches":
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"patch {self.patch} does not divide an image of {self.height}x{self.width}")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)

    @property
    def tokens(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


class AudioFrames(Record):
    """Spectral frames (frames, coefficients) float32; one token each."""

    kind: Literal["audio_frames"] = "audio_frames"
    frames: Positive
    coefficients: Positive

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, self.coefficients)

    @property
    def tokens(self) -> int:
        return self.frames


class SensorWindows(Record):
    """Sensor windows (channels, samples) float32, cut in time into pieces of `patch` samples; one token each."""

    kind: Literal["sensor_windows"] = "sensor_windows"
    channels: Positive
    samples: Positive
    patch: Positive

    @model_validator(mode="after")
    def _patches_tile_the_window(self) -> "SensorWindows":
        if self.samples % self.patch:
            raise ValueError(f"patch {self.patch} does not divide a window of {self.samples} samples")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.samples)

    @property
    def tokens(self) -> int:
        return self.samples // self.patch


class TextTokens(Record):
    """Token ids (length,) int64 in [0, vocabulary); shorter texts are padded by the caller with id 0."""

    kind: Literal["text_tokens"] = "text_tokens"
    vocabulary: Positive
    length: Positive

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def tokens(self) -> int:
        return self.length


Input = Annotated[ImagePatches | AudioFrames | SensorWindows | TextTokens, Field(discriminator="kind")]


class Encoder(Record):
    """One modality's transformer: `layers` pre-norm blocks of `width`, MLP width `mlp_ratio * width`."""

    modality: Name
    input: Input
    width: Positive
    heads: Positive
    layers: Positive
    mlp_ratio: Positive = 4

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Encoder":
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide width {self.width}")
        return self


class Projection(Record):
    """The projection head of each modality: Linear(width, hidden), GELU, Linear(hidden, output)."""

    hidden: Positive
    output: Positive


class Supervised(Record):
    """Cross entropy on one linear classifier over the concatenated projections."""

    kind: Literal["supervised"] = "supervised"
    classes: Annotated[int, Field(ge=2)]


class Contrastive(Record):
    """Symmetric InfoNCE between two modalities within the batch (methods: FedMML, section 1.2), temperature in (0, 1]."""

    kind: Literal["contrastive"] = "contrastive"
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.05


Objective = Annotated[Supervised | Contrastive, Field(discriminator="kind")]


class ModelDescription(Record):
    """A multimodal (or one-modality) model."""

    name: Name
    encoders: Annotated[tuple[Encoder, ...], Field(min_length=1)]
    projection: Projection
    objective: Objective

    @model_validator(mode="after")
    def _check(self) -> "ModelDescription":
        names = [encoder.modality for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"modalities must have different names, given {names}")
        if self.objective.kind == "contrastive" and len(names) != 2:
            raise ValueError(f"the contrastive objective joins exactly two modalities, given {names}")
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(encoder.modality for encoder in self.encoders)

    def encoder(self, modality: str) -> Encoder:
        return next(encoder for encoder in self.encoders if encoder.modality == modality)

    def only(self, modality: str) -> "ModelDescription":
        """The same family with one modality alone: the baseline that fusion has to beat."""
        return self.model_copy(update={"name": f"{self.name}_{modality}", "encoders": (self.encoder(modality),)})
