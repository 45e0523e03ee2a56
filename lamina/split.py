"""Split training (M2FedSA; methods, section 4): the plan, the manifest and the messages.

A large frozen model is cut in two. The device has the low end of each modality's encoder and the classifier, the coordinator
has the rest. Two small adapters are trained inside the frozen layers:

    {m}.stem, {m}.layers.0                 device, frozen
    {m}.modality_adapter  (MA)             device, trained; in the first layer, behind its MLP
    {m}.layers.1 .. {m}.norm               coordinator, frozen
    {m}.task_adapter      (TA)             coordinator, trained; in the last layer, beside its MLP
    {m}.classifier                         device, trained
    fusion                                 coordinator, trained until the switch, then frozen

Activations go up and gradients come down, batch by batch:

    POST /v1/split/runs                                            SplitManifest, Signature in a header -> Published (admin)
    GET  /v1/split/runs                                            RunList
    GET  /v1/split/runs/{run}                                      SplitStatus
    POST /v1/split/check-in                                        SplitCheckIn -> SplitWork | Wait | Refused
    POST {round}/steps/{step}/features?examples=N                  activations of the low ends -> features, fused logits
    POST {round}/steps/{step}/gradients?examples=N                 gradients of those -> gradients of the activations
    POST {round}/answers?examples=N                                activations of test data -> features, fused logits
    PUT  {round}/update                                            tensor file, SplitReport in a header -> SplitAccepted
    PUT  {round}/evaluation                                        SplitEvaluation -> SplitAccepted

{round} is /v1/split/runs/{run}/rounds/{round}. Bodies of the first three are `lamina.split_bodies`.

With `party = "device"`, our variation, the device holds the whole frozen model (int8) and trains all adapters by itself: the
steps and answers fall away, and nobody sees activations or gradients of single batches.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from lamina.compression import Compression
from lamina.errors import ConfigError
from lamina.manifest import Sha256
from lamina.model import Encoder, ModelDescription, Name, Positive, Projection, Supervised
from lamina.names import ENGINES, EngineName, Precision, ReferenceShape, Role
from lamina.plan import AdamW, OptimizerSettings, PositiveFloat
from lamina.quantize import frozen_weights
from lamina.record import GrowingRecord, Record, explain
from lamina.segments import Segment, TensorSpec, classifier, layer, norm, stem
from lamina.tensors import Encoding, Float32, hash_bytes
from lamina.wire import Count, DeviceName, Refused, RunState, Seconds, Wait

Party = Literal["server", "device"]
FUSION = "fusion"
LOGITS = "logits"
FUSED = "fused"
MIDDLE = "middle."
"""Tensors of a task adapter that modalities share begin so."""
MIN_LAYERS = 3
_Share = Annotated[float, Field(ge=0)]


def modality_adapter(modality: str) -> str:
    return f"{modality}.modality_adapter"


def task_adapter(modality: str) -> str:
    return f"{modality}.task_adapter"


class AdapterSettings(Record):
    """Linear(width, hidden), GELU, Linear(hidden, hidden), GELU, Linear(hidden, width), without dropout.

    `start = "frozen_model"` is ours: the last Linear starts at zero, and the modality adapter has a skip around it, so that
    training starts at the frozen model. `"released"` is as published: no skip, every Linear starts at random.
    """

    hidden: Positive = 64
    start: Literal["frozen_model", "released"] = "frozen_model"


class FusionNet(Record):
    """Attention over the features of all modalities, Linear to the width of an encoder, GELU: f; Linear to classes.

    `attention = "modalities"` is our variation: within each sample, over its modalities, so that no answer depends on who else
    is in the batch. `"batch"` is as released: over the samples of the batch. `heads` of `head_width` each.
    """

    attention: Literal["modalities", "batch"] = "modalities"
    heads: Positive = 8
    head_width: Positive = 256
    learning_rate: PositiveFloat = 1e-3


class Transfer(Record):
    """The loss of a device after the switch: task (uni + mm/2) + decision KL/(uni + mm) + feature (1 - cos(B, f)).

    `direction = "released"` is KL(own || fused); `"textbook"` the reverse. It is summed over the batch as released, or its
    `mean` is taken. With `detach`, the denominator is a constant; without, the loss falls when uni rises (docs/split.md).
    """

    task: _Share = 0.6
    decision: _Share = 0.2
    feature: _Share = 0.2
    direction: Literal["released", "textbook"] = "released"
    reduction: Literal["sum", "mean"] = "sum"
    detach: bool = False


class Switch(Record):
    """When the fusion net freezes and transfer begins, for good: over the last `window` differences of the fused loss from
    round to round, std(|d|) / mean(|d|) is below `threshold`."""

    window: Annotated[int, Field(ge=2)] = 10
    threshold: PositiveFloat = 0.3


class SplitTraining(Record):
    """Adapters and classifiers take `optimizer` at `learning_rate`, the fusion net the same at its own rate; moments start
    fresh in each round. The last batch of an epoch may be smaller."""

    batch_size: Annotated[int, Field(ge=2, le=4096)] = 32
    local_epochs: Annotated[int, Field(ge=1)] = 1
    learning_rate: PositiveFloat = 1e-4
    optimizer: OptimizerSettings = AdamW(weight_decay=0.05)


class Traffic(Record):
    """How activations, gradients and updates travel. fp16 gradients are scaled by a power of two, so that none vanish."""

    activations: Encoding = "fp16"
    gradients: Encoding = "fp16"
    updates: Encoding = "fp32"
    compression: Compression = "none"


class Users(Record):
    """Who takes part in a round: `size` users, each one process with the data of all modalities. With `party = "server"` they
    train one after the other; a user that is silent for `lease_seconds` loses its turn in this round. A round counts with
    `min_users` of them, else it begins again. Evaluation follows every `evaluate_every`-th round and the last; 0: never."""

    size: Annotated[int, Field(ge=1)] = 25
    min_users: Annotated[int, Field(ge=1)] = 1
    lease_seconds: PositiveFloat = 600.0
    evaluate_every: Annotated[int, Field(ge=0)] = 10

    @model_validator(mode="after")
    def _min_fits(self) -> "Users":
        if self.min_users > self.size:
            raise ValueError(f"min_users {self.min_users} is larger than size {self.size}")
        return self

    def evaluates(self, round_number: int, rounds: int) -> bool:
        last = round_number + 1 == rounds
        return self.evaluate_every > 0 and (last or (round_number + 1) % self.evaluate_every == 0)


class SplitPlan(Record):
    """Everything that is decided before the first round.

    `frozen_precision` is that of the frozen layers on the device; stems, norms and everything on the coordinator are float32.
    """

    version: Literal[1] = 1
    kind: Literal["split"] = "split"
    name: Name
    encoders: Annotated[tuple[Encoder, ...], Field(min_length=1)]
    classes: Annotated[int, Field(ge=2)]
    rounds: Annotated[int, Field(ge=1)]
    party: Party = "server"
    adapter: AdapterSettings = AdapterSettings()
    fusion: FusionNet = FusionNet()
    transfer: Transfer = Transfer()
    switch: Switch = Switch()
    training: SplitTraining = SplitTraining()
    traffic: Traffic = Traffic()
    users: Users = Users()
    frozen_precision: Precision = "fp32"
    secure_aggregation: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _can_be_split(self) -> "SplitPlan":
        names = self.modalities
        if len(set(names)) != len(names):
            raise ValueError(f"modalities must have different names, given {list(names)}")
        if FUSION in names:
            raise ValueError(f"a modality may not be called {FUSION!r}: that is the fusion net; rename it")
        if len(names) < 2:
            raise ValueError(f"the fusion net joins two modalities or more, given {list(names)}: train one alone with a plan")
        for encoder in self.encoders:
            if encoder.layers < MIN_LAYERS:
                raise ValueError(
                    f"{encoder.modality} has {encoder.layers} layers; a split needs {MIN_LAYERS}: the first for the device, "
                    "two or more for the coordinator"
                )
        if len({encoder.width for encoder in self.encoders}) > 1:
            widths = {encoder.modality: encoder.width for encoder in self.encoders}
            raise ValueError(f"all encoders need one width, that of the fused features they are compared with; given {widths}")
        if self.secure_aggregation and self.party == "server":
            raise ValueError(
                "secure_aggregation hides what each device sends, but the coordinator must see each device's activations to "
                "run its layers on them: set it to false"
            )
        if self.secure_aggregation:
            raise ValueError("secure_aggregation is not built for split plans: set it to false")
        return self

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Raises ConfigError that names the file, the key and what was wrong with it."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no valid TOML: {error}") from error
        except ValidationError as error:
            raise ConfigError(f"{path} is not a valid split plan: {explain(error, cls)}") from error

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(encoder.modality for encoder in self.encoders)

    @property
    def width(self) -> int:
        return self.encoders[0].width

    def encoder(self, modality: str) -> Encoder:
        return next(encoder for encoder in self.encoders if encoder.modality == modality)

    @property
    def model(self) -> ModelDescription:
        """The backbone as other plans describe it: for its data, and for weights that such a plan has trained."""
        return ModelDescription(
            name=self.name,
            encoders=self.encoders,
            projection=Projection(hidden=None, output=self.classes),
            objective=Supervised(classes=self.classes),
        )

    def low(self, modality: str) -> list[str]:
        """The frozen parts of the low end, in order."""
        return [stem(modality), layer(modality, 0)]

    def high(self, modality: str) -> list[str]:
        """The frozen parts of the high end, in order."""
        return [*(layer(modality, i) for i in range(1, self.encoder(modality).layers)), norm(modality)]

    @property
    def frozen(self) -> list[str]:
        return [name for m in self.modalities for name in (*self.low(m), *self.high(m))]

    @property
    def trained(self) -> list[str]:
        parts = [name for m in self.modalities for name in (modality_adapter(m), task_adapter(m), classifier(m))]
        return [*parts, FUSION]

    def sent(self, fused: bool) -> list[str]:
        """The parts that a device trains and sends; after the switch (`fused`) nobody trains the fusion net."""
        if self.party == "device":
            return [name for name in self.trained if not (fused and name == FUSION)]
        return [name for m in self.modalities for name in (modality_adapter(m), classifier(m))]

    @property
    def held(self) -> list[str]:
        """The trained parts that a device is given each round."""
        return self.trained if self.party == "device" else self.sent(False)

    def precision(self, part: str) -> Precision:
        """That of a frozen part: int8 for the layers that a device holds, where the plan says so."""
        on_device = self.party == "device" or part in {name for m in self.modalities for name in self.low(m)}
        return self.frozen_precision if on_device and ".layers." in part else "fp32"


class SplitProgram(Record):
    """One graph file: (tensors of `parts`..., inputs...) -> `outputs`. `inputs` have shapes without the batch axis.

    With precision `int8`, the matrices of frozen layers are int8 with row scales, and all other tensors are vectors, whatever
    their shape: an engine takes each weight of two axes for an int8 matrix (`lamina.manifest.Program`).
    """

    engine: EngineName
    blob: Sha256
    runs_on: Party
    parts: tuple[str, ...]
    weights: tuple[tuple[int, ...], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
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
    parts: tuple[Segment, ...]
    initial_weights: dict[str, Sha256]
    programs: dict[EngineName, dict[str, SplitProgram]]
    blobs: dict[Sha256, Count]
    versions: dict[str, str]

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

    @property
    def digest(self) -> str:
        return hash_bytes(self.to_json())

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


class SplitCheckIn(Record):
    """A user asks for work and says what it has; a user has all modalities of the plan."""

    engine: EngineName
    modalities: tuple[Name, ...]
    train_examples: Annotated[int, Field(ge=1)]
    test_examples: Count
    run: str | None = None
    compressions: tuple[Compression, ...] = ("none",)


class SplitWork(Record):
    """Work for one round: `train` or `evaluate` with these weights. After the switch, `fused` is true.

    The turn is kept for `lease_seconds` after each message.
    """

    kind: Literal["work"] = "work"
    phase: Literal["train", "evaluate"]
    run: str
    manifest: Sha256
    round: Count
    fused: bool
    weights: dict[str, Sha256]
    lease_seconds: Seconds


SplitAnswer = Annotated[SplitWork | Wait | Refused, Field(discriminator="kind")]
SPLIT_ANSWER: TypeAdapter[SplitWork | Wait | Refused] = TypeAdapter(SplitAnswer)


class SplitReport(Record):
    """What a round cost a user. `loss` is the mean over examples of each modality's loss, `fused_loss` that of the fusion net.

    `bytes_up` and `bytes_down` count message bodies since the last report, without this update.
    """

    num_examples: Annotated[int, Field(ge=1)]
    loss: dict[Name, float]
    fused_loss: float
    train_seconds: Seconds
    peak_bytes: Count
    bytes_down: Count
    bytes_up: Count


class SplitEvaluation(Record):
    """Results on the user's test examples, by modality and of the fusion net: mean losses and how many were right."""

    num_examples: Count
    correct: dict[Name, Count]
    loss: dict[Name, float]
    fused_correct: Count
    fused_loss: float


