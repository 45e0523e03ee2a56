"""The tables: everything that decides anything about a run is a row here, so a restart finds what a crash left.

Times are seconds on the coordinator's time line (`coordinator.rounds.timeline`); only those of the history are the wall
clock's. A round's rows:

    rounds        training -> aggregating (-> calibrating) -> evaluating -> closed; it never goes back
    places        who may send an update; a place that was given to another device stays, marked as lost
    updates       what was accepted; such a row is never changed or deleted
    calibrations  who calibrates the new weights, and that its update was accepted
    evaluations   who was asked to evaluate the new weights, and the answer

    teachers      what the active segments of a stage were at the end of the stage before
    variants      the same weights in smaller encodings; made from the float32 ones when first wanted, and again if lost
    cards         how the data of each device was packed
    data_facts    what of that all devices of a run have in common
    superseded    what the newest weights replaced, until nothing needs it and it is deleted
    snapshots     the weights with which the last rounds closed
    recalls       devices that may still work for a round that was taken back
    history       what operators did, and how runs ended
    clock         where the time line was when it was last noted

A column `modalities` has the names of some of the model's modalities, joined by commas; empty: all of them.
"""

from typing import Literal

from sqlalchemy import ForeignKey, Text, UniqueConstraint, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lamina.bounds import MAX_COUNT, MAX_LOSS, MAX_SECONDS
from lamina.bundles.manifest import EngineName
from lamina.encoding.compression import Compression
from lamina.encoding.tensors import Encoding
from lamina.federation.state import RoundPhase
from lamina.wire import DeviceRole, RunState

SCHEMA_VERSION = 6


def _bound(table: str, column: str, field: str, bound: float) -> str:
    """Messages that were accepted when numbers had no bounds: what reads them now would refuse them whole."""
    value = f"json_extract({column}, '$.{field}')"
    return f"UPDATE {table} SET {column} = json_set({column}, '$.{field}', {bound!r}) WHERE abs({value}) > {bound!r}"


UPGRADES: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE places ADD COLUMN download_encoding TEXT NOT NULL DEFAULT 'fp32'",
        "ALTER TABLE places ADD COLUMN upload_encoding TEXT NOT NULL DEFAULT 'fp32'",
        "ALTER TABLE places ADD COLUMN compression TEXT NOT NULL DEFAULT 'none'",
        "ALTER TABLE updates ADD COLUMN download_encoding TEXT NOT NULL DEFAULT 'fp32'",
        "ALTER TABLE updates ADD COLUMN upload_encoding TEXT NOT NULL DEFAULT 'fp32'",
        "ALTER TABLE updates ADD COLUMN upload_compression TEXT NOT NULL DEFAULT 'none'",
        "ALTER TABLE evaluations ADD COLUMN download_encoding TEXT NOT NULL DEFAULT 'fp32'",
    ),
    2: (
        "ALTER TABLE devices ADD COLUMN role TEXT NOT NULL DEFAULT 'device'",
        "ALTER TABLE devices ADD COLUMN is_trusted BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE places ADD COLUMN has_asked BOOLEAN NOT NULL DEFAULT 1",
        "ALTER TABLE places ADD COLUMN modalities TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE updates ADD COLUMN modalities TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE evaluations ADD COLUMN modalities TEXT NOT NULL DEFAULT ''",
    ),
    3: (),
    4: (
        "ALTER TABLE updates ADD COLUMN norm REAL",
        *(
            _bound("updates", "report", field, MAX_COUNT)
            for field in ("peak_bytes", "bytes_down", "bytes_up", "failed_attempts")
        ),
        _bound("updates", "report", "train_seconds", MAX_SECONDS),
        _bound("updates", "report", "loss", MAX_LOSS),
        _bound("evaluations", "evaluation", "loss", MAX_LOSS),
        "ALTER TABLE places ADD COLUMN taken_unix_seconds FLOAT NOT NULL DEFAULT 0",
        "ALTER TABLE runs ADD COLUMN halt TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE runs ADD COLUMN halt_reason TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE runs ADD COLUMN halted_unix_seconds FLOAT",
        "ALTER TABLE devices ADD COLUMN did TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE devices ADD COLUMN did_unix_seconds REAL",
        "ALTER TABLE devices ADD COLUMN refusal TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE devices ADD COLUMN refused_unix_seconds REAL",
        "ALTER TABLE runs ADD COLUMN undone_round_id INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE devices ADD COLUMN removed_name TEXT",
    ),
    5: ("ALTER TABLE runs ADD COLUMN rule_state TEXT NOT NULL DEFAULT ''",),
}
"""What turns the tables of a version into those of the next; new tables are made by themselves."""

