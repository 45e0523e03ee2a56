"""How a run goes: cohort, places, leases, deadline, evaluation, stages. The clock moves only where a test moves it."""

from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import (
    REPORT,
    FakeClock,
    InProcess,
    difference_of,
    make_bundle,
    problem_of,
    tensors_of,
    work_until_finished,
)

from lamina.plans.plan import Cohort
from lamina.wire import Assignment, Refused, RunStatus


def test_a_run_goes_through_all_stages_and_rounds(coordinator: InProcess) -> None:
    bundle = make_bundle(rounds=[2, 1])
    coordinator.publish(bundle)
    devices = [coordinator.join(name, test_examples=4) for name in ("a", "b")]

    status = work_until_finished(coordinator, devices)

    assert [(row.stage, row.round, row.state) for row in status.rounds] == [
        (0, 0, "closed"),
        (0, 1, "closed"),
        (1, 0, "closed"),
    ]
    assert [len(row.updates) for row in status.rounds] == [2, 2, 2]
    assert [row.test_accuracy for row in status.rounds] == [0.75, 0.75, 0.75]
    assert devices[0].wait().reason == "no_run"


def test_new_weights_are_the_weighted_mean_and_frozen_ones_stay_as_they_are(coordinator: InProcess, tmp_path: Path) -> None:
    bundle = make_bundle(rounds=[1, 1])
    coordinator.publish(bundle)
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in(), b.check_in()
    for device, num_examples in ((a, 10), (b, 30)):
        device.send(device.work(), report=REPORT.model_copy(update={"num_examples": num_examples}))
    after_first = coordinator.status().weights
    a.check_in()
    stage_1 = b.work()

    specs = bundle.manifest.exchange_specs(0)
    differences = {name: difference_of(name, specs, 0, 0) for name in ("a", "b")}
    for name in bundle.manifest.plan.stages[0].active:
        segment = bundle.manifest.segment(name)
        start = tensors_of(bundle.blobs[bundle.manifest.initial_weights[name]], segment.tensors, tmp_path)
        new = tensors_of(coordinator.blob(after_first[name]), segment.tensors, tmp_path)
        for tensor in start:
            key = f"{name}/{tensor}"
            mean = (10 * differences["a"][key].astype(np.float64) + 30 * differences["b"][key]) / 40
            np.testing.assert_allclose(new[tensor], start[tensor] + mean, rtol=1e-6)
    later = {name for name in bundle.manifest.initial_weights if name not in bundle.manifest.plan.stages[0].active}
    assert {name: after_first[name] for name in later} == {name: bundle.manifest.initial_weights[name] for name in later}
    assert set(stage_1.weights) == set(bundle.manifest.plan.stages[1].frozen) | set(bundle.manifest.plan.stages[1].active)
    assert all(stage_1.weights[name] == after_first[name] for name in stage_1.weights)


def test_a_stage_with_no_rounds_is_passed_at_once_with_its_weights_unchanged(coordinator: InProcess) -> None:
    bundle = make_bundle(rounds=[0, 1, 0], layers=3)
    coordinator.publish(bundle)
    a, b = coordinator.join("a"), coordinator.join("b")

    a.check_in()
    assignment = b.work()
    assert (assignment.stage, assignment.round) == (1, 0)
    assert assignment.weights["motion.stem"] == bundle.manifest.initial_weights["motion.stem"]

    status = work_until_finished(coordinator, [a, b])
    assert [(row.stage, row.round) for row in status.rounds] == [(1, 0)]
    assert status.weights["motion.layers.2"] == bundle.manifest.initial_weights["motion.layers.2"]
    assert status.weights["motion.layers.1"] != bundle.manifest.initial_weights["motion.layers.1"]


def test_nothing_starts_before_the_cohort_is_here(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=3, lease_seconds=100)))
    a, b, c = (coordinator.join(name) for name in "abc")
    a.check_in(), a.check_in()
    clock.jump(7)

    wait = b.wait()
    assert wait.reason == "cohort"
    assert "2 of 3 devices are here" in wait.detail and "since 7 s" in wait.detail
    assert (wait.wait_seconds_min, wait.wait_seconds_max) == (0.5, 2.0)
    assert isinstance(c.check_in(), Assignment)


def test_a_device_that_left_does_not_count_for_the_cohort(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in()
    clock.jump(61)  # presence_seconds is 60

    assert b.wait().reason == "cohort"
    assert isinstance(a.check_in(), Assignment)


def test_presence_seconds_says_how_long_a_silent_device_counts_as_here(make_coordinator) -> None:
    coordinator = make_coordinator("patient", presence_seconds=600)
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in()
    coordinator.clock.jump(300)
    assert isinstance(b.check_in(), Assignment)


def test_asking_again_gives_the_same_work_and_renews_the_lease(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, lease_seconds=100)))
    a, b = coordinator.join("a"), coordinator.join("b")
    first = a.work()
    clock.jump(90)
    assert a.work() == first
    clock.jump(90)  # the first lease is over by now, the renewed one is not

    assert b.wait().reason == "round"
    assert a.send(first).status_code == 200