class SplitAccepted(Record):
    run: str
    round: Count


class SplitUserReport(Record):
    user: DeviceName
    report: SplitReport


class SplitTraffic(Record):
    """Measured sizes of the bodies of the training steps of a round, all users together."""

    steps: Count = 0
    features_up_bytes: Count = 0
    features_down_bytes: Count = 0
    gradients_up_bytes: Count = 0
    gradients_down_bytes: Count = 0


class SplitRound(GrowingRecord):
    """A round that is aggregated. `test_*` are None until evaluated; `notes` say who lost a turn."""

    LATER: ClassVar[tuple[str, ...]] = ("notes",)

    round: Count
    fused: bool
    users: tuple[SplitUserReport, ...]
    fused_loss: float
    traffic: SplitTraffic
    test_examples: Count = 0
    test_correct: dict[Name, Count] = Field(default_factory=dict)
    test_fused_correct: Count = 0
    notes: tuple[str, ...] = ()

    def test_accuracy(self, modality: str | None = None) -> float | None:
        """That of one modality alone, or of the fusion net."""
        correct = self.test_fused_correct if modality is None else self.test_correct.get(modality, 0)
        return correct / self.test_examples if self.test_examples else None


class SplitStatus(Record):
    """A run with its finished rounds. `weights` are the newest blobs of the trained parts."""

    run: str
    name: str
    state: RunState
    manifest: Sha256
    round: Count
    fused: bool
    detail: str
    rounds: tuple[SplitRound, ...]
    weights: dict[str, Sha256]


def features_up(plan: SplitPlan, examples: int) -> list[TensorSpec]:
    """The activations of the low ends, (examples, tokens, width)."""
    return [TensorSpec(name=e.modality, shape=(examples, e.input.tokens, e.width)) for e in plan.encoders]


def features_down(plan: SplitPlan, examples: int, fused: bool) -> list[TensorSpec]:
    """The features of the high ends, the fused logits, and after the switch f. Logits are a vector, which int8 leaves exact."""
    specs = [TensorSpec(name=e.modality, shape=(examples, e.width)) for e in plan.encoders]
    specs.append(TensorSpec(name=LOGITS, shape=(examples * plan.classes,)))
    return [*specs, TensorSpec(name=FUSED, shape=(examples, plan.width))] if fused else specs


def gradients_up(plan: SplitPlan, examples: int, fused: bool) -> list[TensorSpec]:
    """Gradients of each modality's loss for its features; before the switch, of the fused loss for the logits."""
    specs = [TensorSpec(name=e.modality, shape=(examples, e.width)) for e in plan.encoders]
    return specs if fused else [*specs, TensorSpec(name=LOGITS, shape=(examples * plan.classes,))]


gradients_down = features_up
"""Gradients of the activations have their shapes."""


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