Halt = Literal["", "paused", "cancelled", "failed"]


class Base(DeclarativeBase):
    pass


class ClockRow(Base):
    """One row: a moment on the time line, and what the clocks said then. `boot` is the start that `steady` counts from."""

    __tablename__ = "clock"
    id: Mapped[int] = mapped_column(primary_key=True)
    now_unix_seconds: Mapped[float]
    wall_unix_seconds: Mapped[float]
    steady_seconds: Mapped[float]
    boot: Mapped[str]


class DeviceRow(Base):
    """A device, and what it said when it last asked for work. Its token is kept as a hash only.

    `is_trusted`: it enrolled with the admin token, so it may calibrate. `did` is what it did last, beside asking for work, and
    `refusal` the last one that it got (`coordinator.view.last_acts`); empty: none yet.

    One that was removed has its name in `removed_name`: the name is free again, and what the device did is still told of it.
    """

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    token_sha256: Mapped[str] = mapped_column(unique=True)
    seen_unix_seconds: Mapped[float | None]
    run_number: Mapped[int | None] = mapped_column(ForeignKey("runs.number"), index=True)
    engine: Mapped[EngineName | None] = mapped_column(Text)
    test_examples: Mapped[int] = mapped_column(default=0)
    role: Mapped[DeviceRole] = mapped_column(Text, default="device")
    is_trusted: Mapped[bool] = mapped_column(default=False)
    did: Mapped[str] = mapped_column(default="")
    did_unix_seconds: Mapped[float | None]
    refusal: Mapped[str] = mapped_column(default="")
    refused_unix_seconds: Mapped[float | None]
    removed_name: Mapped[str | None]


class CardRow(Base):
    """The card of a device's data, as it sent it last (`coordinator.rounds.cards`); `sha256` is of the bytes that it sent."""

    __tablename__ = "cards"
    device_id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    card: Mapped[str] = mapped_column(Text)


class DataFactRow(Base):
    """What the data of all devices of a run has in common: a field of a card, its value as JSON, and the device that had it
    first."""

    __tablename__ = "data_facts"
    run_number: Mapped[int] = mapped_column(ForeignKey("runs.number"), primary_key=True)
    field: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(Text)
    device_id: Mapped[str]


class RunRow(Base):
    """One execution of a plan. `stage` and `round` are where it stands, `since_unix_seconds` since when.

    A run that an operator stopped, or that could not go on, has a `halt` with its reason, and the time since when.
    `undone_round_id` is the largest row id of a round that was taken back, 0 if none was: files are named after such ids, so no
    id is given twice. `rule_state` is the blob of what the aggregation rule keeps from round to round; empty: nothing.
    """

    __tablename__ = "runs"
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    manifest: Mapped[str]
    is_finished: Mapped[bool] = mapped_column(default=False)
    stage: Mapped[int] = mapped_column(default=0)
    round: Mapped[int] = mapped_column(default=0)
    since_unix_seconds: Mapped[float]
    halt: Mapped[Halt] = mapped_column(Text, default="")
    halt_reason: Mapped[str] = mapped_column(Text, default="")
    halted_unix_seconds: Mapped[float | None]
    undone_round_id: Mapped[int] = mapped_column(default=0)
    rule_state: Mapped[str] = mapped_column(default="")

    @property
    def id(self) -> str:
        return f"run-{self.number}"

    @property
    def state(self) -> RunState:
        return "finished" if self.is_finished else self.halt or "running"

    @property
    def has_ended(self) -> bool:
        """It has no more work for anybody."""
        return self.state not in ("running", "paused")


class WeightRow(Base):
    """The newest weights of a segment in a run: initial, or as last aggregated."""

    __tablename__ = "weights"
    run_number: Mapped[int] = mapped_column(ForeignKey("runs.number"), primary_key=True)
    segment: Mapped[str] = mapped_column(primary_key=True)
    blob: Mapped[str]


class SupersededRow(Base):
    """Weights that a segment had in a round before, whose blob is still there."""

    __tablename__ = "superseded"
    blob: Mapped[str] = mapped_column(primary_key=True)


class TeacherRow(Base):
    """The weights that a segment had when a stage began, which are those of the end of the stage before."""

    __tablename__ = "teachers"
    run_number: Mapped[int] = mapped_column(ForeignKey("runs.number"), primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True)
    segment: Mapped[str] = mapped_column(primary_key=True)
    blob: Mapped[str]


