"""The wire, version 1: every JSON message between devices, users and the coordinator. `docs/protocol.md` is its prose.

Tensors never travel in JSON: they are the bodies of blob downloads and update uploads (`lamina.encoding.tensors`).
Each request carries `Authorization: Bearer <token>`: the enrolment token for `POST /v1/devices`, the device's own token
for what a device does, the admin token for publishing.

    POST /v1/devices                                              Enrolment -> Enrolled
    POST /v1/check-in                                             CheckIn -> Assignment | Wait | Refused | CardWanted
    PUT  /v1/data-card                                            DataCard (`lamina.data.card`) -> 204
    GET  /v1/blobs/{sha256}                                       bytes; ETag is the sha256, Range is honoured
    PUT  /v1/blobs/{sha256}                                       bytes -> 201, or 200 if it was there (admin)
    POST /v1/runs                                                 Manifest, Signature in a header -> Published (admin)
    GET  /v1/manifests/{sha256}/signature                         Signature
    GET  /v1/runs                                                 RunList
    GET  /v1/runs/{run}                                           RunStatus
    GET  /v1/runs/{run}/devices                                   DeviceList
    POST /v1/runs/{run}/commands                                  RunCommand -> HistoryEntry (admin)
    GET  /v1/history                                              History (admin)
    GET  /v1/runs/{run}/history                                   History (admin)
    GET  /v1/devices                                              Enrolments (admin)
    POST /v1/devices/{name}/removal                               -> HistoryEntry (admin)
    POST /v1/devices/{name}/name                                  NewName -> HistoryEntry (admin)
    PUT  /v1/runs/{run}/stages/{stage}/rounds/{round}/update      tensor file, TrainReport in a header -> Accepted
    PUT  /v1/runs/{run}/stages/{stage}/rounds/{round}/evaluation  Evaluation -> Accepted

Growth rule: a new field has a default, and neither the meaning nor the default of a field ever changes; anything else is /v2.
Readers refuse fields that they do not know, and a field that holds its default is left out (`lamina.record`): a coordinator
goes on serving devices that are older than itself. It is therefore updated before them.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from lamina.bounds import (
    MAX_ITEMS,
    MAX_SEGMENTS,
    Count,
    Loss,
    Note,
    PositiveCount,
    RunName,
    Seconds,
    SegmentName,
    Text,
)
from lamina.bundles.manifest import EngineName, Sha256
from lamina.encoding.compression import Compression
from lamina.encoding.tensors import Encoding
from lamina.plans.model import Name
from lamina.record import Record

REPORT_HEADER = "Lamina-Report"
"""Header of an update: the TrainReport as JSON in ASCII."""
SIGNATURE_HEADER = "Lamina-Signature"
"""Header of a manifest that is published: its Signature as JSON in ASCII."""
MAX_JSON_BYTES = 16 << 20
"""What a manifest may have."""
MAX_WAIT_SECONDS = 86400.0

SMALL_JSON_BYTES = 16 << 10
"""What any message but a manifest may have: a check-in with every field at its bound is smaller."""

DeviceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
DeviceId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
DeviceToken = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~+/=-]{0,200}$")]
"""It stands in a header, so nothing in it may end a line."""
Modalities = Annotated[tuple[Name, ...], Field(max_length=64)]
Encodings = Annotated[tuple[Encoding, ...], Field(max_length=16)]
Compressions = Annotated[tuple[Compression, ...], Field(max_length=16)]
Weights = Annotated[dict[SegmentName, Sha256], Field(max_length=MAX_SEGMENTS)]
WaitSeconds = Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)]
RunState = Literal["running", "finished", "paused", "cancelled", "failed"]
Phase = Literal["train", "evaluate", "calibrate"]
DeviceRole = Literal["device", "calibrator"]
Awaited = Literal["none", "check_in", "update", "evaluation", "calibration"]


class Problem(Record):
    """The body of every refusal (RFC 9457); `code` is that of `lamina.errors`."""

    code: Annotated[str, Field(pattern=r"^[a-z][a-z-]{0,39}$")]
    title: Note
    status: Annotated[int, Field(ge=100, le=599)]
    detail: Text


class Signature(Record):
    """Who made a bundle: an Ed25519 signature of its manifest's bytes (`lamina.bundles.signing` has the signed message).

    `key_name` is what the signer calls the key. The signature does not cover it, so it decides nothing.
    """

    format: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    public_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    key_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""


class Enrolment(Record):
    """A device introduces itself. `name` is unique within the coordinator; a second device of that name is refused.

    `token_sha256`: the device has made its token itself (`secrets.token_urlsafe(32)`) and stored it, and says the sha256 of its
    ASCII bytes. The same name with the same hash is answered as before, so a lost answer costs nothing. Empty: the coordinator
    makes the token, and the enrolment cannot be repeated.
    """

    name: DeviceName
    token_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class Enrolled(Record):
    """`device_token` is empty for a device that made its token itself."""

    device_id: DeviceId
    device_token: DeviceToken = ""


class CheckIn(Record):
    """A device asks for work and says what it has. `run` limits the answer to one run.

    `encodings` and `compressions` are what it can read and write; fp32 and no compression need not be listed.
    `data_card` is the sha256 of the card of its data (`lamina.data.card`), as JSON in UTF-8; empty: the data has none.
    A `calibrator` holds the server's own data: it gets phase `calibrate` and nothing else, and is no part of a cohort.
    """

    engine: EngineName
    modalities: Modalities
    train_examples: PositiveCount
    test_examples: Count
    run: RunName | None = None
    encodings: Encodings = ("fp32",)
    compressions: Compressions = ("none",)
    role: DeviceRole = "device"
    data_card: Sha256 | Literal[""] = ""


class Assignment(Record):
    """Work for one round. `weights` has the blob of each active segment, and of each frozen segment that the features pass,
    which with depth dropout are not all frozen ones of the stage; `manifest` is a blob too.

    Phase `train`: train the active segments from these weights, send the difference as `upload_encoding`.
    Phase `evaluate`: evaluate these weights on the device's test examples.
    Phase `calibrate`: train all attached segments from these weights on the server's data, send the difference.
    The place in the round is kept for `lease_seconds`; checking in again renews it and gives the same work.

    `modalities` are those that the device takes part with (empty: all): it trains and sends their segments and the head.
    `teacher_weights` are the blobs, in fp32, of the segments at the end of the previous stage, where a program asks for them.

    The weights' blobs are tensor files in `download_encoding`. For a segment in `compressed_weights`, the blob named there
    holds the same file compressed as `download_compression` says: fetch it in place of the other one.
    """

    kind: Literal["assignment"] = "assignment"
    phase: Phase
    run: RunName
    manifest: Sha256
    stage: Count
    round: Count
    weights: Weights
    lease_seconds: Seconds
    upload_encoding: Encoding
    download_encoding: Encoding = "fp32"
    download_compression: Compression = "none"
    compressed_weights: Weights = Field(default_factory=dict)
    upload_compression: Compression = "none"
    modalities: Modalities = ()
    teacher_weights: Weights = Field(default_factory=dict)


class Wait(Record):
    """Nothing to do now. Ask again after a random time between the two bounds, so that a fleet spreads out.

    `no_run`: all runs are finished or none was published. `cohort`: the round starts when more devices are there.
    `round`: this round is full or waits for others' updates.
    """

    kind: Literal["wait"] = "wait"
    reason: Literal["no_run", "cohort", "round"]
    detail: Text
    wait_seconds_min: WaitSeconds
    wait_seconds_max: WaitSeconds


class Refused(Record):
    """This device cannot take part in any open run; `detail` says why and what would help. Asking again is pointless."""

    kind: Literal["refused"] = "refused"
    detail: Text


class CardWanted(Record):
    """The coordinator does not know the data card that the check-in named: send it, then ask again."""

    kind: Literal["card_wanted"] = "card_wanted"


CheckInAnswer = Annotated[Assignment | Wait | Refused | CardWanted, Field(discriminator="kind")]
CHECK_IN_ANSWER: TypeAdapter[Assignment | Wait | Refused | CardWanted] = TypeAdapter(CheckInAnswer)


class TrainReport(Record):
    """What a round cost the device.

    `peak_bytes` is the peak resident set of the whole device, as the kernel counts it (VmHWM): the larger of its two
    processes, which never run at the same time, and the supervisor.
    `bytes_down` and `bytes_up` count message bodies since the device's last report; `bytes_up` includes this update.
    `upload_encoding` is that of the update: the one of the assignment, or fp32, which is always taken.
    `failed_attempts` is how often the training process died before this update was made, `failure` how the last time.
    """

    num_examples: PositiveCount
    loss: Loss
    train_seconds: Seconds
    peak_bytes: Count
    bytes_down: Count
    bytes_up: Count
    upload_encoding: Encoding = "fp32"
    failed_attempts: Count = 0
    failure: Annotated[Note, Field(max_length=200)] = ""


class Evaluation(Record):
    """Result on the device's own test examples: `loss` is the mean over them, `correct` how many were right."""

    num_examples: Count
    correct: Count
    loss: Loss


