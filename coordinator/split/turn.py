"""The steps of a user's turn: bodies in, arithmetic of the high ends, bodies out.

The same body sent again gives the same answer and counts once. A turn may be taken back: the high ends are then what they were
at its start.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from coordinator.split.high_ends import HighEnds, Snapshot, Values
from lamina.encoding.tensors import Float32
from lamina.errors import RoundClosedError, UpdateRejectedError
from lamina.split.bodies import pack, unpack
from lamina.split.plan import FUSED, LOGITS, SplitPlan
from lamina.split.wire import SplitTraffic, features_down, features_up, gradients_up


@dataclass
class Turn:
    """`modalities` are the user's if it has not all; `seen` is when it last sent a message, `steps` how many it has finished;
    between the two halves of a step there are `activations` and their `features`. `answered` is the last answer, for a
    connection that broke before it arrived."""

    user: str
    modalities: tuple[str, ...]
    seen: float
    start: Snapshot
    steps: int = 0
    activations: Values | None = None
    features: Values = field(default_factory=dict)
    answered: tuple[str, bytes] | None = None


class TurnSteps:
    """`traffic` counts the bodies of the steps since `load`."""

    def __init__(self, plan: SplitPlan, high: HighEnds) -> None:
        self._plan, self._high = plan, high
        self.traffic = SplitTraffic()

    def load(self, weights: Mapping[str, str]) -> None:
        """Trained parts as these blobs have them, fresh optimisers, nothing counted."""
        self._high.load(weights)
        self.traffic = SplitTraffic()

    def begin(self, user: str, modalities: tuple[str, ...], now: float) -> Turn:
        return Turn(user, modalities, now, self._high.snapshot())

    def begin_again(self, turn: Turn, now: float) -> Turn:
        """The same turn from its start, also for a user that had begun and was interrupted."""
        self.take_back(turn)
        return Turn(turn.user, turn.modalities, now, turn.start)

    def take_back(self, turn: Turn) -> None:
        if turn.steps or turn.activations:
            self._high.restore(turn.start)

    def features(self, turn: Turn, step: int, examples: int, body: bytes, fused: bool) -> bytes:
        """Activations up, features down: the first half of a step."""
        key = _key("features", step, examples, body)
        if turn.answered and turn.answered[0] == key:
            return turn.answered[1]
        if step != turn.steps or turn.activations is not None:
            raise RoundClosedError(f"step {step} does not follow step {turn.steps - 1}; check in to begin the round again")
        activations = self._activations(body, examples, turn.modalities)
        answer, features = self._forward(activations, examples, fused, turn.modalities)
        turn.activations, turn.features, turn.answered = activations, features, (key, answer)
        self._count(features_up_bytes=len(body), features_down_bytes=len(answer))
        return answer

    def gradients(self, turn: Turn, step: int, examples: int, body: bytes, fused: bool) -> bytes:
        """Gradients up, gradients down: the second half. It trains the task adapters and, before the switch, the fusion net."""
        key = _key("gradients", step, examples, body)
        if turn.answered and turn.answered[0] == key:
            return turn.answered[1]
        activations = turn.activations
        if step != turn.steps or activations is None:
            raise RoundClosedError(f"step {step} has no features yet; check in to begin the round again")
        if examples != len(next(iter(activations.values()))):
            raise UpdateRejectedError(f"step {step} has other examples than its features")
        traffic, specs = self._plan.traffic, gradients_up(self._plan, examples, fused, turn.modalities)
        given = unpack(body, specs, traffic.gradients, traffic.compression, are_gradients=True)
        of_logits = given.pop(LOGITS).reshape(examples, self._plan.classes) if LOGITS in given else None
        down = self._high.backward(activations, turn.features, given, of_logits)
        answer = pack(down, traffic.gradients, traffic.compression, are_gradients=True)
        turn.steps, turn.activations, turn.answered = step + 1, None, (key, answer)
        self._count(steps=1, gradients_up_bytes=len(body), gradients_down_bytes=len(answer))
        return answer

    def answers(self, examples: int, body: bytes) -> bytes:
        """Activations of test examples up, features and fused logits down; nothing is trained."""
        return self._forward(self._activations(body, examples), examples, False)[0]

    def tensors(self, part: str) -> dict[str, Float32]:
        """Copies of the tensors of a part that the coordinator trains, by name."""
        return self._high.tensors(part)

    def _activations(self, body: bytes, examples: int, modalities: tuple[str, ...] = ()) -> Values:
        check_count(self._plan, examples)
        traffic = self._plan.traffic
        return unpack(body, features_up(self._plan, examples, modalities), traffic.activations, traffic.compression)

    def _forward(
        self, activations: Values, examples: int, fused: bool, modalities: tuple[str, ...] = ()
    ) -> tuple[bytes, Values]:
        features, of_fusion = self._high.forward(activations)
        sent = dict(features)
        if of_fusion:
            f, logits = of_fusion
            sent |= {LOGITS: logits.reshape(-1), **({FUSED: f} if fused else {})}
        assert [spec.name for spec in features_down(self._plan, examples, fused, modalities)] == list(sent)
        return pack(sent, self._plan.traffic.activations, self._plan.traffic.compression), features

    def _count(self, **more: int) -> None:
        self.traffic = self.traffic.model_copy(
            update={name: getattr(self.traffic, name) + count for name, count in more.items()}
        )


def check_count(plan: SplitPlan, examples: int) -> None:
    """Raises UpdateRejectedError. Before a body is read: how large it may be follows from the number of examples."""
    if not 1 <= examples <= plan.training.batch_size:
        raise UpdateRejectedError(f"a step has 1..{plan.training.batch_size} examples, given {examples}")


def _key(kind: str, step: int, examples: int, body: bytes) -> str:
    return f"{kind}/{step}/{examples}/{sha256(body).hexdigest()}"
