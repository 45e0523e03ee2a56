"""A whole run in one process: what devices and coordinator do, without HTTP, other processes and waiting.

The code that decides the result is that of the real parts: the exporter, `edge_client.talk.prepare` and
`edge_client.train.trainer` with its feature cache, and `lamina.federation`, which the coordinator asks too. So the same plan
and data give the same final weights, to the bit, as `benchmarks.demo.federated.federated_run`
(tests/benchmarks/test_simulation.py). Programs are loaded once for all devices, so a round of a hundred devices costs its
arithmetic and little else.

Bytes are those of the blobs and updates that a device would move: a blob that it still holds is not downloaded again, as in
`edge_client.talk.blobs`. JSON messages are not counted. Memory is not measured here: one process stands for all devices.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from benchmarks.simulate.device import Device, SharedEngine
from benchmarks.simulate.weights import SimulatedWeights
from edge_client.engines import load_engine
from edge_client.job import Job
from edge_client.talk.prepare import prepare_job
from edge_client.train.epochs import Evaluated, Trained
from edge_client.train.heartbeat import Lease
from edge_client.train.stage_model import StageModel
from edge_client.train.trainer import features, stage_model, update_file, work
from export.build import export_bundle
from lamina.bundles.bundle import bundle_digest, manifest_bytes
from lamina.bundles.manifest import EngineName, Manifest
from lamina.encoding.compression import compress_file
from lamina.encoding.tensors import Float32
from lamina.errors import ConfigError, TensorFileError
from lamina.federation.aggregation import Contribution, aggregate
from lamina.federation.assignment import assign, teacher_segments
from lamina.federation.content import check_content
from lamina.federation.influence import Size
from lamina.federation.losses import mean_by_examples
from lamina.federation.modalities import is_measured_alike
from lamina.federation.policies import policy_of
from lamina.federation.policy import Position, draw_cohort
from lamina.federation.rules.base import State
from lamina.federation.terms import agree
from lamina.plans.plan import Plan, Stage
from lamina.wire import Assignment, Phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

ReadWeights = Callable[[], dict[str, dict[str, Float32]]]
OnRound = Callable[["Round", ReadWeights], None]
"""Called after each round, with what reads the newest weights by segment."""
CALIBRATOR = "calibrator"


@dataclass(frozen=True)
class Round:
    """One round of a run. `train_loss` is the mean over the cohort's examples.

    `test_*` are of the new weights on the test rows of all devices; None where the plan does not evaluate this round
    (`cohort.evaluate_every`). With a contrastive objective, losses and accuracy are of the devices that have pairs alone
    (`lamina.federation.modalities.is_measured_alike`); the train loss of a cohort without any is NaN. Bytes are by device, for
    the devices of the cohort; so are the frozen segments that its features passed. CPU seconds are those of the whole cohort,
    with its feature caches.
    """

    stage: int
    round: int
    cohort: tuple[str, ...]
    train_loss: float
    test_accuracy: float | None
    test_loss: float | None
    test_examples: int
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    frozen: dict[str, tuple[str, ...]]
    train_cpu_seconds: float
    evaluate_cpu_seconds: float

    @property
    def line(self) -> str:
        """The round in a line."""
        tested = "" if self.test_accuracy is None else f", test accuracy {self.test_accuracy:.3f}"
        return f"stage {self.stage}, round {self.round}: train loss {self.train_loss:.3f}{tested}"


@dataclass(frozen=True)
class SimulationResult:
    """`blobs` are the sha256 of the final weights by segment, as in `lamina.wire.RunStatus`; `weights` their tensors.

    What a stage costs one device, its planned memory, FLOPs and parameters, stands in `manifest.stages[i].cost`.
    """

    manifest: Manifest
    rounds: tuple[Round, ...]
    blobs: dict[str, str]
    weights: dict[str, dict[str, Float32]] = field(repr=False)
    devices: tuple[str, ...]
    examples: dict[str, int]
    cpu_seconds: float
    """From the first round to the last; without the export."""

    @property
    def test_accuracy(self) -> float | None:
        """Of the final weights; None if they were not evaluated."""
        return self.rounds[-1].test_accuracy if self.rounds else None

    def table(self) -> "Table":
        """A row for each round, as a table of rich; a notebook shows it as it is."""
        from benchmarks.simulate.shown import table_of

        return table_of(self)

    def plot(self) -> "Figure":
        """Loss and accuracy over the rounds, with the stages, as a figure of matplotlib."""
        from benchmarks.simulate.shown import figure_of

        return figure_of(self)

    def bytes_of(self, device: str) -> tuple[int, int]:
        """(down, up) of one device over the whole run."""
        down = sum(each.bytes_down.get(device, 0) for each in self.rounds)
        return down, sum(each.bytes_up.get(device, 0) for each in self.rounds)


def simulate(
    plan: Plan,
    files: Sequence[Path],
    folder: Path,
    engine: EngineName = "onnxruntime",
    participation: float = 1.0,
    on_round: OnRound = lambda *_: None,
    calibration_file: Path | None = None,
    model: nn.Module | None = None,
) -> SimulationResult:
    """Exports the plan into `folder` and trains it to the end; device i has `files[i]` and is called `device-<i>`.

    In each round the share `participation` of the devices trains, drawn as a coordinator with `cohort.pool` draws; the plan's
    own cohort and pool are not used. `calibration_file` is the server's own data, which a plan with `calibration` needs.
    `model` has the weights to start from, as in `export_bundle`.
    `folder` takes the bundle, the devices' feature caches and the weights; it is the caller's to delete.

    Raises ConfigError for a share out of range or missing data, and what exporting and training raise.
    """
    manifest = export_bundle(plan, folder / "bundle", (engine,), model=model)
    simulation = Simulation(manifest, folder / "bundle", files, folder, engine, calibration_file)
    return simulation.run(participation, on_round)


class Simulation:
    """The devices and the coordinator of one run of an exported bundle."""

    def __init__(
        self,
        manifest: Manifest,
        bundle: Path,
        files: Sequence[Path],
        folder: Path,
        engine: EngineName,
        calibration_file: Path | None = None,
    ) -> None:
        """Raises DataError for a file that does not fit the model, ConfigError if the plan needs other data than there is."""
        self._manifest, self._digest = manifest, bundle_digest(bundle)
        self._manifest_bytes = len(manifest_bytes(bundle))
        self._engine = SharedEngine(load_engine(engine))
        self._newest = SimulatedWeights(manifest, bundle, folder / "weights")
        self._rule_state: State = {}
        self._policy = policy_of(manifest.plan)
        self._devices = {
            name: Device(name, file, folder / name, manifest, engine)
            for name, file in ((f"device-{index}", file) for index, file in enumerate(files))
        }
        self._calibrator: Device | None = None
        if manifest.plan.calibration:
            if calibration_file is None:
                raise ConfigError(f"plan {manifest.plan.name!r} calibrates on data of the server's own: give calibration_file")
            self._calibrator = Device(CALIBRATOR, calibration_file, folder / CALIBRATOR, manifest, engine, "calibrator")

    def run(self, participation: float = 1.0, on_round: OnRound = lambda *_: None) -> SimulationResult:
        """Trains all stages to the end; to be called once."""
        if not 0 < participation <= 1:
            raise ConfigError(f"participation must be above 0 and at most 1, given {participation}")
        started = time.process_time()
        size = max(1, round(participation * len(self._devices)))
        rounds = []
        try:
            for each in self._rounds(size):
                rounds.append(each)
                on_round(each, self.weights)
        finally:
            self._engine.close()
        return SimulationResult(
            manifest=self._manifest,
            rounds=tuple(rounds),
            blobs=dict(self._newest.blobs),
            weights=self.weights(),
            devices=tuple(self._devices),
            examples={name: device.data.train_examples for name, device in self._devices.items()},
            cpu_seconds=time.process_time() - started,
        )

    def weights(self) -> dict[str, dict[str, Float32]]:
        """The newest weights of every segment, with the tensors that are never trained."""
        return {name: self._newest.tensors(name) | self._newest.frozen(name) for name in self._newest.blobs}

    def _rounds(self, size: int) -> Iterator[Round]:
        """All rounds of all stages, as `coordinator.rounds.rounds.advance` goes through them."""
        plan = self._manifest.plan
        for stage in plan.stages:
            self._remember_teacher(stage)
            train_losses: list[float] = []
            test_losses: list[float] = []
            for number in range(stage.rounds):
                started = time.process_time()
                position = Position(stage.index, number)
                names = draw_cohort(self._devices, size, plan.seed, *position)
                cohort = [device for name, device in self._devices.items() if name in names]
                before = {device.name: device.bytes_down for device in cohort}
                updates = [self._train(device, "train", stage.index, number) for device in cohort]
                self._aggregate(stage, updates)
                self._calibrate(stage.index, number)
                alike = [each.result for each in updates if is_measured_alike(plan, each.modalities)]
                train_loss = mean_by_examples((each.loss, each.num_examples) for each in alike)
                train_losses += [train_loss] if alike else []
                is_last = self._ends_stage(position, "train_loss", train_losses)
                trained = time.process_time()
                found: dict[str, Evaluated] = {}
                if plan.cohort.evaluates(number, is_last):
                    found = self._evaluate(cohort, stage.index, number)
                    found = {name: each for name, each in found.items() if self._is_measured_alike(name)}
                asked = [(each.loss, each.num_examples) for name, each in found.items() if name in names]
                test_losses += [mean_by_examples(asked)] if asked else []
                yield Round(
                    stage=stage.index,
                    round=number,
                    cohort=tuple(device.name for device in cohort),
                    train_loss=train_loss,
                    **_test_figures(found.values()),
                    bytes_down={device.name: device.bytes_down - before[device.name] for device in cohort},
                    bytes_up={device.name: each.bytes_up for device, each in zip(cohort, updates, strict=True)},
                    frozen={device.name: each.frozen for device, each in zip(cohort, updates, strict=True)},
                    train_cpu_seconds=trained - started,
                    evaluate_cpu_seconds=time.process_time() - trained,
                )
                if is_last or self._ends_stage(position, "test_loss", test_losses):
                    break

    def _is_measured_alike(self, device: str) -> bool:
        return is_measured_alike(self._manifest.plan, self._devices[device].modalities)

    def _ends_stage(self, position: Position, measure: str, losses: Sequence[float]) -> bool:
        tuning = self._manifest.plan.self_tuning
        return self._policy.ends_stage(position, losses if tuning is not None and tuning.measure == measure else [])

    def _remember_teacher(self, stage: Stage) -> None:
        """As `coordinator.rounds.stages` does."""
        self._newest.teacher = {name: self._newest.blobs[name] for name in teacher_segments(self._manifest, stage.index)}

    def _assign(self, device: Device, phase: Phase, stage: int, number: int) -> Assignment:
        """The work of one device in one round, its weights in the encoding that `coordinator.store.variants` would choose."""
        terms = agree(self._manifest.plan.training, device.facts)
        work = assign(
            self._manifest,
            self._digest,
            "run-1",
            phase,
            Position(stage, number),
            device.name,
            terms,
            device.modalities,
            self._newest.blobs,
            self._newest.teacher,
        )
        encoding = terms.download_encoding
        try:
            weights = {name: self._newest.variant(name, encoding, "none") for name in work.weights}
        except TensorFileError:  # as `coordinator.store.variants`
            encoding = "fp32"
            weights = {name: self._newest.variant(name, encoding, "none") for name in work.weights}
        packed = {name: self._newest.variant(name, encoding, terms.compression) for name in work.weights}
        compressed = {name: blob for name, blob in packed.items() if blob != weights[name]}
        changes = {"weights": weights, "download_encoding": encoding, "compressed_weights": compressed}
        return work.model_copy(update=changes)

    def _prepare(self, device: Device, phase: Phase, stage: int, number: int, is_asked: bool = True) -> Job:
        """The job of a device. One that no coordinator asked, and that is only looked at, has a feature cache apart and
        downloads nothing: when it is asked later, it lacks what a real device would lack."""
        assignment = self._assign(device, phase, stage, number)
        job = prepare_job(
            work=assignment,
            manifest=self._manifest,
            data=device.data,
            fetch=device.fetcher(assignment, self._newest.path, self._manifest_bytes) if is_asked else self._newest.path,
            state=device.state if is_asked else device.state / "unasked",
            device=device.name,
            engine=self._engine.name,
            check_in=device.facts,
            url="",
            disk_bytes=None,
        )
        if is_asked:
            blobs = {
                self._digest,
                *assignment.weights.values(),
                *assignment.teacher_weights.values(),
                *self._manifest.frozen_tensors.values(),
            }
            device.keep_only(blobs | set(self._manifest.programs))
        return replace(job, heartbeat=None)  # nobody listens

    def _work(self, job: Job) -> tuple[Trained | Evaluated, StageModel]:
        """What came of a job, and the model that it left, its programs closed."""
        lease = Lease(job, _quiet)
        views = features(job, self._engine, _quiet, lease)
        model = stage_model(job, self._engine)
        try:
            return work(model, views, job, _quiet, lease), model
        finally:
            model.close()

    def _train(self, device: Device, phase: Phase, stage: int, number: int) -> "_Update":
        """As `edge_client.train.trainer.do_job`, and as the coordinator accepts what came of it."""
        job = self._prepare(device, phase, stage, number)
        result, model = self._work(job)
        assert isinstance(result, Trained)
        model.subtract_weights()
        path = device.state / "update.safetensors"
        path.write_bytes(update_file(model, job))
        is_calibration = phase == "calibrate"
        manifest = self._manifest
        specs = manifest.specs(manifest.calibrated(stage) if is_calibration else manifest.exchange(stage, device.modalities))
        content = check_content(str(path), specs)
        return _Update(
            result=result,
            modalities=device.modalities,
            contribution=Contribution(
                content.sha256, 1 if is_calibration else result.num_examples, path, specs, norm=content.norm
            ),
            size=Size(result.num_examples, content.norm, specs),
            frozen=tuple(step.segment.name for plan in job.features for step in plan.steps),
            bytes_up=_bytes_up(path, job),
        )

    def _aggregate(self, stage: Stage, updates: Sequence["_Update"]) -> None:
        """As `coordinator.aggregation.aggregator`: a segment that nobody trained keeps its blob."""
        manifest = self._manifest
        trained = {name for each in updates for name in manifest.exchange(stage.index, each.modalities)}
        counted = self._policy.weight([each.size for each in updates])
        contributions = [
            replace(each.contribution, num_examples=bounded.num_examples, scale=bounded.scale)
            for each, bounded in zip(updates, counted, strict=True)
        ]
        specs = manifest.exchange_specs(stage.index)
        plan = manifest.plan
        new, self._rule_state = aggregate(
            self._newest.vector(stage.active),
            contributions,
            specs,
            plan.aggregation,
            plan.server_learning_rate,
            self._rule_state,
        )
        self._newest.replace([name for name in stage.active if name in trained], new)

    def _calibrate(self, stage: int, number: int) -> None:
        """As `coordinator.aggregation.calibration`, with the one calibrator there is."""
        if self._calibrator is not None:
            update = self._train(self._calibrator, "calibrate", stage, number)
            names = self._manifest.calibrated(stage)
            new, _ = aggregate(self._newest.vector(names), [update.contribution], self._manifest.specs(names))
            self._newest.replace(names, new)

    def _evaluate(self, cohort: Sequence[Device], stage: int, number: int) -> dict[str, Evaluated]:
        """What every device with test rows says of the newest weights. A coordinator asks the cohort alone, so the others
        download nothing for it."""
        found: dict[str, Evaluated] = {}
        for device in self._devices.values():
            if not device.data.test_examples:
                continue
            result, _ = self._work(self._prepare(device, "evaluate", stage, number, is_asked=device in cohort))
            assert isinstance(result, Evaluated)
            found[device.name] = result
        return found


@dataclass(frozen=True)
class _Update:
    result: Trained
    modalities: tuple[str, ...]
    contribution: Contribution
    size: Size
    frozen: tuple[str, ...]
    bytes_up: int


def _bytes_up(path: Path, job: Job) -> int:
    """What travels: the file, compressed as agreed if that is shorter (`edge_client.talk.device`)."""
    plain = path.stat().st_size
    if job.upload_compression == "none":
        return plain
    packed = path.with_suffix(".packed")
    compress_file(path, packed, job.upload_compression)
    return min(plain, packed.stat().st_size)


def _test_figures(found: Iterable[Evaluated]) -> dict[str, Any]:
    """The test fields of a `Round`."""
    evaluations = list(found)
    examples = sum(each.num_examples for each in evaluations)
    if not examples:
        return {"test_accuracy": None, "test_loss": None, "test_examples": 0}
    accuracy = sum(each.correct for each in evaluations) / examples
    loss = mean_by_examples((each.loss, each.num_examples) for each in evaluations)
    return {"test_accuracy": accuracy, "test_loss": loss, "test_examples": examples}


def _quiet(line: str) -> None:
    """Devices of a simulation say nothing."""
