"""Self-supervised rounds with programs of the real exporter, through the device's own prepare and trainer.

Slow where the program cache is empty: three programs are lowered.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_client.engines import load_engine
from edge_client.process.outcome import UPDATE
from edge_client.process.supervisor import OUTCOME
from edge_client.rows.local_data import LocalData
from edge_client.talk.prepare import prepare_job
from edge_client.train.heartbeat import Lease
from edge_client.train.trainer import do_job, features, stage_model, work
from export.build import export_bundle
from lamina.bundles.bundle import blob_path
from lamina.encoding.tensors import decode_file, hash_bytes
from lamina.plans.model import Encoder, ModelDescription, Projection, SelfSupervised, SensorWindows
from lamina.plans.plan import SGD, Augmentation, FeatureStore, Plan, Training
from lamina.plans.strategies import make_stages
from lamina.wire import Assignment, CheckIn

OBJECTIVES = {
    "simclr": SelfSupervised(predictor_hidden=8),
    "moco": SelfSupervised(method="moco", momentum=0.9, predictor_hidden=8, moon=0.1),
    "byol": SelfSupervised(method="byol", momentum=0.9, predictor_hidden=8),
}
WITHOUT_MOON = SelfSupervised(method="moco", momentum=0.9, predictor_hidden=8)


def make_plan(method, micro_batch):
    encoder = Encoder(modality="motion", input=SensorWindows(channels=2, samples=8, patch=4), width=8, heads=2, layers=1)
    model = ModelDescription(
        name="m", encoders=(encoder,), projection=Projection(hidden=8, output=8), objective=OBJECTIVES[method]
    )
    training = Training(
        batch_size=8,
        micro_batch=micro_batch,
        local_epochs=4,
        optimizer=SGD(momentum=0.9),
        augmentation={"motion": Augmentation(noise=0.2, shift=1)},
        features=FeatureStore(views=4),
    )
    stages = make_stages(model, "layerwise", [8], 0.1)
    return Plan(name="p", model=model, strategy="layerwise", stages=stages, training=training)


def examples(count, seed):
    """Waves that differ in what augmentation leaves alone: the level and the size of each channel."""
    random = np.random.default_rng(seed)
    level, size = random.normal(size=(2, count, 2, 1)) * 2
    return (level + size * np.sin(np.arange(8))).astype(np.float32)


class House:
    """A device with 24 examples, in one process, and what it is asked for."""

    def __init__(self, method, micro_batch, folder, cache):
        self.folder, self.engine = folder, load_engine("torch")
        self.manifest = export_bundle(make_plan(method, micro_batch), folder / "bundle", ("torch",), cache=cache)
        arrays = {f"{split}_motion": examples(count, seed) for seed, (split, count) in enumerate((("train", 24), ("test", 9)))}
        np.savez(folder / "data.npz", **arrays)
        self.data = LocalData(folder / "data.npz", folder / "scratch")
        self.parameters = None

    def job(self, phase="train", round=0, state="state"):
        names = self.manifest.plan.stages[0].active
        assignment = Assignment(
            phase=phase,
            run="r",
            manifest=hash_bytes(self.manifest.to_json()),
            stage=0,
            round=round,
            weights={name: self.manifest.initial_weights[name] for name in names},
            lease_seconds=60,
            upload_encoding="fp32",
        )
        facts = CheckIn(engine="torch", modalities=("motion",), train_examples=24, test_examples=9)
        fetch = lambda digest: blob_path(self.folder / "bundle", digest)  # noqa: E731
        place = self.folder / state
        job = prepare_job(assignment, self.manifest, self.data, fetch, place, "attic", "torch", facts, "", None)
        Path(job.work_folder).mkdir(parents=True, exist_ok=True)
        return replace(job, heartbeat=None)

    def run(self, job):
        """A job from the parameters that the last round ended with."""
        lease = Lease(job, print)
        views = features(job, self.engine, print, lease)
        model = stage_model(job, self.engine)
        if self.parameters is not None:
            model.parameters[:] = self.parameters
            model.follow(0.0)  # a momentum copy begins as these
        result = work(model, views, job, print, lease)
        model.close()
        if job.phase == "train":
            self.parameters = model.parameters.copy()
        return result, model


@pytest.fixture(scope="module")
def houses(tmp_path_factory, program_cache):
    made = {}

    def house(method, micro_batch=None):
        key = (method, micro_batch)
        if key not in made:
            made[key] = House(method, micro_batch, tmp_path_factory.mktemp(method.replace(" ", "_")), program_cache)
        return made[key]

    return house


@pytest.mark.slow
@pytest.mark.parametrize("method", OBJECTIVES)
def test_rounds_lower_the_loss_in_training_and_on_test_views(houses, method):
    house = houses(method)
    house.parameters = None
    before, _ = house.run(house.job("evaluate"))
    losses = [house.run(house.job(round=number))[0].loss for number in range(8)]
    after, _ = house.run(house.job("evaluate"))
    assert before.num_examples == 8  # one of nine is left over, and has nothing to be told apart from
    assert losses[-1] < 0.95 * losses[0]
    assert after.loss < before.loss
    assert 0 <= after.correct <= after.num_examples


@pytest.mark.parametrize("method", [*OBJECTIVES])
def test_micro_batches_train_and_judge_as_the_whole_batch_does(houses, method, monkeypatch):
    """8 samples in pieces of 3, the last one shorter; the momentum copy follows after each step."""
    monkeypatch.setitem(OBJECTIVES, "plain moco", WITHOUT_MOON)
    method = "plain moco" if method == "moco" else method
    whole, pieces = houses(method), houses(method, 3)
    assert set(pieces.job().programs) == {"embed", "loss", "backward"}
    for house in (whole, pieces):
        house.parameters = None
    expected, found = (house.run(house.job())[0] for house in (whole, pieces))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(pieces.parameters, whole.parameters, atol=1e-5)
    expected, found = (house.run(house.job("evaluate"))[0] for house in (whole, pieces))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5) and found.correct == expected.correct


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_device_holds_the_references_of_its_method_and_no_others(houses, method):
    house = houses(method)
    held = {"simclr": set(), "moco": {"momentum", "start", "previous"}, "byol": {"momentum"}}
    _, model = house.run(house.job())
    assert set(model._copies) == held[method]
    tensors = {spec.name for spec in house.manifest.exchange_specs(0) if "predictor" not in spec.name}
    count = sum(spec.count for spec in house.manifest.exchange_specs(0) if spec.name in tensors)
    assert all(copy.values.size == count for copy in model._copies.values())
    assert not model.previous or list((house.folder / "state" / "kept").iterdir())


def test_the_first_step_is_that_of_its_own_copies(houses):
    """Before the first step the momentum copy, the start and the previous model are the weights themselves."""
    house = houses("moco")
    job = house.job(state="fresh")
    model = stage_model(job, house.engine)
    for copy in model._copies.values():
        np.testing.assert_array_equal(copy.values, np.concatenate(copy.originals()))


@pytest.mark.slow
def test_a_killed_round_is_trained_again_to_the_same_bits(houses, tmp_path):
    """Also with the state of the round before it, and its own state already written."""
    house = houses("moco")

    def update(number):
        job = house.job(round=number, state="again")
        do_job(job, print, Lease(job, print))
        folder = Path(job.work_folder)
        assert json.loads((folder / OUTCOME).read_bytes())["kind"] == "trained"
        return (folder / UPDATE).read_bytes()

    update(0)
    once = update(1)
    assert update(1) == once
    assert update(0) != once
    (tmp_path / "update").write_bytes(once)
    difference = decode_file(str(tmp_path / "update"), house.manifest.exchange_specs(0))
    assert max(np.abs(value).max() for value in difference.values()) > 1e-3
