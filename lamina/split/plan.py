"""Split training (M2FedSA; methods, section 4): the plan.

A large frozen model is cut in two. The device has the low end of each modality's encoder and the classifier, the coordinator
has the rest. Two small adapters are trained inside the frozen layers:

    {m}.stem, {m}.layers.0                 device, frozen
    {m}.modality_adapter  (MA)             device, trained; in the first layer, behind its MLP
    {m}.layers.1 .. {m}.norm               coordinator, frozen
    {m}.task_adapter      (TA)             coordinator, trained; in the last layer, beside its MLP
    {m}.classifier                         device, trained
    fusion                                 coordinator, trained until the switch, then frozen

Activations go up and gradients come down, batch by batch (`lamina.split.wire`).

With `party = "device"`, our variation, the device holds the whole frozen model (int8) and trains all adapters by itself: the
steps and answers fall away, and nobody sees activations or gradients of single batches.
"""

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lamina.bounds import MAX_FACTOR, MAX_ITEMS, MAX_ROUNDS, Count, PositiveCount, PositiveSeconds
from lamina.encoding.compression import Compression
from lamina.encoding.tensors import Encoding
from lamina.errors import ConfigError
from lamina.names import Precision
from lamina.plans.model import Encoder, ModelDescription, Name, Positive, Projection, Supervised
from lamina.plans.plan import AdamW, OptimizerSettings, PositiveFloat
from lamina.plans.segments import classifier, layer, norm, stem
from lamina.record import Record, listed

Party = Literal["server", "device"]
FUSION = "fusion"
LOGITS = "logits"
FUSED = "fused"
MIDDLE = "middle."
"""Tensors of a task adapter that modalities share begin so."""
MIN_LAYERS = 3
_Share = Annotated[float, Field(ge=0, le=MAX_FACTOR)]


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

    window: Annotated[int, Field(ge=2, le=MAX_ROUNDS)] = 10
    threshold: PositiveFloat = 0.3


class SplitTraining(Record):
    """Adapters and classifiers take `optimizer` at `learning_rate`, the fusion net the same at its own rate; moments start
    fresh in each round. The last batch of an epoch may be smaller."""

    batch_size: Annotated[int, Field(ge=2, le=4096)] = 32
    local_epochs: PositiveCount = 1
    learning_rate: PositiveFloat = 1e-4
    optimizer: OptimizerSettings = AdamW(weight_decay=0.05)


class Traffic(Record):
    """How activations, gradients and updates travel. fp16 gradients are scaled by a power of two, so that none vanish."""

    activations: Encoding = "fp16"
    gradients: Encoding = "fp16"
    updates: Encoding = "fp32"
    compression: Compression = "none"


class Users(Record):
    """Who takes part in a round: `size` users, each one process with the data of all modalities or, with `some_modalities`, of
    one at least. With `party = "server"` they train one after the other; a user that is silent for `lease_seconds` loses its
    turn in this round. A round counts with `min_users` of them, else it begins again. Evaluation follows every
    `evaluate_every`-th round and the last; 0: never. It is of the users with all modalities."""

    size: Annotated[int, Field(ge=1, le=MAX_ITEMS)] = 25
    some_modalities: bool = False
    min_users: PositiveCount = 1
    lease_seconds: PositiveSeconds = 600.0
    evaluate_every: Count = 10

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
    encoders: Annotated[tuple[Encoder, ...], Field(min_length=1, max_length=64)]
    classes: Annotated[int, Field(ge=2, lt=2**31)]
    rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS)]
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
        if self.users.some_modalities and self.party == "device":
            raise ValueError(
                'users.some_modalities is built for party = "server" alone: a device without the coordinator has one program '
                "for the step of all modalities; set it to false"
            )
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
            raise ConfigError(f"{path} is not a valid split plan{listed(error, cls)}") from error

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

    def sent(self, fused: bool, modalities: Sequence[str] = ()) -> list[str]:
        """The parts that a device trains and sends, with `modalities` (none: all); after the switch (`fused`) nobody trains the
        fusion net."""
        if self.party == "device":
            return [name for name in self.trained if not (fused and name == FUSION)]
        return [name for m in modalities or self.modalities for name in (modality_adapter(m), classifier(m))]

    def held(self, modalities: Sequence[str] = ()) -> list[str]:
        """The trained parts that a device with `modalities` (none: all) is given each round."""
        return self.trained if self.party == "device" else self.sent(False, modalities)

    def some_of(self, has: Collection[str]) -> tuple[str, ...] | None:
        """The modalities that a user with data of `has` takes part with; () for all, None if it cannot."""
        mine = tuple(m for m in self.modalities if m in has)
        if len(mine) == len(self.modalities):
            return ()
        return mine if mine and self.users.some_modalities else None

    def precision(self, part: str) -> Precision:
        """That of a frozen part: int8 for the layers that a device holds, where the plan says so."""
        on_device = self.party == "device" or part in {name for m in self.modalities for name in self.low(m)}
        return self.frozen_precision if on_device and ".layers." in part else "fp32"
