import numpy as np
import pytest

from edge_client.data import LocalData
from edge_client.engines import load_engine
from edge_client.lease import Lease
from edge_client.progress import Progress
from edge_client.stage_model import StageModel
from edge_client.train import batches, evaluate, shuffler, train_round
from lamina.errors import DataError, RoundClosedError
from lamina.model import Contrastive
from lamina.plan import SGD
from lamina.tensors import encode
from lamina.wire import Assignment, Wait
from tests.edge_client.tiny import initial_weights


@pytest.fixture
def bench(programs, data_file, tmp_path):
    """Plan, model with its starting weights, and inputs."""
    manifest, _ = programs.bundle("onnxruntime", local_epochs=3, optimizer=SGD(momentum=0.9))
    engine = load_engine("onnxruntime")
    for name, tensors in initial_weights().items():
        (tmp_path / name).write_bytes(encode(tensors))
    model = StageModel(manifest, 0, "onnxruntime", lambda program: engine.load(programs.path(program), program))
    data = LocalData(data_file, tmp_path / "scratch")

    def start():
        model.load_weights(lambda name: tmp_path / name, {name: name for name in initial_weights()})
        return model

    yield manifest.plan, start, {split: {n: data.rows(split, n) for n in ("motion", "label")} for split in ("train", "test")}
    model.close()


def train(bench, round=0, device="attic"):
    plan, start, inputs = bench
    model = start()
    trained = train_round(model, inputs["train"], plan, 0, round, device, print)
    return trained, model.parameters.copy()


def test_a_round_is_the_same_to_the_bit_when_it_is_trained_again(bench):
    (one, first), (two, second) = train(bench), train(bench)
    np.testing.assert_array_equal(first, second)
    assert one.loss == two.loss
    assert one.num_examples == 21


@pytest.mark.parametrize("change", [{"round": 1}, {"device": "cellar"}])
def test_another_round_or_device_has_another_order(bench, change):
    assert not np.array_equal(train(bench)[1], train(bench, **change)[1])


def test_training_lowers_the_loss_and_raises_the_accuracy_on_test_examples(bench):
    plan, start, inputs = bench
    model = start()
    before = evaluate(model, inputs["test"], plan, print)
    for round in range(8):
        train_round(model, inputs["train"], plan, 0, round, "attic", print)
    after = evaluate(model, inputs["test"], plan, print)
    assert before.num_examples == after.num_examples == 10
    assert after.loss < 0.7 * before.loss
    assert after.correct >= max(before.correct, 8)


def test_evaluation_does_not_depend_on_how_the_examples_fall_into_batches(bench):
    plan, start, inputs = bench
    model = start()
    whole = evaluate(model, inputs["test"], plan, print)
    small = plan.model_copy(update={"training": plan.training.model_copy(update={"batch_size": 3})})
    parts = evaluate(model, inputs["test"], small, print)
    assert parts.correct == whole.correct
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)


def test_no_test_examples_are_an_evaluation_of_nothing(bench):
    plan, start, _ = bench
    assert evaluate(start(), {}, plan, print).num_examples == 0


def test_every_example_is_seen_once_in_an_epoch(bench):
    plan, _, _ = bench
    order = shuffler(7, 0, 0, "attic").permutation(21)
    seen = np.concatenate(list(batches(order, 8, plan)))
    assert sorted(seen.tolist()) == list(range(21))


def test_a_contrastive_batch_of_one_is_left_out(bench):
    plan, _, _ = bench
    pair = plan.model_copy(update={"model": plan.model.model_copy(update={"objective": Contrastive()})})
    assert [len(batch) for batch in batches(np.arange(17), 8, pair)] == [8, 8]
    assert [len(batch) for batch in batches(np.arange(17), 8, plan)] == [8, 8, 1]
    assert [len(batch) for batch in batches(np.arange(18), 8, pair)] == [8, 8, 2]


def test_too_few_examples_for_a_contrastive_batch_are_refused(bench):
    plan, start, _ = bench
    pair = plan.model_copy(update={"model": plan.model.model_copy(update={"objective": Contrastive()})})

    class One:
        def __len__(self):
            return 1

    with pytest.raises(DataError, match="needs at least 2"):
        train_round(start(), {"motion": One()}, pair, 0, 0, "attic", print)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


WORK = Assignment(
    phase="train", run="r", manifest="0" * 64, stage=1, round=2, weights={}, lease_seconds=30, upload_encoding="fp32"
)


def test_a_lease_is_renewed_after_a_third_of_it_and_not_before():
    clock, asked = Clock(), []
    lease = Lease(WORK, lambda: asked.append(clock.now) or WORK.model_copy(update={"lease_seconds": 27.0}), clock)
    for clock.now in (0, 9, 10, 11, 18, 19, 27, 28):
        lease.keep()
    assert asked == [10, 19, 28]


@pytest.mark.parametrize(
    "answer",
    [
        Wait(reason="round", detail="full", wait_seconds_min=1, wait_seconds_max=1),
        WORK.model_copy(update={"round": 3}),
        WORK.model_copy(update={"phase": "evaluate"}),
    ],
)
def test_work_that_is_no_longer_wanted_is_left(answer):
    clock = Clock()
    lease = Lease(WORK, lambda: answer, clock)
    clock.now = 11
    with pytest.raises(RoundClosedError, match="round 2 of stage 1 went on without this device"):
        lease.keep()


def test_progress_is_said_at_most_every_five_seconds():
    clock, said = Clock(), []
    progress = Progress(said.append, "features", 10, clock)
    for clock.now, done in ((1, 1), (4.9, 2), (5, 3), (6, 4), (9.9, 5), (10.5, 6)):
        progress.at(done)
    assert said == ["features: 3 of 10", "features: 6 of 10"]
