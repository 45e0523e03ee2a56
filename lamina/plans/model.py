"""The description of a model: encoders, projection heads, objective. Words only, no tensors.

An encoder is `stem -> layers[0..n) -> norm -> pool`; a projection head follows each encoder; the objective joins them. It is
one of the built-in family (`Encoder`), or a module of the user's own (`ModuleEncoder`). `export.models.models` builds the
PyTorch modules from this description, and nobody else needs to.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lamina.bounds import MAX_FACTOR, MAX_LAYERS
from lamina.record import Record

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
FACTORY = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"
"""`package.module:function`"""


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


class Image(Record):
    """Images (channels, height, width) float32, for an encoder that is a module."""

    kind: Literal["image"] = "image"
    channels: Positive
    height: Positive
    width: Positive

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)


class Values(Record):
    """Any float32 array of a fixed shape, such as a waveform or a spectrogram, for an encoder that is a module."""

    kind: Literal["values"] = "values"
    shape: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=16)]


FamilyInput = Annotated[ImagePatches | AudioFrames | SensorWindows | TextTokens, Field(discriminator="kind")]
Input = Annotated[ImagePatches | AudioFrames | SensorWindows | TextTokens | Image | Values, Field(discriminator="kind")]


class Encoder(Record):
    """One modality's transformer: `layers` pre-norm blocks of `width`, MLP width `mlp_ratio * width`."""

    modality: Name
    input: FamilyInput
    width: Positive
    heads: Positive
    layers: Layers
    mlp_ratio: Positive = 4

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Encoder":
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide width {self.width}")
        return self

    def feature_shape(self, depth: int) -> tuple[int, ...]:
        """What the stem (depth 0) or layer `depth - 1` gives for one example: always (tokens, width)."""
        return (self.input.tokens, self.width)

    def first(self, layers: int) -> "Encoder":
        """The encoder with its first layers alone."""
        return self.model_copy(update={"layers": layers})


class ModuleEncoder(Record):
    """One modality's encoder that `factory` makes: a function `package.module:name` on the machine that exports.

    `arguments` are handed to it, `options` to the adapter of what it makes (docs/export.md). `features` are the shapes, for one
    example, after the stem and after each layer; `width` is that of the pooled features. Devices and coordinators never call
    the factory.
    """

    modality: Name
    factory: Annotated[str, Field(pattern=FACTORY, max_length=500)]
    arguments: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    input: Input
    features: Annotated[
        tuple[Annotated[tuple[Positive, ...], Field(min_length=1, max_length=16)], ...],
        Field(min_length=2, max_length=MAX_LAYERS + 1),
    ]
    width: Positive

    @property
    def layers(self) -> int:
        return len(self.features) - 1

    def feature_shape(self, depth: int) -> tuple[int, ...]:
        """What the stem (depth 0) or layer `depth - 1` gives for one example."""
        return self.features[depth]

    def first(self, layers: int) -> "ModuleEncoder":
        """The encoder with its first layers alone."""
        return self.model_copy(update={"features": self.features[: layers + 1]})


def _kind_of_encoder(value: Any) -> str:
    is_module = "factory" in value if isinstance(value, dict) else isinstance(value, ModuleEncoder)
    return "module" if is_module else "family"


AnyEncoder = Annotated[
    Annotated[Encoder, Tag("family")] | Annotated[ModuleEncoder, Tag("module")], Discriminator(_kind_of_encoder)
]


class Projection(Record):
    """The projection head of each modality: Linear(width, hidden), GELU, Linear(hidden, output).

    Without `hidden` it is one Linear(width, output) without a bias, as CLIP has it.
    """

    hidden: Positive | None
    output: Positive


Weight = Annotated[float, Field(ge=0, le=MAX_FACTOR)]
Fusion = Literal["concat", "sum", "gated", "self_attention", "co_attention"]


class Supervised(Record):
    """Cross entropy of a classifier over the projections of all modalities, joined by `fusion`.

    Further terms, each off at 0 (methods: FedMML, section 1.2, but for `distill`):
    `blend` adds, with its weight, the cross entropy of a classifier of each modality alone (gradient blending); `align` adds
    1 - cos(z, z of the projection as it was at the start of the round), summed over modalities; `distill` adds
    T^2 KL(classes of the model at the end of the previous stage || classes now), at temperature T = `distill_temperature`.
    """

    kind: Literal["supervised"] = "supervised"
    classes: Annotated[int, Field(ge=2, lt=2**31)]
    fusion: Fusion = "concat"
    blend: dict[Name, Weight] = Field(default_factory=dict)
    align: Weight = 0.0
    distill: Weight = 0.0
    distill_temperature: Annotated[float, Field(gt=0, le=MAX_FACTOR)] = 2.0


