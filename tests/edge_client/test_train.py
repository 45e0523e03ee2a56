from dataclasses import replace

import numpy as np
import pytest

from edge_client.engines import load_engine
from edge_client.job import Heartbeat
from edge_client.progress import Progress
from edge_client.rows.local_data import LocalData
from edge_client.train.epochs import batches, evaluate, reader, shuffled, shuffler, train_round
from edge_client.train.heartbeat import Lease
from edge_client.train.stage_model import StageModel
from lamina.encoding.tensors import encode
from lamina.errors import DataError, NonFiniteError, RoundClosedError
from tests.edge_client.tiny import initial_weights, make_job, segment_file


@pytest.fixture
def bench(programs, data_file, tmp_path):
    """start(role, micro_batch) -> model with its starting weights; and the inputs of both splits."""
    engine = load_engine("onnxruntime")
    manifest, _ = programs.bundle("onnxruntime")
    active = manifest.plan.stages[0].active
    for name, tensors in initial_weights().items():
        (tmp_path / name).write_bytes(encode(tensors))
    data = LocalData(data_file, tmp_path / "scratch")
    opened = []

    def start(role="train", micro_batch=8):
        model = StageModel(
            "stage 0, round 0",
            [segment_file(name, tmp_path / name) for name in active],
            {role: programs.file(programs.program("onnxruntime", role, list(active)))},
            {"label": 3},
            micro_batch,
            lambda program: engine.load(programs.folder / program.blob, program),
        )
        model.load_weights()
        opened.append(model)
        return model

    yield start, {split: {n: data.rows(split, n) for n in ("motion", "label")} for split in ("train", "test")}
    for model in opened:
        model.close()


JOB = make_job(local_epochs=3)


def train(bench, micro_batch=8, **changes):
    start, inputs = bench
    model = start(micro_batch=micro_batch)
    trained = train_round(model, [inputs["train"]], replace(JOB, **changes), print)
    return trained, model.parameters.copy()


def test_a_round_is_the_same_to_the_bit_when_it_is_trained_again(bench):
    (one, first), (two, second) = train(bench), train(bench)
    np.testing.assert_array_equal(first, second)
    assert one.loss == two.loss
    assert one.num_examples == 21


@pytest.mark.parametrize("change", [{"round": 1}, {"device": "cellar"}, {"seed": 8}, {"stage": 1}])
def test_another_round_device_seed_or_stage_has_another_order(bench, change):
    assert not np.array_equal(train(bench)[1], train(bench, **change)[1])


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(bench, micro_batch):
    start, inputs = bench
    read, indices = reader(inputs["train"]), [20, 3, 5, 7, 11, 0, 1]
    whole, parts = start(), start(micro_batch=micro_batch)
    expected, given = whole.gradients(read, indices), parts.gradients(read, indices)
    np.testing.assert_allclose(parts.gradient, whole.gradient, atol=1e-6)
    assert given[0] == pytest.approx(expected[0], abs=1e-6)
    assert given[1] == expected[1]


def test_training_in_micro_batches_ends_at_the_same_parameters(bench):
    (one, whole), (two, parts) = train(bench), train(bench, micro_batch=3)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert two.loss == pytest.approx(one.loss, abs=1e-5)


def test_a_micro_batch_is_read_when_it_is_needed_and_not_before(bench):
    start, inputs = bench
    sizes = []

    def read(indices):
        sizes.append(len(indices))
        return reader(inputs["train"])(indices)

    start(micro_batch=2).gradients(read, range(7))
    assert sizes == [2, 2, 2, 1]


def test_views_are_taken_in_turn_over_all_epochs_of_the_stage(bench):
    start, inputs = bench
    asked = []

    class Noted:
        def __init__(self, view):
            self.view = view

        def __len__(self):
            return 21

        def take(self, indices):
            asked.append(self.view)
            return inputs["train"]["motion"].take(indices)

    views = [{**inputs["train"], "motion": Noted(view)} for view in range(4)]
    train_round(start(), views, replace(JOB, round=1), print)
    assert list(dict.fromkeys(asked)) == [3, 0, 1]


