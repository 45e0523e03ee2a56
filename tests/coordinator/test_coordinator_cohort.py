"""Who is drawn, which frozen layers a device gets, and which rounds are evaluated."""

from collections import Counter

import pytest
from coordinator_harness import FakeClock, InProcess, make_bundle, work_until_finished
from hypothesis import given
from hypothesis import strategies as st

from lamina.federation.policy import draw_cohort
from lamina.plans.depth import drawn_prefix
from lamina.plans.plan import Cohort
from lamina.wire import Assignment

POOL = Cohort(size=2, pool=4, min_updates=1, deadline_seconds=1000, lease_seconds=100)


def test_with_a_pool_the_round_waits_for_it_and_then_draws_its_cohort(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=POOL, seed=3))
    devices = {name: coordinator.join(name) for name in "abcd"}
    assert (
        "1 of 4 devices are here; 2 of them are drawn and it starts when all are, without a time limit"
        in devices["d"].wait().detail
    )
    for name in "cba":
        devices[name].check_in()
    drawn = draw_cohort("abcd", 2, seed=3, stage=0, round_number=0)

    answers = {name: device.check_in() for name, device in devices.items()}
    assert {name for name, answer in answers.items() if isinstance(answer, Assignment)} == set(drawn)
    assert {answer.reason for answer in answers.values() if not isinstance(answer, Assignment)} == {"round"}
    coordinator.restart()
    assert {name: device.check_in() for name, device in devices.items()} == answers


def test_every_round_draws_anew(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[3, 3], cohort=POOL, seed=1))
    status = work_until_finished(coordinator, [coordinator.join(name) for name in "abcd"])
    told = [sorted(update.device for update in row.updates) for row in status.rounds]
    assert told == [
        sorted(draw_cohort("abcd", 2, seed=1, stage=stage, round_number=number)) for stage in (0, 1) for number in range(3)
    ]
    assert len({tuple(names) for names in told}) > 1


def test_a_drawn_device_that_stays_silent_loses_its_place_to_another_one(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=POOL))
    devices = {name: coordinator.join(name) for name in "abcd"}
    for device in devices.values():
        device.check_in()
    drawn = draw_cohort("abcd", 2, seed=0, stage=0, round_number=0)
    spare = next(name for name in "abcd" if name not in drawn)
    clock.jump(99)
    kept = devices[drawn[0]].work()
    clock.jump(2)

    assert devices[spare].send(devices[spare].work()).status_code == 200
    assert devices[drawn[1]].wait().reason == "round"
    assert devices[drawn[0]].send(kept).status_code == 200
    assert {update.device for update in coordinator.status().rounds[0].updates} == {spare, drawn[0]}


def test_what_a_drawn_device_takes_is_told_once_it_has_asked(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=2, pool=2), download_encoding="int8"))
    able = {"encodings": ("fp32", "fp16", "int8")}
    a, b = coordinator.join("a", **able), coordinator.join("b", **able)
    a.check_in()
    b.check_in()
    assert coordinator.status().rounds[0].notes == ()
    a.check_in(encodings=("fp32",))
    assert coordinator.status().rounds[0].notes == ("a takes weights in fp32 instead of int8",)


def test_devices_that_left_are_not_drawn(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=2, pool=2)))
    coordinator.join("gone").check_in()
    clock.jump(61)  # presence_seconds is 60
    a, b = coordinator.join("a"), coordinator.join("b")
    assert a.wait().reason == "cohort"
    assert isinstance(b.check_in(), Assignment) and isinstance(a.check_in(), Assignment)


def test_without_a_pool_the_first_that_ask_take_part(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=2, min_updates=1)))
    devices = [coordinator.join(name) for name in "dcba"]
    devices[0].wait()
    assert [isinstance(devices[index].check_in(), Assignment) for index in (1, 3, 0, 2)] == [True, True, False, False]


names = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@given(names=names, data=st.data(), seed=st.integers(0, 2**31), stage=st.integers(0, 9), number=st.integers(0, 99))
def test_a_draw_has_no_device_twice_and_does_not_depend_on_the_order(names, data, seed, stage, number) -> None:
    size = data.draw(st.integers(1, len(names)))
    drawn = draw_cohort(names, size, seed, stage, number)
    assert len(set(drawn)) == size and set(drawn) <= set(names)
    assert draw_cohort(data.draw(st.permutations(names)), size, seed, stage, number) == drawn


def test_every_device_is_drawn_about_as_often() -> None:
    counts = Counter(name for number in range(2000) for name in draw_cohort("abcdefgh", 2, 0, 0, number))
    assert set(counts) == set("abcdefgh")
    assert all(abs(count - 500) < 100 for count in counts.values())  # 5 standard deviations are 97


@pytest.mark.parametrize(
    ("every", "evaluated"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (3, [2, 4]), (5, [4]), (99, [4])]
)
def test_rounds_are_evaluated_as_often_as_the_plan_says_and_at_the_end_of_a_stage(coordinator, every, evaluated) -> None:
    coordinator.publish(make_bundle(rounds=[5, 0], cohort=Cohort(size=1, evaluate_every=every)))
    status = work_until_finished(coordinator, [coordinator.join("a", test_examples=4)])
    assert [row.state for row in status.rounds] == ["closed"] * 5
    assert [row.round for row in status.rounds if row.test_examples] == evaluated


DROPOUT = {"depth_dropout": {"budget": 3}, "features": {"keep": "round"}}


def test_a_device_gets_only_the_frozen_layers_that_were_drawn_for_it_and_evaluates_with_all(coordinator: InProcess) -> None:
    bundle = make_bundle(rounds=[0, 0, 0, 0, 3], layers=5, training=DROPOUT, modalities=("image", "motion"), seed=6)
    plan = bundle.manifest.plan
    stage = plan.stages[4]
    coordinator.publish(bundle)
    devices = {name: coordinator.join(name, modalities=("image", "motion"), test_examples=4) for name in "ab"}
    seen: set[tuple[str, ...]] = set()
    for number in range(3):
        devices["a"].check_in(), devices["b"].check_in()
        for name, device in devices.items():
            work = device.work()
            assert device.work() == work
            expected = set(stage.active)
            for modality in ("image", "motion"):
                drawn = drawn_prefix(
                    stage.frozen_chain(plan.model, modality), 1, plan.training.depth_dropout, plan.seed, 4, number, name
                )
                assert len(drawn) == 3 and drawn[:2] == [f"{modality}.stem", f"{modality}.layers.0"]
                expected |= set(drawn)
                seen.add(tuple(drawn))
            assert set(work.weights) == expected
            device.send(work)
        for device in devices.values():
            asked = device.work()
            assert asked.phase == "evaluate" and set(asked.weights) == {*stage.active, *stage.frozen}
            device.evaluate(asked)
    assert len(seen) > 4


def test_dropped_layers_travel_as_variants_and_are_named_in_the_status_like_all_others(coordinator: InProcess) -> None:
    bundle = make_bundle(
        rounds=[0, 0, 0, 1], layers=4, training=DROPOUT, cohort=Cohort(size=1), download_encoding="fp16", compression="zstd"
    )
    coordinator.publish(bundle)
    device = coordinator.join("a", encodings=("fp32", "fp16"), compressions=("none", "zstd"))
    work = device.work()
    assert len(work.weights) == len(bundle.manifest.plan.stages[3].active) + 3 == len(set(work.weights))
    assert set(work.compressed_weights) <= set(work.weights)
    assert set(coordinator.status().weights) == set(bundle.manifest.initial_weights)
