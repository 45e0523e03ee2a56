"""A job: everything that one piece of work on the device needs, as plain JSON and files whose content was verified.

The process that talks to the coordinator writes it, and ends. The process that trains reads it: no pydantic, no HTTP, no
hashing, so that training has the memory to itself.
"""

import json
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from edge_client.versions import EVALUATED, epochs_of
from lamina.encoding.compression import Compression
from lamina.encoding.tensors import Encoding
from lamina.names import EngineName, Precision, Reference, Role

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
ObjectiveKind = Literal["supervised", "contrastive", "self_supervised"]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ReferenceFile:
    """Copies of some of a program's weights, from another time, that it takes after them (`lamina.names.Reference`).

    `tensors` are places in `ProgramFile.weights`.
    """

    kind: Reference
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class ProgramFile:
    """A program and where it lies (`lamina.bundles.manifest.Program`)."""

    path: str
    blob: str
    role: Role
    weights: tuple[tuple[int, ...], ...]
    inputs: tuple[Tensor, ...]
    max_batch: int
    precision: Precision = "fp32"
    references: tuple[ReferenceFile, ...] = ()
    frozen: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class SegmentFile:
    """A segment's weights, a tensor file; and another with its frozen tensors, if it has any
    (`lamina.plans.segments.Segment`)."""

    name: str
    path: str
    tensors: tuple[Tensor, ...]
    frozen_path: str = ""
    frozen: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class FrozenStep:
    """One segment of a frozen prefix. `limit` is the exclusive bound of an integer input, None for features.

    All files have an empty path where the features behind this step are on disk, so that it does not have to run.
    """

    segment: SegmentFile
    program: ProgramFile
    limit: int | None = None


@dataclass(frozen=True)
class Rows:
    """An array in a file: `offset` is where its .npy header starts, `identity` that of the file
    (`edge_client.rows.row_files`)."""

    path: str
    offset: int
    source: str
    identity: tuple[int, int, int]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the rows (`lamina.plans.plan.Augmentation`); `axes` are those of one row that may be shifted, cropped
    or erased."""

    axes: tuple[int, ...]
    shift: int
    noise: float
    flip: bool
    seed: int
    erase: float = 0.0
    crop: float = 1.0
    gain: float = 0.0


@dataclass(frozen=True)
class FeaturePlan:
    """One modality's way to the active segments: its rows, the frozen steps, and the cache key after each of them.

    With depth dropout, the steps are those that this device draws in this round. `keys` has one list for each view.
    """

    modality: str
    rows: Rows
    steps: tuple[FrozenStep, ...]
    keys: tuple[tuple[str, ...], ...]
    augmentation: Augmentation | None = None


@dataclass(frozen=True)
class Heartbeat:
    """How the trainer keeps the device's place in the round: the check-in that it repeats. The token is in a private file."""

    url: str
    body: str
    token_file: str
    lease_seconds: float


@dataclass(frozen=True)
class Job:
    """One phase of one round.

    `active` are the segments that it trains or evaluates: those of the device's modalities, or, to calibrate, all that are
    attached so far. `rate_scales` has the factor of the learning rate of each of them; empty: 1 for all.
    """

    phase: Literal["train", "evaluate", "calibrate"]
    run: str
    stage: int
    round: int
    device: str
    engine: EngineName
    seed: int
    objective: ObjectiveKind
    limits: dict[str, int]
    batch_size: int
    micro_batch: int
    local_epochs: int
    learning_rate: float
    optimizer: dict[str, Any]
    upload_encoding: Encoding
    upload_compression: Compression
    programs: dict[Role, ProgramFile]
    active: tuple[SegmentFile, ...]
    features: tuple[FeaturePlan, ...]
    keep_keys: tuple[tuple[str, ...], ...]
    """Cache keys, deepest last; of each tuple the deepest file that exists is kept, and nothing else."""
    feature_encoding: str
    feature_folder: str
    stored_examples: int
    """So many of the examples have their features on disk; those of the others are computed when they are needed."""
    label: Rows | None
    examples: int
    work_folder: str
    heartbeat: Heartbeat | None = field(default=None)
    rate_scales: tuple[float, ...] = ()
    proximal: float = 0.0
    momentum: float = 0.0
    """Of the moving average, where a program takes a `momentum` reference."""
    keep_optimizer: bool = False
    kept_folder: str = ""
    """What the device keeps from one round of a stage to the next (`edge_client.train.kept`); empty: nothing."""
    teacher: tuple[SegmentFile, ...] = ()
    """The segments that `teacher` references are taken from."""
    stall_seconds: float = 1800.0
    """So long at most the training process may do no batch and no feature rows (`edge_client.process.watchdog`)."""

    @property
    def trains(self) -> bool:
        return self.phase != "evaluate"

    @property
    def epochs(self) -> range:
        """Those of the stage that this job takes."""
        return epochs_of(self.round, self.local_epochs) if self.trains else EVALUATED

    @property
    def takes_pairs_of_views(self) -> bool:
        return self.objective == "self_supervised"

    @property
    def where(self) -> str:
        return f"stage {self.stage}, round {self.round}"

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def read(path: Path) -> "Job":
        return _job(json.loads(path.read_bytes()))


def _job(value: dict[str, Any]) -> Job:
    heartbeat, label = value.pop("heartbeat"), value.pop("label")
    return Job(
        programs={role: _program(program) for role, program in value.pop("programs").items()},
        active=tuple(_segment(segment) for segment in value.pop("active")),
        features=tuple(_features(plan) for plan in value.pop("features")),
        keep_keys=tuple(tuple(keys) for keys in value.pop("keep_keys")),
        heartbeat=Heartbeat(**heartbeat) if heartbeat else None,
        label=_rows(label) if label else None,
        rate_scales=tuple(value.pop("rate_scales")),
        teacher=tuple(_segment(segment) for segment in value.pop("teacher")),
        **value,
    )


def _tensors(values: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(value["name"], tuple(value["shape"]), value["dtype"]) for value in values)


def _program(value: dict[str, Any]) -> ProgramFile:
    return ProgramFile(
        weights=_shapes(value.pop("weights")),
        inputs=_tensors(value.pop("inputs")),
        references=tuple(ReferenceFile(each["kind"], tuple(each["tensors"])) for each in value.pop("references")),
        frozen=_shapes(value.pop("frozen")),
        **value,
    )


def _shapes(values: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for shape in values)


def _segment(value: dict[str, Any]) -> SegmentFile:
    return SegmentFile(tensors=_tensors(value.pop("tensors")), frozen=_tensors(value.pop("frozen")), **value)


def _features(value: dict[str, Any]) -> FeaturePlan:
    return FeaturePlan(
        modality=value["modality"],
        rows=_rows(value["rows"]),
        steps=tuple(FrozenStep(_segment(s["segment"]), _program(s["program"]), s["limit"]) for s in value["steps"]),
        keys=tuple(tuple(keys) for keys in value["keys"]),
        augmentation=_augmentation(value["augmentation"]) if value["augmentation"] else None,
    )


def _rows(value: dict[str, Any]) -> Rows:
    return Rows(value["path"], value["offset"], value["source"], tuple(value["identity"]))


def _augmentation(value: dict[str, Any]) -> Augmentation:
    return Augmentation(axes=tuple(value.pop("axes")), **value)