def test_a_full_round_tells_what_it_waits_for(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle())
    a, b, c = (coordinator.join(name) for name in "abc")
    a.check_in()
    b.check_in()
    a.send(a.work())
    clock.jump(41)

    wait = c.wait()
    assert wait.reason == "round"
    assert wait.detail == (
        "round 0 of stage 0 open for 41 s: 1 of 2 updates, the next lease ends in 59 s, "
        "it closes in 959 s if 1 updates are there"
    )
    assert a.wait().detail == wait.detail  # a device that has sent its update waits like the others
    assert coordinator.status().detail == wait.detail


def test_a_place_whose_lease_is_over_goes_to_another_device(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, lease_seconds=100)))
    slow, other = coordinator.join("slow"), coordinator.join("other")
    old = slow.work()
    clock.jump(101)

    taken = other.work()
    assert (taken.stage, taken.round) == (old.stage, old.round)
    assert "another one has its place" in problem_of(slow.send(old), 409, "round-closed")
    assert slow.wait().reason == "round"
    assert other.send(taken).status_code == 200
    assert [update.device for update in coordinator.status().rounds[0].updates] == ["other"]


def test_a_late_update_counts_while_nobody_has_the_place(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, lease_seconds=100)))
    slow = coordinator.join("slow")
    old = slow.work()
    clock.jump(500)

    assert slow.send(old).status_code == 200
    assert [update.device for update in coordinator.status().rounds[0].updates] == ["slow"]


def test_a_device_that_lost_its_place_may_get_another_one(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, lease_seconds=100)))
    a, b = coordinator.join("a"), coordinator.join("b")
    a.work()
    clock.jump(101)
    b.work()
    clock.jump(101)

    again = a.work()
    assert a.send(again).status_code == 200


def test_a_place_whose_update_has_come_is_never_given_away(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle())
    a, b, c = (coordinator.join(name) for name in "abc")
    a.check_in()
    b.work()
    a.send(a.work())
    clock.jump(60)
    b.work()
    clock.jump(60)  # a's lease is over, b's is not

    assert c.wait().reason == "round"


def test_a_round_closes_at_the_deadline_with_enough_updates(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=3, min_updates=2, deadline_seconds=1000, lease_seconds=100)))
    a, b, c = (coordinator.join(name) for name in "abc")
    for device in (a, b, c):
        device.check_in()
    late = c.work()
    a.send(a.work())
    clock.jump(1001)
    assert coordinator.status().rounds[0].state == "training"  # one update is not enough

    b.send(b.work())
    assert coordinator.status().rounds[0].state == "closed"
    problem_of(c.send(late), 409, "round-closed")
    assert [update.device for update in coordinator.status().rounds[0].updates] == ["a", "b"]


def test_a_deadline_that_passed_unseen_closes_the_round_for_updates(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in()
    late = b.work()
    a.send(a.work())
    clock.jump(1001)

    problem_of(b.send(late), 409, "round-closed")
    assert coordinator.status().rounds[0].state in ("training", "closed")  # the look itself starts the aggregation
    assert coordinator.status().rounds[0].state == "closed"


def test_devices_with_test_data_evaluate_the_new_weights(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1]))
    a, b = coordinator.join("a", test_examples=4), coordinator.join("b", test_examples=0)
    a.check_in(), b.check_in()
    started = a.work()
    a.send(started)
    b.send(b.work())

    assert "0 of 1 evaluations, the last lease ends in 100 s" in b.wait().detail
    asked = a.work()
    assert (asked.phase, asked.stage, asked.round) == ("evaluate", 0, 0)
    assert all(asked.weights[name] != started.weights[name] for name in started.weights)
    assert a.evaluate(asked, correct=1, num_examples=4, loss=0.7).status_code == 200

    row = coordinator.status().rounds[0]
    assert (row.state, row.test_examples, row.test_correct, row.test_loss) == ("closed", 4, 1, 0.7)


def test_a_round_does_not_wait_for_ever_for_an_evaluation(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1]))
    a, b = coordinator.join("a", test_examples=4), coordinator.join("b", test_examples=4)
    a.check_in()
    b.check_in()
    a.send(a.work())
    b.send(b.work())
    asked = a.work()
    b.evaluate(b.work())
    clock.jump(101)

    assert coordinator.status().rounds[0].state == "closed"
    assert coordinator.status().rounds[0].test_examples == 4
    problem_of(a.evaluate(asked), 409, "round-closed")