class Accepted(Record):
    """The message is on disk and counts exactly once; sending the same again gives the same answer."""

    run: RunName
    stage: Count
    round: Count
    sha256: Sha256 | None = None


class Published(Record):
    run: RunName


class DeviceReport(Record):
    """One device's update as accepted: the encoding of the weights it trained from, and of the update as it arrived.

    `modalities` are those that it took part with; empty: all.
    """

    device: DeviceName
    engine: EngineName
    report: TrainReport
    download_encoding: Encoding = "fp32"
    upload_encoding: Encoding = "fp32"
    upload_compression: Compression = "none"
    modalities: Modalities = ()


class RoundStatus(Record):
    """One round: what came in, and the accuracy of the aggregated model (None until evaluated, or without test data).

    With a contrastive objective, accuracy and loss are of pairs: what devices with one modality found is in `notes` alone.
    `evaluated_encodings` are those, other than fp32, in which devices evaluated the weights. `notes` says which devices
    take larger transfers than the plan allows, and why.
    """

    stage: Count
    round: Count
    state: Literal["training", "evaluating", "closed"]
    waiting_for: Text = ""
    updates: Annotated[tuple[DeviceReport, ...], Field(max_length=MAX_ITEMS)] = ()
    test_examples: Count = 0
    test_correct: Count = 0
    test_loss: Loss | None = None
    evaluated_encodings: Encodings = ()
    notes: Annotated[tuple[Note, ...], Field(max_length=MAX_ITEMS)] = ()

    @property
    def test_accuracy(self) -> float | None:
        return self.test_correct / self.test_examples if self.test_examples else None


