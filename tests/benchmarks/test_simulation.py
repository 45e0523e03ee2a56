"""`benchmarks.simulate.simulation`: the same bits and the same bytes as real processes, and rounds of a drawn cohort."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo.federated import federated_run
from benchmarks.methods.costs import costs_of
from benchmarks.simulate.device import SharedEngine
from benchmarks.simulate.simulation import Simulation, SimulationResult, simulate
from export.build import export_bundle
from lamina.bundles.manifest import EngineName, Manifest
from lamina.errors import ConfigError
from lamina.federation.rules.momentum import Momentum
from lamina.plans.model import AudioFrames, Contrastive, Encoder, ImagePatches, ModelDescription, Projection, Supervised
from lamina.plans.plan import (
    SGD,
    AdamW,
    Augmentation,
    Calibration,
    Cohort,
    DepthDropout,
    FeatureStore,
    Plan,
    SelfTuning,
    Training,
)
from lamina.plans.strategies import make_stages

SIZES = {"width": 16, "heads": 2, "layers": 2}
MODEL = ModelDescription(
    name="tiny",
    encoders=(
        Encoder(modality="image", input=ImagePatches(channels=1, height=8, width=8, patch=4), **SIZES),
        Encoder(modality="audio", input=AudioFrames(frames=4, coefficients=5), **SIZES),
    ),
    projection=Projection(hidden=16, output=8),
    objective=Supervised(classes=4),
)
TWO = Cohort(size=2, min_updates=2, lease_seconds=60)
PLAIN = Training(batch_size=8, local_epochs=2, optimizer=SGD(momentum=0.9))
SMALLEST = Training(
    batch_size=8,
    micro_batch=4,
    local_epochs=2,
    optimizer=AdamW(),
    features=FeatureStore(encoding="int8", views=2),
    augmentation={"image": Augmentation(shift=1, noise=0.1)},
    prefix_precision="int8",
    download_encoding="fp16",
    upload_encoding="int8",
    compression="zstd",
)


def make_plan(
    training: Training = PLAIN,
    rounds: tuple[int, ...] = (1, 2),
    cohort: Cohort = TWO,
    strategy: str = "layerwise",
    **more: object,
) -> Plan:
    return Plan(
        name="tiny",
        model=MODEL,
        strategy=strategy,
        stages=make_stages(MODEL, strategy, rounds=rounds, learning_rate=0.03),
        training=training,
        cohort=cohort,
        **more,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four devices of unequal size; four classes that differ in the mean of both modalities."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(7)
    image_of, audio_of = rng.normal(size=(4, 1, 8, 8)), rng.normal(size=(4, 4, 5))
    made = []
    for device in range(4):
        arrays = {}
        for split, count in (("train", 30 + 7 * device), ("test", 13)):
            label = rng.integers(0, 4, count)
            arrays[f"{split}_label"] = label.astype(np.int64)
            arrays[f"{split}_image"] = (image_of[label] + rng.normal(size=(count, 1, 8, 8))).astype(np.float32)
            arrays[f"{split}_audio"] = (audio_of[label] + rng.normal(size=(count, 4, 5))).astype(np.float32)
        made.append(folder / f"data-{device}.npz")
        np.savez(made[-1], **arrays)
    return made


Bundle = tuple[Manifest, Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two stages of three rounds, for two engines; exporting is what takes long here."""
    folder = tmp_path_factory.mktemp("bundle")
    plan = make_plan(rounds=(3, 3), cohort=Cohort(size=2, evaluate_every=2))
    return export_bundle(plan, folder, ("onnxruntime", "torch")), folder


def run(
    bundle: Bundle, files: list[Path], folder: Path, engine: EngineName = "onnxruntime", share: float = 1.0
) -> SimulationResult:
    return Simulation(*bundle, files, folder, engine).run(share)