class Contrastive(Record):
    """Symmetric InfoNCE between two modalities within the batch (methods: FedMML, section 1.2), temperature in (0, 1].

    With `classes`, the data has labels, and all pairs of one class are each other's positives: for pairings that are by class
    rather than by instance.

    A device with one of the modalities trains it on two views of its own examples (`ModelDescription.of_device`).
    """

    kind: Literal["contrastive"] = "contrastive"
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    classes: Annotated[int, Field(ge=2, lt=2**31)] | None = None


class SelfSupervised(Record):
    """Two augmented views of one modality, without labels (methods: LW-FedSSL, section 2; FLL, section 3).

    `simclr`: both views through the same model, each sample's other view against all other samples. `moco`: a prediction head
    on top of the projection, against a momentum copy of the model. `byol`: the same without negatives. The momentum copy
    starts each round as a copy of the model and follows it: copy = momentum * copy + (1 - momentum) * model after each step.

    `moon` adds MOON's term: the projections move towards those of the model at the start of the round, away from those of the
    device's last own model (methods, section 2.1). `align` adds half the InfoNCE of the projections, of both views, to those
    of the model as received: our reconstruction of the alignment of LW-FedSSL v1 to v3 (section 2.2).
    """

    kind: Literal["self_supervised"] = "self_supervised"
    method: Literal["simclr", "moco", "byol"] = "simclr"
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    predictor_hidden: Positive = 128
    moon: Weight = 0.0
    align: Weight = 0.0

    @property
    def has_predictor(self) -> bool:
        return self.method != "simclr"

    @property
    def is_held(self) -> bool:
        """Whether the loss holds training to the model of another time."""
        return self.moon > 0 or self.align > 0


Objective = Annotated[Supervised | Contrastive | SelfSupervised, Field(discriminator="kind")]


class ModelDescription(Record):
    """A multimodal (or one-modality) model."""

    name: Name
    encoders: Annotated[tuple[AnyEncoder, ...], Field(min_length=1, max_length=64)]
    projection: Projection
    objective: Objective

    @model_validator(mode="after")
    def _check(self) -> "ModelDescription":
        names = [encoder.modality for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"modalities must have different names, given {names}")
        objective = self.objective
        if objective.kind == "contrastive" and len(names) != 2:
            raise ValueError(f"the contrastive objective joins exactly two modalities, given {names}")
        if objective.kind == "self_supervised" and len(names) != 1:
            raise ValueError(f"the self-supervised objective learns one modality at a time, given {names}: one plan for each")
        if objective.kind == "supervised":
            strangers = sorted(set(objective.blend) - set(names))
            if strangers:
                raise ValueError(f"blend names {strangers[0]!r}; the model has {names}")
            if objective.fusion == "co_attention" and len(names) != 2:
                raise ValueError(f"co_attention joins exactly two modalities, given {names}: use self_attention")
            if objective.fusion != "concat" and len(names) == 1:
                raise ValueError(f"there is nothing to fuse with one modality: leave fusion {objective.fusion!r} out")
        return self

    @property
    def labels(self) -> int | None:
        """The number of classes of the labels that training needs; None if it needs none."""
        return None if self.objective.kind == "self_supervised" else self.objective.classes

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(encoder.modality for encoder in self.encoders)

    def encoder(self, modality: str) -> Encoder | ModuleEncoder:
        return next(encoder for encoder in self.encoders if encoder.modality == modality)

    def of_device(self, modalities: Collection[str]) -> "ModelDescription":
        """The model as a device with these modalities trains it; none stand for all.

        It is this model, but for a contrastive objective and one modality. There are no pairs then: the device trains the
        modality on two augmented views of each example, as SimCLR does, at the same temperature and without labels.
        """
        if self.objective.kind != "contrastive" or len(modalities) != 1:
            return self
        (modality,) = modalities
        views = SelfSupervised(method="simclr", temperature=self.objective.temperature)
        return self.model_copy(update={"encoders": (self.encoder(modality),), "objective": views})

    def only(self, modality: str) -> "ModelDescription":
        """The same family with one modality alone: the baseline that fusion has to beat."""
        return self.model_copy(update={"name": f"{self.name}_{modality}", "encoders": (self.encoder(modality),)})