class RunStatus(Record):
    """A run with all of its rounds so far. `weights` are the newest blobs of every segment."""

    run: RunName
    name: Name
    state: RunState
    manifest: Sha256
    stage: Count
    round: Count
    detail: Text
    rounds: Annotated[tuple[RoundStatus, ...], Field(max_length=MAX_ITEMS)]
    weights: Weights


class DeviceState(Record):
    """What a device of a run did last. Times are seconds ago by the coordinator's clock, so that no other clock matters.

    `is_here`: it asked for work within the coordinator's `presence_seconds`. `awaited` is what the run waits
    for from it: that it checks in, its update, its evaluation, its calibration; `none`: nothing. `did` is what it did last
    beside asking for work, `refusal` the code and the detail of the last refusal that it got.
    """

    device: DeviceName
    role: DeviceRole = "device"
    is_here: bool
    awaited: Awaited = "none"
    seen_seconds: Seconds | None = None
    did: Note = ""
    did_seconds: Seconds | None = None
    refusal: Note = ""
    refused_seconds: Seconds | None = None


class DeviceList(Record):
    """The devices of a run: those that it waits for first, then those that were seen last. `more` are left out of the list.

    `to_join` is how many devices the next round lacks beyond all that ever enrolled.
    """

    run: RunName
    here: Count
    awaited: Count = 0
    to_join: Count = 0
    devices: Annotated[tuple[DeviceState, ...], Field(max_length=MAX_ITEMS)] = ()
    more: Count = 0


class RunList(Record):
    runs: Annotated[tuple[RunName, ...], Field(max_length=MAX_ITEMS)]


class RunCommand(Record):
    """What an operator wants of a run (`coordinator.rounds.operating`).

    `close_round` names the round that is to close, so that a repeated one closes no other. `rollback` names the closed round to
    go back to; without a round, it is the initial weights.
    """

    command: Literal["pause", "resume", "cancel", "close_round", "rollback"]
    stage: Count | None = None
    round: Count | None = None
    reason: Annotated[str, Field(max_length=200)] = ""


class HistoryEntry(Record):
    """One thing that was done: by whom (`coordinator`, or the token and the address it came from), to which run or device.

    `before` and `after` are its states; equal ones of a command say that there was nothing to do, and no row was written.
    """

    unix_seconds: Annotated[float, Field(ge=0, le=1e12)]
    who: Note
    what: Note
    run: Note = ""
    device: Note = ""
    before: Note
    after: Note
    detail: Text = ""


class History(Record):
    entries: Annotated[tuple[HistoryEntry, ...], Field(max_length=MAX_ITEMS)]


class EnrolledDevice(Record):
    """A device that is enrolled, and what it said when it last asked for work."""

    name: DeviceName
    device_id: DeviceId
    run: Note = ""
    engine: EngineName | None = None
    role: DeviceRole = "device"
    seen_seconds_ago: Seconds | None = None


class Enrolments(Record):
    devices: Annotated[tuple[EnrolledDevice, ...], Field(max_length=MAX_ITEMS)]


class NewName(Record):
    name: DeviceName