def test_training_lowers_the_loss_and_raises_the_accuracy_on_test_examples(bench):
    start, inputs = bench
    model, judge = start(), start("eval")
    test = replace(JOB, phase="evaluate", examples=10)
    before = evaluate(judge, inputs["test"], test, print)
    for round in range(8):
        train_round(model, [inputs["train"]], replace(JOB, round=round), print)
    judge.parameters[:] = model.parameters
    after = evaluate(judge, inputs["test"], test, print)
    assert before.num_examples == after.num_examples == 10
    assert after.loss < 0.7 * before.loss
    assert after.correct >= max(before.correct, 8)


def test_evaluation_does_not_depend_on_how_the_examples_fall_into_batches(bench):
    start, inputs = bench
    whole = evaluate(start("eval"), inputs["test"], replace(JOB, examples=10), print)
    parts = evaluate(start("eval", micro_batch=2), inputs["test"], replace(JOB, examples=10, batch_size=3), print)
    assert parts.correct == whole.correct
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)


def test_no_test_examples_are_an_evaluation_of_nothing(bench):
    start, _ = bench
    assert evaluate(start("eval"), {}, replace(JOB, examples=0), print).num_examples == 0


def test_a_gradient_that_is_not_finite_never_reaches_the_parameters(bench):
    start, inputs = bench
    model = start()
    model.parameters[:] = 1e30
    with pytest.raises(NonFiniteError, match="stage 0, round 0"):
        model.gradients(reader(inputs["train"]), range(4))


def test_a_loss_that_no_training_gives_is_an_error_and_no_result(bench):
    """Finite in float32, and still the sign of diverged training or of values that a check should have refused."""
    start, inputs = bench
    for role, compute in (("train", "gradients"), ("eval", "evaluate")):
        model = start(role)
        model.parameters *= 1e5
        with pytest.raises(NonFiniteError, match="beyond 1,000,000: training has diverged"):
            getattr(model, compute)(reader(inputs["train"]), range(4))


def test_every_example_is_seen_once_in_an_epoch():
    seen = [index for batch in batches(shuffled(21, shuffler(JOB)), JOB) for index in batch]
    assert sorted(seen) == list(range(21))


def test_a_contrastive_batch_of_one_is_left_out():
    pair = replace(JOB, objective="contrastive")
    assert [len(batch) for batch in batches(range(17), pair)] == [8, 8]
    assert [len(batch) for batch in batches(range(17), JOB)] == [8, 8, 1]
    assert [len(batch) for batch in batches(range(18), pair)] == [8, 8, 2]


def test_too_few_examples_for_a_contrastive_batch_are_refused(bench):
    start, inputs = bench
    with pytest.raises(DataError, match="needs at least 2"):
        train_round(start(), [inputs["train"]], replace(JOB, objective="contrastive", examples=1), print)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


WORK = make_job(stage=1, round=2, heartbeat=Heartbeat("http://c/v1/check-in", "{}", "", 30.0))
SAME = {"kind": "assignment", "phase": "train", "run": "r", "stage": 1, "round": 2, "lease_seconds": 27.0}


def test_a_lease_is_renewed_after_a_third_of_it_and_not_before():
    clock, asked = Clock(), []
    lease = Lease(WORK, print, lambda heartbeat: asked.append(clock.now) or SAME, clock)
    for clock.now in (0, 9, 10, 11, 18, 19, 27, 28):
        lease.keep()
    assert asked == [10, 19, 28]


@pytest.mark.parametrize("answer", [{"kind": "wait"}, SAME | {"round": 3}, SAME | {"phase": "evaluate"}, SAME | {"run": "q"}])
def test_work_that_is_no_longer_wanted_is_left(answer):
    clock = Clock()
    lease = Lease(WORK, print, lambda heartbeat: answer, clock)
    clock.now = 11
    with pytest.raises(RoundClosedError, match="round 2 of stage 1 went on without this device"):
        lease.keep()


def test_a_coordinator_that_does_not_answer_ends_no_training():
    clock, said = Clock(), []

    def ask(heartbeat):
        raise ConnectionRefusedError("refused")

    lease = Lease(WORK, said.append, ask, clock)
    clock.now = 11
    lease.keep()
    assert said == ["the coordinator did not answer (refused); training goes on"]


def test_progress_is_said_at_most_every_five_seconds():
    clock, said = Clock(), []
    progress = Progress(said.append, "features", 10, clock)
    for clock.now, done in ((1, 1), (4.9, 2), (5, 3), (6, 4), (9.9, 5), (10.5, 6)):
        progress.at(done)
    assert said == ["features: 3 of 10", "features: 6 of 10"]
