"""What a round does beyond plain local epochs: learning rates of segments, FedProx, two views, kept moments."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.train.epochs import batches, epoch_inputs, fresh_optimizer, train_round
from edge_client.train.heartbeat import Lease
from edge_client.train.optimizers import make_optimizer
from edge_client.train.trainer import work
from lamina.errors import DataError, DiskFullError
from lamina.names import second_view
from lamina.plans.plan import SGD, AdamW
from tests.edge_client.quadratic import COUNTS, SEGMENTS, Numbers, flat, job, start, weights
from tests.edge_client.test_optimizers import SETTINGS
from tests.edge_client.tiny import make_job

JOB = make_job()
VIEWS = [{"x": Numbers(np.linspace(-1, 2, 16))}]


def do_round(folder, made, references=(), say=print):
    """The parameters after one round of a job that starts from the same weights each time."""
    model, engine = start(folder, references, keep_start=made.proximal > 0)
    result = work(model, VIEWS, made, say, Lease(made, say))
    return model.parameters, engine, result


@settings(max_examples=40)
@given(
    chosen=st.sampled_from(SETTINGS),
    factors=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    rate=st.floats(1e-4, 0.05),
    seed=st.integers(0, 2**31),
)
def test_groups_are_the_parameter_groups_of_torch(chosen, factors, rate, seed):
    sizes = [5, (1 << 15) + 3, 40]
    random = np.random.default_rng(seed)
    ours = random.normal(size=sum(sizes)).astype(np.float32)
    parts = [torch.nn.Parameter(torch.from_numpy(part.copy())) for part in np.split(ours, np.cumsum(sizes)[:-1])]
    groups = [{"params": [part], "lr": rate * factor} for part, factor in zip(parts, factors, strict=True)]
    options = chosen.model_dump()
    if isinstance(chosen, SGD):
        theirs = torch.optim.SGD(groups, rate, momentum=options["momentum"], weight_decay=options["weight_decay"])
    else:
        betas = (options["beta1"], options["beta2"])
        theirs = torch.optim.AdamW(groups, rate, betas=betas, eps=options["eps"], weight_decay=options["weight_decay"])
    optimizer = make_optimizer(options, sum(sizes), rate, list(zip(sizes, factors, strict=True)))
    for _ in range(5):
        gradient = random.normal(size=sum(sizes)).astype(np.float32)
        for part, values in zip(parts, np.split(gradient, np.cumsum(sizes)[:-1]), strict=True):
            part.grad = torch.from_numpy(values.copy())
        theirs.step()
        optimizer.step(ours, gradient)
    np.testing.assert_allclose(ours, np.concatenate([part.detach().numpy() for part in parts]), rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_cover_the_vector_are_refused():
    with pytest.raises(ValueError, match="do not make up 7 parameters"):
        make_optimizer(SGD().model_dump(), 7, 0.1, [(3, 1.0), (3, 2.0)])


def test_the_scales_of_a_job_are_those_of_its_segments(tmp_path):
    made = job(tmp_path, optimizer=SGD().model_dump(), learning_rate=0.5, rate_scales=(0.1, 2.0))
    values = np.zeros(sum(COUNTS), np.float32)
    fresh_optimizer(made, values.size).step(values, np.ones_like(values))
    first = sum(int(np.prod(shape)) for shape in SEGMENTS["part.0"].values())
    np.testing.assert_allclose(values[:first], -0.05)
    np.testing.assert_allclose(values[first:], -1.0)


def test_a_step_with_the_proximal_term_is_a_step_with_its_gradient(tmp_path):
    """Two batches: in the first step the term is 0, in the second it pulls back."""
    made = job(tmp_path, optimizer=SGD().model_dump(), learning_rate=0.1, proximal=0.7)
    given_, engine, _ = do_round(tmp_path, made)
    origin = flat(weights()).astype(np.float64)
    w = origin.copy()
    for arrays in engine.given:
        w -= 0.1 * (w - arrays[-1].mean() + 0.7 * (w - origin))
    assert len(engine.given) == 2
    np.testing.assert_allclose(given_, w, atol=1e-5)


def test_the_momentum_copy_follows_after_every_step(tmp_path):
    made = job(tmp_path, optimizer=SGD().model_dump(), learning_rate=0.1, momentum=0.8)
    _, engine, _ = do_round(tmp_path, made, [("momentum", [0])])
    (_, *_, first, _), (w, *_, second, _) = engine.given
    np.testing.assert_array_equal(first, weights()["part.0"]["w"])
    np.testing.assert_allclose(second, 0.8 * first + 0.2 * w, rtol=1e-6)


def test_epochs_of_a_stage_take_pairs_of_views_in_turn():
    views = [{"x": number} for number in range(6)]
    made = replace(JOB, objective="self_supervised")
    seen = [tuple(epoch_inputs(views, made, epoch).values()) for epoch in range(5)]
    assert seen == [(0, 1), (2, 3), (4, 5), (0, 1), (2, 3)]
    assert list(epoch_inputs(views, made, 0)) == ["x", second_view("x")]
    assert [epoch_inputs(views, JOB, epoch)["x"] for epoch in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_rounds_go_on_with_the_views_where_the_last_one_ended(tmp_path):
    asked = []

    class Noted(Numbers):
        def __init__(self, view):
            super().__init__(np.zeros(16))
            self.view = view

        def take(self, indices):
            asked.append(self.view)
            return super().take(indices)

    views = [{"x": Noted(view)} for view in range(4)]
    model, _ = start(tmp_path, second=True)
    train_round(model, views, job(tmp_path, objective="self_supervised", round=1, local_epochs=3), print)
    assert list(dict.fromkeys(zip(asked[::2], asked[1::2], strict=True))) == [(2, 3), (0, 1)]
    assert [*zip(asked[::2], asked[1::2], strict=True)] == [(2, 3)] * 2 + [(0, 1)] * 2 + [(2, 3)] * 2


def test_a_self_supervised_batch_of_one_is_left_out_and_one_example_refused(tmp_path):
    made = job(tmp_path, objective="self_supervised", examples=1)
    assert [len(batch) for batch in batches(range(17), made)] == [8, 8]
    model, _ = start(tmp_path)
    with pytest.raises(DataError, match="the self-supervised objective needs at least 2"):
        train_round(model, VIEWS, made, print)


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(momentum=0.9)], ids=repr)
def test_kept_moments_make_two_rounds_one_run_of_the_optimizer(tmp_path, optimizer):
    """Two rounds of the device, the second from where the first ended, are one optimiser of torch over all batches."""
    made = job(tmp_path, optimizer=optimizer.model_dump(), learning_rate=0.01, keep_optimizer=True)
    first, engine, _ = do_round(tmp_path, made)
    model, again = start(tmp_path)
    model.parameters[:] = first
    work(model, VIEWS, replace(made, round=1), print, Lease(made, print))
    theirs = torch.nn.Parameter(torch.from_numpy(flat(weights())))
    reference = (
        torch.optim.AdamW([theirs], 0.01) if optimizer.kind == "adamw" else torch.optim.SGD([theirs], 0.01, momentum=0.9)
    )
    for arrays in (*engine.given, *again.given):
        theirs.grad = theirs.detach() - float(arrays[-1].mean(dtype=np.float32))
        reference.step()
    np.testing.assert_allclose(model.parameters, theirs.detach().numpy(), atol=2e-6)
    fresh = start(tmp_path)[0]
    fresh.parameters[:] = first
    work(fresh, VIEWS, replace(made, round=1, keep_optimizer=False), print, Lease(made, print))
    assert np.abs(fresh.parameters - model.parameters).max() > 1e-4


KEEPING = {"keep_optimizer": True, "optimizer": AdamW().model_dump(), "learning_rate": 0.01}
OWN = [("previous", [1, 2])]


def kept_files(folder):
    return sorted(path.name for path in (folder / "kept").iterdir())


def test_a_round_that_is_trained_again_starts_from_the_same_state(tmp_path):
    made = job(tmp_path, **KEEPING)
    do_round(tmp_path, made, OWN)
    once, _, _ = do_round(tmp_path, replace(made, round=1), OWN)
    left = kept_files(tmp_path)
    # Its own file is there, as if the process had been killed before the outcome was written; and one that was not finished.
    (tmp_path / "kept" / "unfinished.partial").write_bytes(b"half")
    twice, _, _ = do_round(tmp_path, replace(made, round=1), OWN)
    np.testing.assert_array_equal(once, twice)
    assert kept_files(tmp_path) == left
    assert len(left) == 2


def test_a_process_that_dies_while_it_writes_its_state_changes_nothing(tmp_path, monkeypatch):
    made = job(tmp_path, **KEEPING)
    do_round(tmp_path, made, OWN)
    before = kept_files(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("edge_client.train.kept.move_durably", full)
        with pytest.raises(DiskFullError):
            do_round(tmp_path, replace(made, round=1), OWN)
    assert kept_files(tmp_path) == before


def test_previous_is_the_start_at_first_and_then_what_this_device_ended_with(tmp_path):
    made = job(tmp_path, optimizer=SGD().model_dump(), learning_rate=0.1)
    ended, engine, _ = do_round(tmp_path, made, OWN)
    np.testing.assert_array_equal(engine.given[0][3], weights()["part.0"]["v"])
    _, engine, _ = do_round(tmp_path, replace(made, round=3), OWN)
    np.testing.assert_array_equal(engine.given[0][3].reshape(-1), ended[3:7])
    np.testing.assert_array_equal(engine.given[1][4], ended[7:])


def test_a_damaged_file_is_said_and_is_a_fresh_start(tmp_path):
    made, said = job(tmp_path, **KEEPING), []
    do_round(tmp_path, made)
    (path,) = (tmp_path / "kept").iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    damaged, _, _ = do_round(tmp_path, replace(made, round=1), say=said.append)
    fresh, _, _ = do_round(tmp_path, replace(made, round=1, kept_folder=""))
    np.testing.assert_array_equal(damaged, fresh)
    assert said == [f"the state kept from the last round is damaged ({path.name}); starting afresh"]


def test_a_file_of_other_settings_is_a_fresh_start(tmp_path):
    made, said = job(tmp_path, **KEEPING), []
    do_round(tmp_path, made)
    changed = replace(made, round=1, optimizer=AdamW(beta1=0.5).model_dump())
    foreign, _, _ = do_round(tmp_path, changed, say=said.append)
    fresh, _, _ = do_round(tmp_path, replace(changed, kept_folder=""))
    np.testing.assert_array_equal(foreign, fresh)
    assert "of another model or setting" in said[0]


@pytest.mark.parametrize("change", [{"stage": 1}, {"run": "q"}, {"keep_optimizer": False}], ids=repr)
def test_another_stage_or_run_deletes_what_was_kept(tmp_path, change):
    made = job(tmp_path, **KEEPING)
    do_round(tmp_path, made)
    before = kept_files(tmp_path)
    given_, _, _ = do_round(tmp_path, replace(made, round=1, **change))
    fresh, _, _ = do_round(tmp_path, replace(made, round=1, kept_folder="", **change))
    np.testing.assert_array_equal(given_, fresh)
    assert not set(before) & set(kept_files(tmp_path))


def test_files_of_long_gone_rounds_are_deleted(tmp_path):
    made = job(tmp_path, **KEEPING)
    for number in (0, 2, 5, 12):
        do_round(tmp_path, replace(made, round=number))
    assert [name.split("-")[2] for name in kept_files(tmp_path)] == ["12", "5"]


def test_a_plan_that_keeps_nothing_leaves_no_folder(tmp_path):
    do_round(tmp_path, job(tmp_path))
    assert not (tmp_path / "kept").exists()
