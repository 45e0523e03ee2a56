"""Stages that end by themselves: the rule, and that a run decides the same over restarts and whatever devices tell."""

from collections.abc import Sequence
from math import inf, isfinite, nan

import pytest
from coordinator_harness import REPORT, Device, InProcess, make_bundle, problem_of, work_until_finished
from hypothesis import given
from hypothesis import strategies as st

from lamina.bounds import MAX_COUNT, MAX_LOSS
from lamina.federation.losses import MAX_EXAMPLES, mean_by_examples
from lamina.federation.self_tuning import has_stalled
from lamina.plans.plan import Cohort, SelfTuning
from lamina.wire import Assignment, RunStatus, TrainReport

ONE = Cohort(size=1, deadline_seconds=1000, lease_seconds=100)


@pytest.mark.parametrize(
    ("losses", "stalls"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.0], False),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 0.5, 0.6, 0.7], True),
        ([1.0, 0.5, 0.6, 0.4], False),
        ([1.0, 0.995, 0.985], False),  # two small steps are 1.5 % together
        ([1.0, 0.995, 0.992], True),
        ([1.0, 0.99, 0.9801], False),
        ([-1.0, -1.1, -1.2], False),
        ([-1.0, -1.0, -1.005], True),
        ([0.0, 0.0, 0.0], True),
        ([nan, nan], True),
        ([inf, 1.0, 0.5], False),
        ([1.0, nan, -inf], True),
        ([1e308, -1e308, 1.0], False),
    ],
)
def test_a_stage_has_stalled_after_two_rounds_without_one_percent(losses, stalls) -> None:
    assert has_stalled(losses, SelfTuning(patience=2, min_improvement=0.01)) == stalls


numbers = st.lists(st.floats(), max_size=12)
rules = st.builds(SelfTuning, patience=st.integers(1, 4), min_improvement=st.sampled_from([0.0, 0.01, 0.5]))


@given(losses=numbers, rule=rules)
def test_no_stage_ends_within_its_patience_nor_on_its_best_loss(losses, rule) -> None:
    if len(losses) < rule.patience:
        assert not has_stalled(losses, rule)
    best = min((loss for loss in losses if isfinite(loss)), default=0.0)
    if abs(best) < 1e300:
        assert not has_stalled([*losses, best - abs(best) - 1.0], rule)


@given(start=st.floats(1e-3, 1e3), steps=st.integers(1, 30), rule=rules)
def test_a_loss_that_falls_by_more_than_is_asked_never_stalls(start, steps, rule) -> None:
    factor = (1 - rule.min_improvement) * 0.99
    assert not has_stalled([start * factor**step for step in range(steps)], rule)


def test_the_mean_of_losses_is_by_examples_and_hostile_ones_give_nan() -> None:
    assert mean_by_examples([(4.0, 1), (0.0, 3)]) == 1.0
    for hostile in ([], [(1e308, 10)], [(1e308, 10), (-1e308, 10)], [(1.7e308, 1), (1.7e308, 1)], [(1.0, 10**400), (2.0, 1)]):
        assert str(mean_by_examples(hostile)) == "nan"


def tell(coordinator: InProcess, device: Device, losses: Sequence[float], is_disturbed: bool = False) -> RunStatus:
    """The device trains alone, and its report of round r says `losses[r]`; it evaluates to the same."""
    told = iter(losses)
    loss = nan
    while isinstance(work := device.check_in(), Assignment):
        if work.phase == "train":
            loss = next(told)
            answer = device.send(work, report=REPORT.model_copy(update={"loss": loss, "num_examples": 3}))
        else:
            answer = device.evaluate(work, loss=loss)
        assert answer.status_code == 200, answer.text
        if is_disturbed:
            coordinator.restart()
    return coordinator.status()


@pytest.mark.parametrize(("measure", "is_disturbed"), [("train_loss", False), ("test_loss", False), ("test_loss", True)])
def test_a_stage_that_stops_improving_ends_and_the_status_says_so(coordinator, measure, is_disturbed) -> None:
    coordinator.publish(make_bundle(rounds=[8, 3], cohort=ONE, self_tuning={"measure": measure}))
    device = coordinator.join("a", test_examples=4)
    status = tell(coordinator, device, [2.0, 1.0, 0.995, 1.5, 9.0, 8.0, 7.0], is_disturbed)

    rounds = [(row.stage, row.round) for row in status.rounds]
    assert rounds == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    counted = "rounds" if measure == "train_loss" else "evaluated rounds"
    sentence = f"stage 0 ended after 4 of 8 rounds: {measure.replace('_', ' ')} did not improve by 1 % in 2 {counted}"
    assert [row.notes for row in status.rounds] == [(), (), (), (sentence,), (), (), ()]
    assert (status.state, status.stage, status.round, status.detail) == ("finished", 1, 3, "run-1 is finished")


