"""Jobs of every kind of assignment: drawn prefixes, some of the modalities, two views, calibration, teachers, rates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_client.engines import load_engine
from edge_client.job import Job
from edge_client.rows.local_data import LocalData, limits_of
from edge_client.talk.prepare import prepare_job
from edge_client.train.heartbeat import Lease
from edge_client.train.trainer import features
from lamina.encoding.tensors import hash_bytes
from lamina.errors import DataError, EngineError, ProtocolError
from lamina.plans.depth import drawn_prefix
from lamina.plans.model import (
    Contrastive,
    Encoder,
    ModelDescription,
    Projection,
    SelfSupervised,
    SensorWindows,
    Supervised,
    TextTokens,
)
from lamina.plans.plan import Augmentation, Calibration, DepthDropout, FeatureStore, Plan, Training
from lamina.plans.strategies import make_stages
from lamina.wire import Assignment, CheckIn
from tests.edge_client.fake_manifest import Fetched, blob, fake_manifest
from tests.edge_client.tiny import initial_weights, make_data, make_job, run_segments

LAYERS, EXAMPLES, TESTS = 6, 12, 5


def encoder(modality, layers=LAYERS):
    return Encoder(modality=modality, input=SensorWindows(channels=2, samples=8, patch=4), width=4, heads=1, layers=layers)


def make_plan(objective=Supervised(classes=3), modalities=("motion",), rate_scales=None, training=None, **changes):  # noqa: B008
    model = ModelDescription(
        name="m", encoders=tuple(map(encoder, modalities)), projection=Projection(hidden=4, output=3), objective=objective
    )
    stages = make_stages(model, "layerwise", [4] * LAYERS, 0.1, rate_scales=rate_scales)
    return Plan(name="p", model=model, strategy="layerwise", stages=stages, training=training or Training(), **changes)


SSL = {"training": Training(augmentation={"motion": Augmentation(noise=0.1)}, features=FeatureStore(views=4))}


class Bench:
    def __init__(self, folder):
        self.folder, self.fetch = folder, None

    def data(self, names=("motion", "label"), tests=TESTS):
        arrays = {}
        for split, count in (("train", EXAMPLES), ("test", tests)):
            for name in names if count else ():
                is_label = name == "label"
                arrays[f"{split}_{name}"] = np.zeros(count, np.int64) if is_label else np.zeros((count, 2, 8), np.float32)
        path = self.folder / f"{'-'.join(names)}.npz"
        np.savez(path, **arrays)
        return LocalData(path, self.folder / "scratch")

    def job(self, plan, phase="train", stage=0, round=0, data=None, drawn=None, references=(), disk_bytes=None, **more):
        self.manifest = fake_manifest(plan, references)
        here = plan.stages[stage]
        names = [*here.active, *here.frozen] if drawn is None else [*here.active, *drawn]
        weights = {name: self.manifest.initial_weights[name] for name in names}
        self.work = Assignment(
            phase=phase,
            run="run-1",
            manifest=hash_bytes(self.manifest.to_json()),
            stage=stage,
            round=round,
            weights=weights,
            lease_seconds=60,
            upload_encoding="fp32",
            **more,
        )
        data = data or self.data()
        self.fetch = Fetched([f"{name} 0" for name in self.manifest.initial_weights])
        facts = CheckIn(engine="torch", modalities=data.modalities, train_examples=EXAMPLES, test_examples=TESTS)
        made = prepare_job(
            self.work, self.manifest, data, self.fetch, self.folder / "state", "attic", "torch", facts, "", disk_bytes
        )
        (self.folder / "job.json").write_bytes(made.to_json())
        assert Job.read(self.folder / "job.json") == made
        return made


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def segments_of(job, modality="motion"):
    (plan,) = (plan for plan in job.features if plan.modality == modality)
    return [step.segment.name for step in plan.steps]


DROPPING = Training(depth_dropout=DepthDropout(budget=3), features=FeatureStore(keep="round"))


def test_a_device_runs_the_frozen_layers_that_were_drawn_for_it_and_fetches_no_others(bench):
    plan = make_plan(training=DROPPING)
    chain = plan.stages[5].frozen_chain(plan.model, "motion")
    drawn = drawn_prefix(chain, 1, plan.training.depth_dropout, plan.seed, 5, 0, "attic")
    assert len(drawn) == 3
    job = bench.job(plan, stage=5, drawn=drawn)
    assert segments_of(job) == drawn
    assert [name for name in bench.fetch.names if name.removesuffix(" 0") in chain] == [f"{name} 0" for name in drawn]


def test_features_of_another_draw_have_other_keys_and_share_those_of_what_they_share(bench):
    plan = make_plan(training=DROPPING)
    jobs = [
        bench.job(plan, stage=5, drawn=["motion.stem", "motion.layers.0", last])
        for last in ("motion.layers.2", "motion.layers.4")
    ]
    (one,), (two,) = (job.features[0].keys for job in jobs)
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    assert not set(one[2:]) & {key for chain in jobs[1].keep_keys for key in chain}


@pytest.mark.parametrize(("phase", "training"), [("evaluate", DROPPING), ("train", Training())])
def test_where_nothing_is_drawn_an_assignment_must_have_the_whole_prefix(bench, phase, training):
    with pytest.raises(ProtocolError, match=r"no weights of motion\.layers\.1, which features pass"):
        bench.job(make_plan(training=training), phase=phase, stage=3, drawn=["motion.stem", "motion.layers.0"])


@pytest.mark.parametrize("drawn", [[], ["motion.stem"], ["motion.stem", "motion.layers.2"], ["motion.layers.0"]])
def test_stem_and_first_layer_are_never_dropped(bench, drawn):
    with pytest.raises(ProtocolError, match="which features pass"):
        bench.job(make_plan(training=DROPPING), stage=5, drawn=drawn)


def test_a_device_with_a_pool_of_draws_keeps_the_features_of_each_and_of_the_whole_prefix(bench):
    plan = make_plan(training=Training(depth_dropout=DepthDropout(budget=3, pool=2)))
    draws = [["motion.stem", "motion.layers.0", f"motion.layers.{last}"] for last in (2, 4)]
    jobs = [
        bench.job(plan, stage=5, drawn=draws[0]),
        bench.job(plan, "evaluate", stage=5),
        bench.job(plan, stage=5, drawn=draws[1]),
    ]
    kept = set(jobs[2].keep_keys)
    assert {chain for job in jobs for plan_ in job.features for chain in plan_.keys} <= kept
    assert set(bench.job(plan, stage=5, drawn=draws[0]).keep_keys) == kept
    other = set(bench.job(plan, stage=4, drawn=draws[0]).keep_keys)
    assert jobs[1].features[0].keys[0] not in other


def test_a_pool_shares_the_disk_among_its_draws(bench):
    """A row is 32 bytes; 12 rows for training and 5 for tests, and room for one file of 12 more."""
    drawn = ["motion.stem", "motion.layers.0", "motion.layers.1"]
    for pool, rows in ((1, 12 + 5), (3, 3 * 12 + 5)):
        plan = make_plan(training=Training(depth_dropout=DepthDropout(budget=3, pool=pool)))
        assert bench.job(plan, stage=5, drawn=drawn, disk_bytes=32 * (rows + 12)).stored_examples == EXAMPLES
        assert bench.job(plan, stage=5, drawn=drawn, disk_bytes=32 * (rows + 12) - 1).stored_examples < EXAMPLES


def test_a_store_that_keeps_nothing_stores_nothing(bench):
    job = bench.job(make_plan(training=Training(features=FeatureStore(keep="none"))), stage=2)
    assert job.stored_examples == 0
    assert all(step.program.path for step in job.features[0].steps)


@given(rounds=st.integers(0, 6), number=st.integers(0, 8))
def test_the_rate_climbs_in_equal_steps_in_every_stage_but_the_first(tmp_path_factory, rounds, number):
    bench = Bench(tmp_path_factory.mktemp("bench"))
    plan = make_plan(training=Training(warm_up_rounds=rounds))
    expected = 0.1 * (number + 1) / (rounds + 1) if number < rounds else 0.1
    assert bench.job(plan, stage=1, round=number).learning_rate == pytest.approx(expected)
    assert bench.job(plan, stage=0, round=number).learning_rate == 0.1


def test_settings_of_the_round_reach_the_job(bench):
    scales = {"motion": 0.5, "heads": 3.0}
    job = bench.job(make_plan(rate_scales=scales, training=Training(proximal=0.3, keep_optimizer=True)))
    rates = dict(zip([segment.name for segment in job.active], job.rate_scales, strict=True))
    assert rates["motion.stem"] == rates["motion.norm"] == 0.5
    assert rates["motion.projection"] == rates["head"] == 3.0
    assert (job.proximal, job.keep_optimizer) == (0.3, True)
    plain = bench.job(make_plan())
    assert (plain.rate_scales, plain.proximal, plain.keep_optimizer, plain.momentum) == ((), 0.0, False, 0.0)


TWO = ("motion", "sound")
PARTIAL = {"modalities": TWO, "device_modalities": (("motion",),)}


def test_a_partial_job_has_the_segments_programs_and_data_of_its_modalities_alone(bench):
    plan = make_plan(**PARTIAL)
    for phase, role in (("train", "train"), ("evaluate", "eval")):
        job = bench.job(plan, phase, stage=2, modalities=("motion",), data=bench.data())
        assert [segment.name for segment in job.active] == ["motion.layers.2", "motion.norm", "motion.projection", "head"]
        assert job.programs[role].blob == blob(f"{role} 2 ('motion',)")
        assert [plan_.modality for plan_ in job.features] == ["motion"]
        assert not [name for name in bench.fetch.names if name.startswith("sound")]
        assert job.label is not None


def test_a_device_with_all_modalities_has_the_whole_job(bench):
    plan, data = make_plan(**PARTIAL), bench.data(("motion", "sound", "label"))
    whole = bench.job(plan, stage=2, data=data)
    assert whole.programs["train"].blob == blob("train 2")
    assert bench.job(plan, stage=2, data=data, modalities=TWO) == whole


def test_a_set_of_modalities_without_programs_is_refused(bench):
    with pytest.raises(EngineError, match=r"no programs for devices with \['sound'\] alone.*\[\['motion'\]\]"):
        bench.job(make_plan(**PARTIAL), modalities=("sound",), data=bench.data(("sound", "label")))


def test_data_is_checked_for_the_modalities_that_take_part(bench):
    plan, data = make_plan(**PARTIAL), bench.data()
    data.check(plan.model, ("motion",))
    with pytest.raises(DataError, match="no array train_sound"):
        data.check(plan.model)
    with pytest.raises(DataError, match="no array train_label"):
        bench.data(("motion",)).check(plan.model, ("motion",))


LACKING = {
    "objective": Contrastive(temperature=0.3, classes=4),
    "modalities": TWO,
    "device_modalities": (("motion",),),
    "training": SSL["training"].model_copy(update={"batch_size": 16, "micro_batch": 4}),
}


def test_a_device_without_pairs_trains_and_evaluates_two_views_without_labels(bench):
    plan, data = make_plan(**LACKING), bench.data(("motion",))
    data.check(plan.model, ("motion",))
    train = bench.job(plan, stage=1, data=data, modalities=("motion",))
    assert (train.objective, train.label, train.limits) == ("self_supervised", None, {})
    assert [segment.name for segment in train.active] == ["motion.layers.1", "motion.norm", "motion.projection"]
    assert [(each.modality, len(each.keys)) for each in train.features] == [("motion", 4)]
    test = bench.job(plan, "evaluate", stage=1, data=data, modalities=("motion",))
    assert (test.objective, len(test.features[0].keys)) == ("self_supervised", 2)
    assert test.features[0].augmentation == train.features[0].augmentation is not None


def test_a_device_with_pairs_trains_them_as_it_does_where_all_have_both(bench):
    plan, data = make_plan(**LACKING), bench.data(("motion", "sound", "label"))
    train, test = bench.job(plan, stage=1, data=data), bench.job(plan, "evaluate", stage=1, data=data)
    assert (train.objective, train.label is not None, train.limits["label"]) == ("contrastive", True, 4)
    assert {each.modality: len(each.keys) for each in train.features} == {"motion": 4, "sound": 1}
    assert {each.modality: len(each.keys) for each in test.features} == {"motion": 1, "sound": 1}
    assert {role: each.blob for role, each in train.programs.items()} == {
        "embed": blob("eval 1"), "loss": blob("loss"), "backward": blob("train 1"),
    }  # fmt: skip


def test_programs_for_any_modality_take_the_name_of_the_device_s_own(bench):
    views = ["motion", "motion_second"]
    for training, loss in ((LACKING["training"], "view loss"), (SSL["training"], None)):
        plan = make_plan(**(LACKING | {"training": training}))
        job = bench.job(plan, modalities=("motion",), data=bench.data(("motion",)))
        names = {role: [spec.name for spec in program.inputs] for role, program in job.programs.items()}
        assert names == dict.fromkeys(["embed", "loss", "backward"] if loss else ["train"], views)
        assert loss is None or job.programs["loss"].blob == blob(loss)


def test_token_ids_of_a_second_view_have_the_bound_of_the_first():
    plan = make_plan(**LACKING)
    text = Encoder(modality="words", input=TextTokens(vocabulary=9, length=4), width=4, heads=1, layers=1)
    model = plan.model.model_copy(update={"encoders": (plan.model.encoders[0], text)})
    assert limits_of(model.of_device(("words",))) == {"words": 9, "words_second": 9}


def test_self_supervised_data_needs_no_label_and_test_rows_are_augmented_too(bench):
    plan, data = make_plan(SelfSupervised(method="moco", momentum=0.7), **SSL), bench.data(("motion",))
    data.check(plan.model)
    train, test = bench.job(plan, stage=1, data=data), bench.job(plan, "evaluate", stage=1, data=data)
    assert (train.label, train.momentum, train.objective) == (None, 0.7, "self_supervised")
    assert len(train.features[0].keys) == 4
    assert len(test.features[0].keys) == len(set(test.features[0].keys)) == 2
    assert test.features[0].augmentation == train.features[0].augmentation is not None


def test_a_round_needs_what_makes_its_own_versions_and_nothing_for_the_others(bench):
    plan, data = make_plan(SelfSupervised(), **SSL), bench.data(("motion",))
    first = bench.job(plan, stage=1, data=data)  # takes versions 0 and 1 of 4
    Path(first.feature_folder).mkdir(parents=True)
    for version in (0, 1):
        (Path(first.feature_folder) / f"{first.features[0].keys[version][-1]}-00000000.npy").touch()
    again, later = (bench.job(plan, stage=1, data=data, round=number) for number in (2, 1))
    needed = [[bool(step.program.path) for step in job.features[0].steps] for job in (first, again, later)]
    assert needed == [[True, True], [False, False], [True, True]]


def test_other_objectives_leave_test_rows_as_they_are(bench):
    job = bench.job(make_plan(**SSL), "evaluate", stage=1)
    assert (len(job.features[0].keys), job.features[0].augmentation) == (1, None)


def test_contrastive_pairs_with_classes_have_labels(bench):
    data = bench.data(("motion", "sound", "label"))
    job = bench.job(make_plan(Contrastive(classes=4), TWO), data=data)
    assert job.label is not None
    assert job.limits["label"] == 4
    assert bench.job(make_plan(Contrastive(), TWO), data=data).label is None


def test_a_calibration_trains_all_that_is_attached_on_raw_inputs(bench):
    plan = make_plan(
        calibration=Calibration(data="server.npz", epochs=3, learning_rate=0.02),
        rate_scales={"motion": 0.5},
        training=Training(
            features=FeatureStore(keep="round"),
            proximal=1.0,
            keep_optimizer=True,
            warm_up_rounds=2,
            batch_size=16,
            micro_batch=2,
        ),
    )
    job = bench.job(plan, "calibrate", stage=2, round=1)
    assert [segment.name for segment in job.active] == bench.manifest.calibrated(2)
    assert [segment.name for segment in job.active][:4] == ["motion.stem", *(f"motion.layers.{i}" for i in range(3))]
    assert job.programs["train"].blob == blob("calibrate 2")
    assert segments_of(job) == []
    assert job.examples == EXAMPLES
    assert (job.local_epochs, job.learning_rate, job.rate_scales) == (3, 0.02, ())
    assert (job.proximal, job.keep_optimizer, job.trains) == (0.0, False, True)
    assert (job.batch_size, job.micro_batch) == (16, 4)  # its program takes 4


def test_a_calibration_of_a_loss_over_the_batch_has_whole_batches(bench):
    plan = make_plan(
        SelfSupervised(),
        calibration=Calibration(data="server.npz", learning_rate=0.02),
        training=SSL["training"].model_copy(update={"features": FeatureStore(views=2, keep="none"), "batch_size": 16}),
    )
    job = bench.job(plan, "calibrate", stage=1, data=bench.data(("motion",)))
    assert (job.batch_size, job.micro_batch) == (4, 4)
    assert len(job.features[0].keys) == 2


def test_a_plan_without_calibration_has_no_program_for_it(bench):
    with pytest.raises(EngineError, match="no program for 'torch' that calibrates stage 0"):
        bench.job(make_plan(), "calibrate")


def test_a_teacher_is_fetched_as_far_as_the_program_asks_for_it(bench):
    plan = make_plan(Supervised(classes=3, distill=1.0))
    # The active tensors of stage 1: layers.1, norm, projection, head.
    teachers = {name: blob(f"teacher of {name}") for name in ("motion.norm", "motion.projection", "head")}
    references = [("teacher", (1, 3)), ("start", (2,))]
    job = bench.job(plan, stage=1, references=references, teacher_weights=teachers)
    assert [segment.name for segment in job.teacher] == ["motion.norm", "head"]
    assert [segment.path.rpartition("/")[2] for segment in job.teacher] == [teachers["motion.norm"], teachers["head"]]
    assert [(each.kind, each.tensors) for each in job.programs["train"].references] == references
    with pytest.raises(ProtocolError, match=r"no weights of the teacher's motion\.norm"):
        bench.job(plan, stage=1, references=references, teacher_weights={"head": teachers["head"]})
    assert bench.job(plan, stage=1, teacher_weights=teachers).teacher == ()


def test_drawn_features_are_those_of_running_only_those_layers(programs, tmp_path):
    """Real programs: stage 2 of the tiny model, of whose frozen chain stem, layer 0, layer 1 the last was dropped."""
    manifest, blobs = programs.bundle(
        "onnxruntime", depth_dropout=DepthDropout(budget=2), features=FeatureStore(keep="round"), batch_size=8
    )
    data = LocalData(make_data(tmp_path / "data.npz"), tmp_path / "scratch")
    for digest, content in blobs.items():
        (tmp_path / digest).write_bytes(content)
    drawn = ["motion.stem", "motion.layers.0"]
    stage = manifest.plan.stages[2]
    work = Assignment(
        phase="train",
        run="r",
        manifest=hash_bytes(manifest.to_json()),
        stage=2,
        round=0,
        weights={name: manifest.initial_weights[name] for name in (*stage.active, *drawn)},
        lease_seconds=60,
        upload_encoding="fp32",
    )
    facts = CheckIn(engine="onnxruntime", modalities=("motion",), train_examples=21, test_examples=10)
    state = tmp_path / "state"
    job = prepare_job(work, manifest, data, lambda digest: tmp_path / digest, state, "attic", "onnxruntime", facts, "", None)
    inputs = features(job, load_engine("onnxruntime"), print, Lease(make_job(), print))[0]
    rows = torch.from_numpy(data.rows("train", "motion").take(range(21)))
    weights = [torch.from_numpy(value) for name in drawn for value in initial_weights()[name].values()]
    np.testing.assert_allclose(inputs["motion"].take(range(21)), run_segments(drawn, weights, rows)[0], atol=1e-6)
    nothing = replace(job, stored_examples=0, feature_folder=str(tmp_path / "none"))
    computed = features(nothing, load_engine("onnxruntime"), print, Lease(make_job(), print))[0]
    np.testing.assert_allclose(computed["motion"].take(range(21)), inputs["motion"].take(range(21)), atol=1e-6)
    assert not list((tmp_path / "none").glob("*.npy"))
