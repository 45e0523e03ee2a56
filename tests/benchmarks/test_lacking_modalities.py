"""A contrastive run with devices that have pairs, images alone and texts alone, on the torch engine, whose export is quick."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulate.simulation import Simulation, SimulationResult, simulate
from lamina.plans.model import Contrastive, Encoder, ImagePatches, ModelDescription, Projection, TextTokens
from lamina.plans.plan import Augmentation, Cohort, FeatureStore, Plan, SelfTuning, Training
from lamina.plans.strategies import make_stages

pytestmark = pytest.mark.slow
VOCABULARY, LENGTH, THINGS = 16, 4, 6
SIZES = {"width": 16, "heads": 2, "layers": 2}
MODEL = ModelDescription(
    name="lacking",
    encoders=(
        Encoder(modality="image", input=ImagePatches(channels=1, height=8, width=8, patch=4), **SIZES),
        Encoder(modality="text", input=TextTokens(vocabulary=VOCABULARY, length=LENGTH), **SIZES),
    ),
    projection=Projection(hidden=16, output=8),
    objective=Contrastive(temperature=0.2),
)
PLAN = Plan(
    name="lacking",
    model=MODEL,
    strategy="layerwise",
    stages=make_stages(MODEL, "layerwise", rounds=(4, 2), learning_rate=0.003),
    training=Training(
        batch_size=12,
        micro_batch=5,
        local_epochs=6,
        features=FeatureStore(views=4),
        augmentation={"image": Augmentation(shift=1, noise=0.1, erase=0.2), "text": Augmentation(erase=0.3)},
    ),
    cohort=Cohort(size=3),
    device_modalities=(("image",), ("text",)),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures and words of a few things: one device with both, one with pictures alone, one with words alone."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    pictures, words = rng.normal(size=(THINGS, 1, 8, 8)), rng.integers(1, VOCABULARY, (THINGS, LENGTH))
    made = []
    for device, has in enumerate((("image", "text"), ("image",), ("text",))):
        arrays = {}
        for split, count in (("train", 36), ("test", 12)):
            thing = np.arange(count) % THINGS
            arrays[f"{split}_image"] = (pictures[thing] + 0.2 * rng.normal(size=(count, 1, 8, 8))).astype(np.float32)
            arrays[f"{split}_text"] = words[thing].astype(np.int64)
        made.append(folder / f"data-{device}.npz")
        np.savez(made[-1], **{name: value for name, value in arrays.items() if name.partition("_")[2] in has})
    return made


@pytest.fixture(scope="module")
def result(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> SimulationResult:
    return simulate(PLAN, files, tmp_path_factory.mktemp("run"), "torch")


def test_the_loss_of_pairs_falls_where_most_devices_have_none(result: SimulationResult) -> None:
    train, test = [each.train_loss for each in result.rounds], [each.test_loss for each in result.rounds]
    chance = np.log(12)
    assert train[0] > 0.8 * chance
    assert min(train[-2:]) < train[0] - 0.4
    assert all(loss is not None for loss in test) and min(test[-2:]) < test[0] - 0.2  # type: ignore[operator]


def test_only_pairs_are_in_the_figures_of_a_round(result: SimulationResult) -> None:
    assert {each.test_examples for each in result.rounds} == {12}
    assert {each.cohort for each in result.rounds} == {result.devices}


def test_a_device_without_pairs_moves_its_own_segments_alone(result: SimulationResult) -> None:
    both, eye, reader = (result.bytes_of(name)[1] for name in result.devices)
    assert abs(both - eye - reader) < 0.05 * both
    manifest = result.manifest
    assert all(result.blobs[name] != blob for name, blob in manifest.initial_weights.items())
    for stage, programs in zip(PLAN.stages, manifest.stages, strict=True):
        for part in programs.partial:
            assert manifest.exchange(stage.index, part.modalities) == [
                n for n in stage.active if n.startswith(part.modalities[0])
            ]
            assert part.planned_bytes["torch"] > 0


def test_devices_without_pairs_train_alone_and_such_rounds_neither_count_nor_stall(
    result: SimulationResult, files: list[Path], tmp_path: Path
) -> None:
    """A bundle may be run with any devices; here, one that stalls at once if it counts its losses."""
    tuned = result.manifest.plan.model_copy(update={"self_tuning": SelfTuning(patience=1, min_improvement=0.99)})
    manifest = result.manifest.model_copy(update={"plan": tuned})
    bundle = next(path.parent for path in files[0].parent.parent.glob("run*/bundle/manifest.json"))
    alone = Simulation(manifest, bundle, files[1:], tmp_path, "torch").run()
    assert [(each.stage, each.round) for each in alone.rounds] == [(each.stage, each.round) for each in result.rounds]
    assert {(each.test_accuracy, each.test_examples) for each in alone.rounds} == {(None, 0)}
    assert all(np.isnan(each.train_loss) for each in alone.rounds)
