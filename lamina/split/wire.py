"""Split training: the messages between users and coordinator, and the tensors in their bodies.

    POST /v1/split/runs                                            SplitManifest, Signature in a header -> Published (admin)
    GET  /v1/split/runs                                            RunList
    GET  /v1/split/runs/{run}                                      SplitStatus
    POST /v1/split/check-in                                        SplitCheckIn -> SplitWork | Wait | Refused
    POST {round}/steps/{step}/features?examples=N                  activations of the low ends -> features, fused logits
    POST {round}/steps/{step}/gradients?examples=N                 gradients of those -> gradients of the activations
    POST {round}/answers?examples=N                                activations of test data -> features, fused logits
    PUT  {round}/update                                            tensor file, SplitReport in a header -> SplitAccepted
    PUT  {round}/evaluation                                        SplitEvaluation -> SplitAccepted

{round} is /v1/split/runs/{run}/rounds/{round}. Bodies of the first three are `lamina.split.bodies`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from lamina.bounds import MAX_ITEMS, Count, Loss, Note, PositiveCount, RunName, Seconds, Text
from lamina.bundles.manifest import Sha256
from lamina.names import EngineName
from lamina.plans.model import Name
from lamina.plans.segments import TensorSpec
from lamina.record import Record
from lamina.split.plan import FUSED, LOGITS, SplitPlan
from lamina.wire import Compressions, DeviceName, Modalities, Refused, RunState, Wait, Weights

Counts = Annotated[dict[Name, Count], Field(max_length=64)]
Losses = Annotated[dict[Name, Loss], Field(max_length=64)]


class SplitCheckIn(Record):
    """A user asks for work and says what it has."""

    engine: EngineName
    modalities: Modalities
    train_examples: PositiveCount
    test_examples: Count
    run: RunName | None = None
    compressions: Compressions = ("none",)


class SplitWork(Record):
    """Work for one round: `train` or `evaluate` with these weights. After the switch, `fused` is true. `modalities` are those
    that a user takes part with if it has not all; the bodies of its steps then have neither fused logits nor f.

    The turn is kept for `lease_seconds` after each message.
    """

    kind: Literal["work"] = "work"
    phase: Literal["train", "evaluate"]
    run: RunName
    manifest: Sha256
    round: Count
    fused: bool
    weights: Weights
    modalities: Modalities = ()
    lease_seconds: Seconds


SplitAnswer = Annotated[SplitWork | Wait | Refused, Field(discriminator="kind")]
SPLIT_ANSWER: TypeAdapter[SplitWork | Wait | Refused] = TypeAdapter(SplitAnswer)


class SplitReport(Record):
    """What a round cost a user. `loss` is the mean over examples of each modality's loss, `fused_loss` that of the fusion net,
    None for a user that has not all modalities.

    `bytes_up` and `bytes_down` count message bodies since the last report, without this update.
    """

    num_examples: PositiveCount
    loss: Losses
    fused_loss: Loss | None
    train_seconds: Seconds
    peak_bytes: Count
    bytes_down: Count
    bytes_up: Count


class SplitEvaluation(Record):
    """Results on the user's test examples, by modality and of the fusion net: mean losses and how many were right."""

    num_examples: Count
    correct: Counts
    loss: Losses
    fused_correct: Count
    fused_loss: Loss


class SplitAccepted(Record):
    run: RunName
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


class SplitRound(Record):
    """A round that is aggregated. `fused_loss` is the mean over the users with all modalities, None if there was none; `test_*`
    are None until evaluated; `notes` say who lost a turn."""

    round: Count
    fused: bool
    users: Annotated[tuple[SplitUserReport, ...], Field(max_length=MAX_ITEMS)]
    fused_loss: Loss | None
    traffic: SplitTraffic
    test_examples: Count = 0
    test_correct: Counts = Field(default_factory=dict)
    test_fused_correct: Count = 0
    notes: Annotated[tuple[Note, ...], Field(max_length=MAX_ITEMS)] = ()

    def test_accuracy(self, modality: str | None = None) -> float | None:
        """That of one modality alone, or of the fusion net."""
        correct = self.test_fused_correct if modality is None else self.test_correct.get(modality, 0)
        return correct / self.test_examples if self.test_examples else None


class SplitStatus(Record):
    """A run with its finished rounds. `weights` are the newest blobs of the trained parts."""

    run: RunName
    name: Name
    state: RunState
    manifest: Sha256
    round: Count
    fused: bool
    detail: Text
    rounds: Annotated[tuple[SplitRound, ...], Field(max_length=MAX_ITEMS)]
    weights: Weights


def features_up(plan: SplitPlan, examples: int, modalities: Sequence[str] = ()) -> list[TensorSpec]:
    """The activations of the low ends, (examples, tokens, width), of `modalities` (none: all)."""
    return [
        TensorSpec(name=e.modality, shape=(examples, e.input.tokens, e.width))
        for e in plan.encoders
        if e.modality in (modalities or plan.modalities)
    ]


def features_down(plan: SplitPlan, examples: int, fused: bool, modalities: Sequence[str] = ()) -> list[TensorSpec]:
    """The features of the high ends; of all modalities also the fused logits, and after the switch f. Logits are a vector,
    which int8 leaves exact."""
    specs = _of_features(plan, examples, modalities)
    specs += [] if modalities else [TensorSpec(name=LOGITS, shape=(examples * plan.classes,))]
    return [*specs, TensorSpec(name=FUSED, shape=(examples, plan.width))] if fused and not modalities else specs


def gradients_up(plan: SplitPlan, examples: int, fused: bool, modalities: Sequence[str] = ()) -> list[TensorSpec]:
    """Gradients of each modality's loss for its features; of all modalities, and before the switch, also of the fused loss for
    the logits."""
    specs = _of_features(plan, examples, modalities)
    return specs if fused or modalities else [*specs, TensorSpec(name=LOGITS, shape=(examples * plan.classes,))]


def _of_features(plan: SplitPlan, examples: int, modalities: Sequence[str]) -> list[TensorSpec]:
    return [TensorSpec(name=m, shape=(examples, plan.width)) for m in plan.modalities if m in (modalities or plan.modalities)]


gradients_down = features_up
"""Gradients of the activations have their shapes."""