def test_renewing_a_lease_for_ever_does_not_hold_up_the_evaluation(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1], cohort=Cohort(size=1, deadline_seconds=300, lease_seconds=100)))
    a = coordinator.join("a", test_examples=4)
    a.send(a.work())
    for _ in range(4):
        assert a.work().phase == "evaluate"
        clock.jump(75)
    assert (a.work().phase, a.work().stage) == ("train", 1)


def test_a_device_works_for_the_first_open_run_that_fits_it(coordinator: InProcess) -> None:
    cohort = Cohort(size=1)
    first = coordinator.publish(make_bundle(rounds=[1, 0], cohort=cohort, engines=("executorch",)))
    second = coordinator.publish(make_bundle(rounds=[1, 0], cohort=cohort, seed=1))
    third = coordinator.publish(make_bundle(rounds=[1, 0], cohort=cohort, seed=2))
    phone, server = coordinator.join("phone", engine="executorch"), coordinator.join("server")

    assert phone.work().run == first
    assert server.work().run == second
    server.send(server.work())
    assert server.work().run == third
    assert server.work(run=third).run == third
    assert coordinator.status(second).state == "finished"
    assert server.wait(run=second).detail == "run-2 is finished"


def test_a_run_counts_only_the_devices_that_ask_it_for_work(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    coordinator.publish(make_bundle(seed=1))
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in()

    assert "1 of 2 devices are here" in b.wait(run="run-2").detail


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"engine": "executorch"}, "has programs for onnxruntime, torch, not for executorch"),
        ({"modalities": ("image",)}, "this device has no data for motion"),
        ({"modalities": ()}, "this device has no data for motion"),
    ],
)
def test_a_device_that_fits_no_open_run_is_refused_with_the_reason(coordinator: InProcess, facts, why) -> None:
    coordinator.publish(make_bundle())
    answer = coordinator.join("odd").check_in(**facts)
    assert isinstance(answer, Refused)
    assert why in answer.detail and "run-1" in answer.detail


def test_a_device_with_more_modalities_than_needed_is_welcome(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1)))
    assert isinstance(coordinator.join("rich").check_in(modalities=("image", "motion")), Assignment)


def test_without_an_open_run_a_device_waits(coordinator: InProcess) -> None:
    wait = coordinator.join("early").wait()
    assert wait.reason == "no_run"
    assert "no run is open" in wait.detail


def test_waiting_times_are_those_of_the_settings(make_coordinator) -> None:
    coordinator = make_coordinator("slow", wait_seconds_min=3, wait_seconds_max=20)
    wait = coordinator.join("a").wait()
    assert (wait.wait_seconds_min, wait.wait_seconds_max) == (3, 20)


def test_fp16_and_fp32_devices_train_in_the_same_round(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], encoding="fp16"))
    a, b = coordinator.join("a", encodings=("fp32", "fp16")), coordinator.join("b", engine="torch")
    b.check_in()
    assert a.work().upload_encoding == "fp16"
    assert b.work().upload_encoding == "fp32"
    status = work_until_finished(coordinator, [a, b])
    assert [(update.engine, update.upload_encoding) for update in status.rounds[0].updates] == [
        ("onnxruntime", "fp16"),
        ("torch", "fp32"),
    ]


@pytest.mark.parametrize("strategy", ["layerwise", "progressive", "end_to_end"])
def test_a_restart_between_any_two_messages_changes_nothing(make_coordinator, strategy: str) -> None:
    """The same devices in the same order, once undisturbed and once with a restart after every message."""
    outcomes = []
    for name, is_disturbed in (("calm", False), ("disturbed", True)):
        coordinator = make_coordinator(name)
        rounds = [2] if strategy == "end_to_end" else [1, 1]
        coordinator.publish(make_bundle(rounds=rounds, strategy=strategy))
        devices = [coordinator.join(device, test_examples=4) for device in ("a", "b", "c")]
        status = _work(coordinator, devices, is_disturbed)
        outcomes.append((status, coordinator.weights()))
    assert outcomes[0] == outcomes[1]


def _work(coordinator: InProcess, devices, is_disturbed: bool) -> RunStatus:
    for _ in range(20):
        for device in devices:
            answer = device.check_in()
            if is_disturbed:
                coordinator.restart()
            if isinstance(answer, Assignment):
                done = device.send(answer) if answer.phase == "train" else device.evaluate(answer)
                assert done.status_code == 200, done.text
                if is_disturbed:
                    coordinator.restart()
        if coordinator.status().state == "finished":
            return coordinator.status()
    raise AssertionError(coordinator.status().detail)