class SnapshotRow(Base):
    """The weights that a segment had when a round closed."""

    __tablename__ = "snapshots"
    run_number: Mapped[int] = mapped_column(ForeignKey("runs.number"), primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    segment: Mapped[str] = mapped_column(primary_key=True)
    blob: Mapped[str]


class RecallRow(Base):
    """A device that was given work in a round which was then taken back; gone once the device was told."""

    __tablename__ = "recalls"
    run_number: Mapped[int] = mapped_column(ForeignKey("runs.number"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)


class HistoryRow(Base):
    """One thing that was done. Names as they were then; `before` and `after` are states. The time is the wall clock's."""

    __tablename__ = "history"
    id: Mapped[int] = mapped_column(primary_key=True)
    unix_seconds: Mapped[float]
    who: Mapped[str]
    what: Mapped[str]
    run: Mapped[str] = mapped_column(index=True)
    device: Mapped[str]
    before: Mapped[str]
    after: Mapped[str]
    detail: Mapped[str] = mapped_column(Text)


class RoundRow(Base):
    """A round that has started. `since_unix_seconds` is when its present phase began."""

    __tablename__ = "rounds"
    __table_args__ = (UniqueConstraint("run_number", "stage", "round"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    run_number: Mapped[int] = mapped_column(ForeignKey("runs.number"))
    stage: Mapped[int]
    round: Mapped[int]
    phase: Mapped[RoundPhase] = mapped_column(Text, default="training", index=True)
    since_unix_seconds: Mapped[float]

    @property
    def text(self) -> str:
        return f"round {self.round} of stage {self.stage}"


class VariantRow(Base):
    """A float32 blob of weights as a smaller blob. If compressing did not make it smaller, `blob` is the uncompressed one."""

    __tablename__ = "variants"
    master: Mapped[str] = mapped_column(primary_key=True)
    encoding: Mapped[Encoding] = mapped_column(Text, primary_key=True)
    compression: Mapped[Compression] = mapped_column(Text, primary_key=True)
    blob: Mapped[str]


class PlaceRow(Base):
    """A device's place in the cohort of a round, how its weights and its update travel, and the modalities that it trains.

    A drawn device has a place before it asks for the work; all that it agrees to stands here once `has_asked` is true.
    `taken_unix_seconds` is when the device first had a place in this round, also if it lost that since.
    """

    __tablename__ = "places"
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    lease_ends_unix_seconds: Mapped[float]
    taken_unix_seconds: Mapped[float]
    is_lost: Mapped[bool] = mapped_column(default=False)
    download_encoding: Mapped[Encoding] = mapped_column(Text, default="fp32")
    upload_encoding: Mapped[Encoding] = mapped_column(Text, default="fp32")
    compression: Mapped[Compression] = mapped_column(Text, default="none")
    has_asked: Mapped[bool] = mapped_column(default=True)
    modalities: Mapped[str] = mapped_column(default="")


class CalibrationRow(Base):
    """The one calibration of a round: who has the work, on which terms, and, once accepted, the update's hashes.

    The update of a calibrator that went silent never came, so the row of the one that took over replaces its.
    """

    __tablename__ = "calibrations"
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    lease_ends_unix_seconds: Mapped[float]
    download_encoding: Mapped[Encoding] = mapped_column(Text)
    upload_encoding: Mapped[Encoding] = mapped_column(Text)
    compression: Mapped[Compression] = mapped_column(Text)
    body_sha256: Mapped[str | None]
    content_sha256: Mapped[str | None]
    report: Mapped[str | None] = mapped_column(Text)


class UpdateRow(Base):
    """An accepted update. `content_sha256` is over the decoded values, so that it is the same for every encoding.

    `body_sha256` is of the bytes as they travelled; encoding and compression are what they really had.
    """

    __tablename__ = "updates"
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    body_sha256: Mapped[str]
    content_sha256: Mapped[str]
    norm: Mapped[float | None]
    num_examples: Mapped[int]
    report: Mapped[str] = mapped_column(Text)
    engine: Mapped[EngineName] = mapped_column(Text)
    test_examples: Mapped[int]
    download_encoding: Mapped[Encoding] = mapped_column(Text, default="fp32")
    upload_encoding: Mapped[Encoding] = mapped_column(Text, default="fp32")
    upload_compression: Mapped[Compression] = mapped_column(Text, default="none")
    modalities: Mapped[str] = mapped_column(default="")


class EvaluationRow(Base):
    """A device that is asked to evaluate; `body_sha256` and `evaluation` are None until it has answered."""

    __tablename__ = "evaluations"
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    lease_ends_unix_seconds: Mapped[float]
    evaluation: Mapped[str | None] = mapped_column(Text)
    download_encoding: Mapped[Encoding] = mapped_column(Text, default="fp32")
    modalities: Mapped[str] = mapped_column(default="")


SHOWN_NAME = func.coalesce(DeviceRow.removed_name, DeviceRow.name)
"""What a device is called where one tells what it did; it may have been removed since."""
