"""The wire, version 1: every JSON message between devices, users and the coordinator. `docs/protocol.md` is its prose.

Tensors never travel in JSON: they are the bodies of blob downloads and update uploads (`lamina.tensors`).
Each request carries `Authorization: Bearer <token>`: the enrolment token for `POST /v1/devices`, the device's own token
for what a device does, the admin token for publishing.

    POST /v1/devices                                              Enrolment -> Enrolled
    POST /v1/check-in                                             CheckIn -> Assignment | Wait | Refused
    GET  /v1/blobs/{sha256}                                       bytes; ETag is the sha256, Range is honoured
    PUT  /v1/blobs/{sha256}                                       bytes -> 201, or 200 if it was there (admin)
    POST /v1/runs                                                 Manifest -> Published (admin)
    GET  /v1/runs                                                 RunList
    GET  /v1/runs/{run}                                           RunStatus
    PUT  /v1/runs/{run}/stages/{stage}/rounds/{round}/update      tensor file, TrainReport in a header -> Accepted
    PUT  /v1/runs/{run}/stages/{stage}/rounds/{round}/evaluation  Evaluation -> Accepted

Growth rule: a new field has a default, and the meaning of a field never changes; anything else is /v2.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from lamina.manifest import EngineName, Sha256
from lamina.model import Name
from lamina.record import Record
from lamina.tensors import Encoding

REPORT_HEADER = "Lamina-Report"
"""Header of an update: the TrainReport as JSON in ASCII."""
DIGEST_HEADER = "Content-Digest"
"""Header of every upload body: `sha-256=:<base64>:` (RFC 9530)."""
MAX_JSON_BYTES = 16 << 20

DeviceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
RunState = Literal["running", "finished"]
Phase = Literal["train", "evaluate"]


class Problem(Record):
    """The body of every refusal (RFC 9457); `code` is that of `lamina.errors`."""

    code: str
    title: str
    status: int
    detail: str


class Enrolment(Record):
    """A device introduces itself. `name` is unique within the coordinator; a second device of that name is refused."""

    name: DeviceName


class Enrolled(Record):
    device_id: str
    device_token: str


class CheckIn(Record):
    """A device asks for work and says what it has. `run` limits the answer to one run."""

    engine: EngineName
    modalities: tuple[Name, ...]
    train_examples: Annotated[int, Field(ge=1)]
    test_examples: Count
    run: str | None = None


class Assignment(Record):
    """Work for one round. `weights` has the blob of each active and frozen segment of the stage, `manifest` is a blob too.

    Phase `train`: train the active segments from these weights, send the difference as `upload_encoding`.
    Phase `evaluate`: evaluate these weights on the device's test examples.
    The place in the round is kept for `lease_seconds`; checking in again renews it and gives the same work.
    """

    kind: Literal["assignment"] = "assignment"
    phase: Phase
    run: str
    manifest: Sha256
    stage: Count
    round: Count
    weights: dict[str, Sha256]
    lease_seconds: Seconds
    upload_encoding: Encoding


class Wait(Record):
    """Nothing to do now. Ask again after a random time between the two bounds, so that a fleet spreads out.

    `no_run`: all runs are finished or none was published. `cohort`: the round starts when more devices are there.
    `round`: this round is full or waits for others' updates.
    """

    kind: Literal["wait"] = "wait"
    reason: Literal["no_run", "cohort", "round"]
    detail: str
    wait_seconds_min: Seconds
    wait_seconds_max: Seconds


class Refused(Record):
    """This device cannot take part in any open run; `detail` says why and what would help. Asking again is pointless."""

    kind: Literal["refused"] = "refused"
    detail: str


CheckInAnswer = Annotated[Assignment | Wait | Refused, Field(discriminator="kind")]
CHECK_IN_ANSWER: TypeAdapter[Assignment | Wait | Refused] = TypeAdapter(CheckInAnswer)


class TrainReport(Record):
    """What a round cost the device.

    `peak_bytes` is the peak resident set of the whole client process, as the kernel counts it (VmHWM).
    `bytes_down` and `bytes_up` count message bodies since the device's last report; `bytes_up` includes this update.
    """

    num_examples: Annotated[int, Field(ge=1)]
    loss: float
    train_seconds: Seconds
    peak_bytes: Count
    bytes_down: Count
    bytes_up: Count


class Evaluation(Record):
    """Result on the device's own test examples: `loss` is the mean over them, `correct` how many were right."""

    num_examples: Count
    correct: Count
    loss: float


class Accepted(Record):
    """The message is on disk and counts exactly once; sending the same again gives the same answer."""

    run: str
    stage: Count
    round: Count
    sha256: Sha256 | None = None


class Published(Record):
    run: str


class DeviceReport(Record):
    """One device's update as accepted."""

    device: DeviceName
    engine: EngineName
    report: TrainReport


class RoundStatus(Record):
    """One round: what came in, and the accuracy of the aggregated model (None until evaluated, or without test data)."""

    stage: Count
    round: Count
    state: Literal["training", "evaluating", "closed"]
    waiting_for: str = ""
    updates: tuple[DeviceReport, ...] = ()
    test_examples: Count = 0
    test_correct: Count = 0
    test_loss: float | None = None

    @property
    def test_accuracy(self) -> float | None:
        return self.test_correct / self.test_examples if self.test_examples else None


class RunStatus(Record):
    """A run with all of its rounds so far. `weights` are the newest blobs of every segment."""

    run: str
    name: str
    state: RunState
    manifest: Sha256
    stage: Count
    round: Count
    detail: str
    rounds: tuple[RoundStatus, ...]
    weights: dict[str, Sha256]


class RunList(Record):
    runs: tuple[str, ...]
