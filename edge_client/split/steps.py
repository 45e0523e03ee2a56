"""The step of one batch: with the coordinator in the loop, or on the device alone."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_client.engines.base import Array
from edge_client.job import Split
from edge_client.rows.row_files import Indices
from edge_client.split.parts import Parts, Programs
from edge_client.split.prefix import PrefixStore
from edge_client.split.transport import SplitTransport
from lamina.encoding.tensors import Float32
from lamina.errors import NonFiniteError
from lamina.names import MOST_LOSS
from lamina.plans.segments import classifier
from lamina.split.bodies import body_limit, pack, unpack
from lamina.split.plan import FUSED, LOGITS, SplitPlan, modality_adapter
from lamina.split.wire import SplitWork, features_down, gradients_down


@dataclass(frozen=True)
class Metrics:
    """Mean losses of a batch and how many were right: by modality, and of the fusion net."""

    loss: dict[str, float]
    correct: dict[str, int]
    fused_loss: float
    fused_correct: int


class Steps(Protocol):
    def train(self, step: int, indices: Indices) -> Metrics: ...
    def evaluate(self, indices: Indices) -> Metrics: ...


class RemoteSteps:
    """Activations up, features down; gradients up, gradients down.

    A user that has not all modalities trains with the loss of each that it has: there are no fused logits to learn from.
    """

    def __init__(
        self, plan: SplitPlan, work: SplitWork, programs: Programs, parts: Parts, store: PrefixStore, transport: SplitTransport
    ) -> None:
        self._plan, self._work, self._programs, self._parts = plan, work, programs, parts
        self._store, self._transport = store, transport
        self._modalities = work.modalities or plan.modalities

    def train(self, step: int, indices: Indices) -> Metrics:
        """One step of every classifier and modality adapter. Raises NonFiniteError, and what the coordinator refuses with."""
        plan, work, count, traffic = self._plan, self._work, len(indices), self._plan.traffic
        branches, body = self._activations("train", indices)
        most = body_limit(features_down(plan, count, work.fused, work.modalities))
        answer = self._transport.half_step("features", work.run, work.round, step, count, body, most)
        features, f, logits = self._features(answer, count, work.fused)
        label = self._store.labels("train", indices)
        metrics, sent = self._classify(features, f, logits, label)
        body = pack(sent, traffic.gradients, traffic.compression, are_gradients=True)
        specs = gradients_down(plan, count, work.modalities)
        answer = self._transport.half_step("gradients", work.run, work.round, step, count, body, body_limit(specs))
        downs = unpack(answer, specs, traffic.gradients, traffic.compression, are_gradients=True)
        for m in self._modalities:
            part = modality_adapter(m)
            given = self._programs.run(f"{m}.low_backward", self._parts, [branches[m], downs[m]])
            self._parts.step(part, self._programs.gradients(given, part))
        return metrics

    def evaluate(self, indices: Indices) -> Metrics:
        _, body = self._activations("test", indices)
        most = body_limit(features_down(self._plan, len(indices), False, self._work.modalities))
        answer = self._transport.answers(self._work.run, self._work.round, len(indices), body, most)
        features, _, logits = self._features(answer, len(indices), False)
        label = self._store.labels("test", indices)
        return _merged(
            {m: self._programs.run(f"{m}.classify", self._parts, [features[m], logits, label]) for m in self._modalities}
        )

    def _activations(self, split: Split, indices: Indices) -> tuple[dict[str, Array], bytes]:
        """What the adapters take, and the body with what the low ends give."""
        branches: dict[str, Array] = {}
        up: dict[str, Float32] = {}
        for m in self._modalities:
            base, branches[m] = self._store.take(split, m, indices)
            up[m] = self._programs.run(f"{m}.low", self._parts, [base, branches[m]])["activations"].copy()
        return branches, pack(up, self._plan.traffic.activations, self._plan.traffic.compression)

    def _features(self, answer: bytes, count: int, fused: bool) -> tuple[dict[str, Float32], Float32 | None, Float32]:
        traffic, modalities = self._plan.traffic, self._work.modalities
        found = unpack(answer, features_down(self._plan, count, fused, modalities), traffic.activations, traffic.compression)
        # Without all modalities there are none; zeros then stand in for what the program takes and no gradient depends on.
        logits = np.zeros((count, self._plan.classes), np.float32) if modalities else found.pop(LOGITS)
        return found, found.pop(FUSED, None), logits.reshape(count, self._plan.classes)

    def _classify(
        self, features: dict[str, Float32], f: Float32 | None, logits: Float32, label: Array
    ) -> tuple[Metrics, dict[str, Float32]]:
        """Steps every classifier; gives the gradients that go up."""
        sent: dict[str, Float32] = {}
        outputs: dict[str, dict[str, Array]] = {}
        for m, value in features.items():
            if f is None:
                given = self._programs.run(f"{m}.classify", self._parts, [value, logits, label])
                if not self._work.modalities:
                    # The same for every modality: label and logits are. So their mean, which the fusion net takes, is this one.
                    sent[LOGITS] = given["logits_gradient"].reshape(-1).copy()
            else:
                given = self._programs.run(f"{m}.transfer", self._parts, [value, f, logits, label])
            sent[m] = given["gradient"].copy()
            outputs[m] = {name: given[name].copy() for name in ("loss", "fused_loss", "correct", "fused_correct")}
            self._parts.step(classifier(m), self._programs.gradients(given, classifier(m)))
        return _merged(outputs), sent


class LocalSteps:
    """The whole model on the device; nothing is sent within a round."""

    def __init__(self, plan: SplitPlan, fused: bool, programs: Programs, parts: Parts, store: PrefixStore) -> None:
        self._plan, self._fused, self._programs, self._parts, self._store = plan, fused, programs, parts, store

    def train(self, step: int, indices: Indices) -> Metrics:
        given = self._run("step_transfer" if self._fused else "step", "train", indices)
        metrics = self._metrics(given)
        for part in self._plan.sent(self._fused):
            self._parts.step(part, self._programs.gradients(given, part))
        return metrics

    def evaluate(self, indices: Indices) -> Metrics:
        return self._metrics(self._run("answer", "test", indices))

    def _run(self, program: str, split: Split, indices: Indices) -> dict[str, Array]:
        inputs = [value for m in self._plan.modalities for value in self._store.take(split, m, indices)]
        return self._programs.run(program, self._parts, [*inputs, self._store.labels(split, indices)])

    def _metrics(self, given: dict[str, Array]) -> Metrics:
        names = ("loss", "correct")
        shared = {name: given[name] for name in ("fused_loss", "fused_correct")}
        return _merged({m: {**shared, **{name: given[f"{m}.{name}"] for name in names}} for m in self._plan.modalities})


def _merged(outputs: dict[str, dict[str, Array]]) -> Metrics:
    last = next(reversed(outputs.values()))
    metrics = Metrics(
        loss={m: float(given["loss"]) for m, given in outputs.items()},
        correct={m: int(given["correct"]) for m, given in outputs.items()},
        fused_loss=float(last["fused_loss"]),
        fused_correct=int(last["fused_correct"]),
    )
    for name, value in (*metrics.loss.items(), (FUSED, metrics.fused_loss)):
        if not abs(value) <= MOST_LOSS:
            raise NonFiniteError(
                f"the loss of {name} is {value:g}, training has diverged; lower the learning rate, or look for extreme values"
            )
    return metrics