@pytest.fixture(scope="module")
def half(bundle: Bundle, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> SimulationResult:
    """Two of four devices in each round, evaluated after every second one."""
    return run(bundle, files, tmp_path_factory.mktemp("half"), share=0.5)


def _drawn() -> Plan:
    """Two of three devices in a round, with bounds that let neither count for more than another; four layers, of which a
    device gets three at most, so the last stage drops one."""
    model = MODEL.only("audio")
    model = model.model_copy(update={"encoders": (model.encoder("audio").model_copy(update={"layers": 4}),)})
    training = Training(
        batch_size=8,
        local_epochs=2,
        keep_optimizer=True,
        proximal=0.1,
        warm_up_rounds=1,
        depth_dropout=DepthDropout(budget=3),
        features=FeatureStore(keep="round"),
    )
    return Plan(
        name="drawn",
        model=model,
        strategy="layerwise",
        stages=make_stages(model, "layerwise", rounds=(1, 0, 1, 3), learning_rate=0.03),
        training=training,
        cohort=Cohort(size=2, pool=3, min_updates=2, evaluate_every=2, lease_seconds=60, max_examples=32, max_norm=1.0),
        aggregation=Momentum(beta=0.5),
        server_learning_rate=0.7,
    )


def _stalling() -> Plan:
    """The smallest encodings of everything, and distillation from the stage before; a stage ends after one round that is no
    improvement by half."""
    model = MODEL.model_copy(update={"objective": Supervised(classes=4, distill=0.5)})
    return Plan(
        name="stalling",
        model=model,
        strategy="layerwise",
        stages=make_stages(model, "layerwise", rounds=(3, 3), learning_rate=0.03),
        training=SMALLEST,
        cohort=TWO,
        self_tuning=SelfTuning(patience=1, min_improvement=0.5),
    )


def _lacking() -> Plan:
    """Pairs on one device, and views of one modality on each of the two others."""
    one_layer = tuple(encoder.first(1) for encoder in MODEL.encoders)
    model = MODEL.model_copy(update={"objective": Contrastive(temperature=0.2), "encoders": one_layer})
    return Plan(
        name="lacking",
        model=model,
        strategy="end_to_end",
        stages=make_stages(model, "end_to_end", rounds=2, learning_rate=0.03),
        training=Training(
            batch_size=8,
            local_epochs=2,
            features=FeatureStore(views=2),
            augmentation={"image": Augmentation(erase=0.3), "audio": Augmentation(noise=0.1, erase=0.3)},
        ),
        cohort=Cohort(size=3, min_updates=3, lease_seconds=60),
        device_modalities=(("image",), ("audio",)),
    )


def _without(path: Path, modality: str, folder: Path) -> Path:
    """The same data without a modality."""
    with np.load(path) as data:
        kept = {name: value for name, value in data.items() if not name.endswith(f"_{modality}")}
    np.savez(folder / f"without-{modality}.npz", **kept)
    return folder / f"without-{modality}.npz"


@pytest.mark.parametrize(
    ("make", "devices", "share"),
    [
        (_drawn, 3, 0.67),
        pytest.param(_stalling, 2, 1.0, marks=pytest.mark.slow),
        pytest.param(_lacking, 3, 1.0, marks=pytest.mark.slow),
    ],
)
def test_real_processes_give_the_same_final_weights_losses_and_accuracies(
    make: Callable[[], Plan], devices: int, share: float, files: list[Path], tmp_path: Path
) -> None:
    plan, folder, data = make(), tmp_path / "real", files[:devices]
    if plan.device_modalities:
        data = [data[0], _without(data[1], "audio", tmp_path), _without(data[2], "image", tmp_path)]
    engines: list[EngineName] = ["onnxruntime"] * devices
    manifest, real = federated_run(plan, data, engines, folder, ["--resident"], timeout_seconds=300)
    simulated = run((manifest, folder / "bundle"), data, tmp_path / "simulated", share=share)

    assert simulated.blobs == real.weights
    if plan.cohort.max_norm is not None:  # both bounds were at work
        assert all(
            "cohort.max_norm" in " ".join(row.notes) and "cohort.max_examples" in " ".join(row.notes) for row in real.rounds
        )
    assert len(simulated.rounds) == len(real.rounds)
    for mine, theirs in zip(simulated.rounds, real.rounds, strict=True):
        reports = {update.device: update.report for update in theirs.updates}
        assert (mine.stage, mine.round, mine.cohort) == (theirs.stage, theirs.round, tuple(sorted(reports)))
        if share == 1.0:  # real devices are asked only when they train
            assert (mine.test_examples, mine.test_accuracy) == (theirs.test_examples, theirs.test_accuracy)
            assert mine.test_loss == pytest.approx(theirs.test_loss, rel=1e-12)
        else:
            assert (mine.test_examples > 0) == (theirs.test_examples > 0)
        # Where some devices have no pairs, the loss is that of the others.
        counted = [each.report for each in theirs.updates if not (plan.device_modalities and each.modalities)]
        seen = sum(report.num_examples for report in counted)
        assert mine.train_loss == pytest.approx(sum(r.loss * r.num_examples for r in counted) / seen, rel=1e-12)
    for name in simulated.devices:
        reports = [update.report for row in real.rounds for update in row.updates if update.device == name]
        down, up = simulated.bytes_of(name)
        # What a device reports has JSON messages too, and lacks what it moves after its last update.
        last = next(each for each in reversed(simulated.rounds) if name in each.cohort).bytes_down[name]
        assert down - last <= sum(report.bytes_down for report in reports) < down + 20_000
        assert up <= sum(report.bytes_up for report in reports) < up + 10_000


def test_a_later_round_moves_the_active_weights_alone(
    bundle: Bundle, half: SimulationResult, files: list[Path], tmp_path: Path
) -> None:
    """Once a device has evaluated in a stage it has all else: it fetches what it starts from, if it does not hold that since
    it evaluated the round before, and what it evaluates."""
    looked_at = 0
    for result in (half, run(bundle, files[:2], tmp_path)):
        for device in result.devices:
            own = [each for each in result.rounds if device in each.cohort]
            for before, each in pairwise(own):
                cost = result.manifest.stages[each.stage].cost
                assert each.bytes_up[device] == cost.round_bytes_up
                if before.stage == each.stage and before.test_accuracy is not None:
                    holds_start = before.round + 1 == each.round
                    fetched = (not holds_start) + (each.test_accuracy is not None)
                    assert each.bytes_down[device] == fetched * cost.round_bytes_down
                    looked_at += 1
    assert looked_at >= 4


def test_a_cohort_is_drawn_anew_in_each_round_and_from_the_seed(
    bundle: Bundle, half: SimulationResult, files: list[Path], tmp_path: Path
) -> None:
    cohorts = [each.cohort for each in half.rounds]
    assert all(len(set(cohort)) == 2 and set(cohort) <= set(half.devices) for cohort in cohorts)
    assert len(set(cohorts)) > 1
    again = run(bundle, files, tmp_path, share=0.5)
    assert [each.cohort for each in again.rounds] == cohorts
    assert again.blobs == half.blobs
    assert {name: again.bytes_of(name) for name in again.devices} == {name: half.bytes_of(name) for name in half.devices}


def test_every_second_round_of_a_stage_and_its_last_are_evaluated_on_all_devices(half: SimulationResult) -> None:
    assert [each.test_accuracy is not None for each in half.rounds] == [False, True, True, False, True, True]
    assert {each.test_examples for each in half.rounds} == {0, 4 * 13}
    assert half.test_accuracy == half.rounds[-1].test_accuracy


def test_the_flops_are_those_of_every_round_and_of_each_frozen_segment_once(half: SimulationResult) -> None:
    first, second = (programs.cost for programs in half.manifest.stages)
    trained = PLAIN.local_epochs * 3 * (first.flops_per_sample + second.flops_per_sample)
    assert costs_of(half, "onnxruntime").macs_per_sample == trained + second.prefix_flops_per_sample


def test_devices_make_features_of_the_versions_that_they_take_alone(files: list[Path], tmp_path: Path) -> None:
    store = FeatureStore(views=8)
    training = PLAIN.model_copy(update={"augmentation": {"image": Augmentation(noise=0.1)}, "features": store})
    simulate(make_plan(training=training, rounds=(1, 1)), files, tmp_path, "torch")
    stored = [path for path in (tmp_path / "device-0").rglob("*.npy") if "features" in path.parts]
    assert len(stored) == 2 + 1 + 2  # two epochs of images, sounds as they are, and the test rows of both


def test_training_over_a_drawn_cohort_learns(half: SimulationResult) -> None:
    assert half.test_accuracy is not None and half.test_accuracy > 0.5  # four classes: chance is 0.25
    assert set(half.weights) == {segment.name for segment in half.manifest.segments}
    assert half.cpu_seconds > 0


def test_the_engines_agree_within_rounding(bundle: Bundle, files: list[Path], tmp_path: Path) -> None:
    one, other = (run(bundle, files[:2], tmp_path / engine, engine) for engine in ("onnxruntime", "torch"))
    for name, tensors in one.weights.items():
        for key, value in tensors.items():
            np.testing.assert_allclose(value, other.weights[name][key], rtol=1e-3, atol=2e-5, err_msg=f"{name}/{key}")


@pytest.mark.parametrize("participation", [0.0, 1.1])
def test_a_share_out_of_range_is_refused(bundle: Bundle, files: list[Path], tmp_path: Path, participation: float) -> None:
    with pytest.raises(ConfigError, match="participation must be above 0"):
        run(bundle, files[:1], tmp_path, share=participation)


def test_simulate_exports_and_trains_and_tells_of_each_round(files: list[Path], tmp_path: Path) -> None:
    model = MODEL.only("audio").model_copy(update={"encoders": (MODEL.encoder("audio").first(1),)})
    stages = make_stages(model, "end_to_end", rounds=2, learning_rate=0.03)
    plan = Plan(name="one", model=model, strategy="end_to_end", stages=stages, training=PLAIN)
    told = []
    result = simulate(plan, files[:1], tmp_path, on_round=lambda each, weights: told.append((each.round, weights()["head"])))
    assert [number for number, _ in told] == [0, 1] and result.examples == {"device-0": 30}
    first, last = (head["weight"] for _, head in told)
    assert (first != last).any() and (last == result.weights["head"]["weight"]).all()


def test_a_shared_program_is_loaded_once_and_survives_being_closed(tmp_path: Path) -> None:
    class Program:
        def __init__(self) -> None:
            self.is_open = True

        def run(self, arrays):
            assert self.is_open
            return arrays

        def close(self) -> None:
            self.is_open = False

    class Engine:
        name = "torch"

        def __init__(self) -> None:
            self.loaded: list[Program] = []

        def load(self, path, program):
            self.loaded.append(Program())
            return self.loaded[-1]

    class Shape:
        role = "train"

    engine = Engine()
    shared = SharedEngine(engine)
    first = shared.load(tmp_path / "blob", Shape())
    first.close()
    assert shared.load(tmp_path / "blob", Shape()).run([1]) == [1] and len(engine.loaded) == 1
    shared.load(tmp_path / "other", Shape())
    assert len(engine.loaded) == 2
    shared.close()
    assert not any(program.is_open for program in engine.loaded)


@pytest.mark.slow
def test_a_device_without_a_modality_trains_the_rest_and_calibration_needs_data_of_its_own(
    files: list[Path], tmp_path: Path
) -> None:
    plan = make_plan(
        rounds=(1, 1),
        strategy="progressive",
        device_modalities=(("audio",),),
        calibration=Calibration(data="server", learning_rate=0.01),
    )
    blind = _without(files[0], "image", tmp_path)
    bundle = export_bundle(plan, tmp_path / "bundle", ("onnxruntime",)), tmp_path / "bundle"
    with pytest.raises(ConfigError, match="give calibration_file"):
        Simulation(*bundle, files[:1], tmp_path / "refused", "onnxruntime")

    both = [blind, files[1]]
    result = Simulation(*bundle, both, tmp_path / "run", "onnxruntime", calibration_file=files[2]).run()
    assert result.test_accuracy is not None
    first, second = (result.rounds[0].bytes_up[name] for name in result.devices)
    assert first < second
    alone = Simulation(*bundle, both[:1], tmp_path / "alone", "onnxruntime", calibration_file=files[2]).run()
    assert alone.blobs["image.stem"] != bundle[0].initial_weights["image.stem"]  # the server trains what no device has