def test_the_status_says_why_while_the_next_stage_runs_and_a_round_that_never_was_is_named(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[8, 3], cohort=ONE, self_tuning={"patience": 1, "min_improvement": 0.0}))
    device = coordinator.join("a")
    for loss in (1.0, 1.0):
        device.send(work := device.work(), report=REPORT.model_copy(update={"loss": loss}))
    following = device.work()
    assert (following.stage, following.round) == (1, 0)
    status = coordinator.status()
    sentence = "stage 0 ended after 2 of 8 rounds: train loss did not improve in 1 rounds"
    assert status.detail.startswith(f"{sentence}; round 0 of stage 1 open for")
    assert sentence in problem_of(device.send(work, round=5), 404, "unknown-name")
    assert "has not started" in problem_of(device.send(following, round=2), 404, "unknown-name")
    assert device.send(work).status_code == 200  # a repeat is still known


def test_a_run_whose_last_stage_ends_early_is_finished_at_the_rounds_that_it_had(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 9], cohort=ONE, self_tuning={"patience": 1}))
    status = tell(coordinator, coordinator.join("a"), [1.0, 1.0, 1.0])
    assert (status.state, status.stage, status.round) == ("finished", 1, 2)
    assert status.detail == (
        "stage 1 ended after 2 of 9 rounds: train loss did not improve by 1 % in 1 rounds; run-1 is finished"
    )


def test_the_round_that_ends_a_stage_by_its_train_loss_is_evaluated(coordinator: InProcess) -> None:
    cohort = ONE.model_copy(update={"evaluate_every": 100})
    coordinator.publish(make_bundle(rounds=[9, 2], cohort=cohort, self_tuning={"patience": 2}))
    status = tell(coordinator, coordinator.join("a", test_examples=4), [1.0, 1.0, 1.0, 5.0, 4.0])
    assert [(row.stage, row.round) for row in status.rounds if row.test_examples] == [(0, 2), (1, 1)]


def test_rounds_that_were_not_evaluated_count_neither_for_nor_against_the_test_loss(coordinator: InProcess) -> None:
    cohort = ONE.model_copy(update={"evaluate_every": 2})
    coordinator.publish(make_bundle(rounds=[9, 0], cohort=cohort, self_tuning={"measure": "test_loss", "patience": 2}))
    status = tell(coordinator, coordinator.join("a", test_examples=4), [1.0] * 9)
    assert len(status.rounds) == 6  # evaluated: 1, 3, 5
    coordinator.publish(make_bundle(rounds=[3, 0], cohort=ONE, self_tuning={"measure": "test_loss"}, seed=1))
    blind = work_until_finished(coordinator, [coordinator.join("b")], "run-2")
    assert len(blind.rounds) == 3


def test_the_losses_of_a_round_are_weighted_by_examples(coordinator: InProcess) -> None:
    """a gets better on few examples, b gets no better on many: together they stall."""
    coordinator.publish(make_bundle(rounds=[5, 0], self_tuning={"patience": 1}))
    a, b = coordinator.join("a"), coordinator.join("b")
    for number in range(2):
        a.check_in(), b.check_in()
        for device, loss, examples in ((a, 1.0 / (1 + number), 1), (b, 1.0, 999)):
            report = REPORT.model_copy(update={"loss": loss, "num_examples": examples})
            assert device.send(device.work(), report=report).status_code == 200
    assert coordinator.status().state == "finished"


@pytest.mark.parametrize("hostile", [MAX_LOSS, -MAX_LOSS])
def test_a_device_that_tells_absurd_losses_stops_nothing_but_its_stage(coordinator: InProcess, hostile: float) -> None:
    coordinator.publish(make_bundle(rounds=[4, 1], cohort=ONE, self_tuning={"patience": 2}))
    device = coordinator.join("liar", test_examples=4)
    for _ in range(20):
        work = device.check_in()
        if not isinstance(work, Assignment):
            break
        report = TrainReport(num_examples=9, loss=hostile, train_seconds=0, peak_bytes=0, bytes_down=0, bytes_up=0)
        done = device.send(work, report=report) if work.phase == "train" else device.evaluate(work, loss=hostile)
        assert done.status_code == 200
    status = coordinator.status()
    assert status.state == "finished"
    assert {row.test_loss for row in status.rounds} == {hostile}


def test_numbers_of_examples_that_nothing_can_hold_are_refused(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1], cohort=ONE))
    device = coordinator.join("boaster", test_examples=MAX_COUNT)
    work = device.work()
    report = REPORT.model_copy(update={"num_examples": MAX_EXAMPLES + 1})
    assert "examples cannot be" in problem_of(device.send(work, report=report), 409, "update-rejected")
    assert device.send(work, report=REPORT.model_copy(update={"num_examples": MAX_EXAMPLES})).status_code == 200
    asked = device.work()
    answer = device.evaluate(asked, correct=1, num_examples=MAX_EXAMPLES + 1)
    assert "examples cannot be" in problem_of(answer, 409, "update-rejected")
    assert coordinator.status().rounds[0].test_loss is None
