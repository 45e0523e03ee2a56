"""Calibration and teachers: what is made or remembered between the mean of a round and the next piece of work."""

from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import (
    Bundle,
    Device,
    FakeClock,
    InProcess,
    Process,
    difference_of,
    dying_in,
    make_bundle,
    poll,
    problem_of,
    tensors_of,
    work_until_finished,
)

from lamina.encoding.tensors import encode, hash_bytes
from lamina.plans.plan import Cohort
from lamina.wire import Assignment, Refused

ONE = Cohort(size=1, deadline_seconds=1000, lease_seconds=100)
CALIBRATOR = {"role": "calibrator"}


def calibrated_bundle(**settings) -> Bundle:
    return make_bundle(
        **{
            "cohort": ONE,
            "training": {"features": {"keep": "round"}},
            "calibration": {"data": "own.npz", "learning_rate": 0.1},
            **settings,
        }
    )


@pytest.fixture
def pair(coordinator: InProcess) -> tuple[Device, Device]:
    """A device and a calibrator in a run of two stages."""
    coordinator.publish(calibrated_bundle())
    return coordinator.join("a", test_examples=4), coordinator.join("server", **CALIBRATOR)


def test_all_that_is_attached_is_trained_on_top_of_the_mean(pair, coordinator: InProcess, tmp_path: Path) -> None:
    device, calibrator = pair
    manifest = calibrated_bundle().manifest
    for stage in (0, 1):
        before = coordinator.status().weights
        work = device.work()
        device.send(work)
        mean = coordinator.status().weights
        to_do = calibrator.work()
        assert (to_do.phase, to_do.stage, to_do.modalities) == ("calibrate", stage, ())
        assert calibrator.work() == to_do
        assert to_do.weights == {name: mean[name] for name in manifest.calibrated(stage)}
        blobs = {name: coordinator.blob(mean[name]) for name in manifest.calibrated(stage)}
        assert calibrator.send(to_do).status_code == 200

        new = coordinator.status().weights
        assert {name for name in new if new[name] != mean[name]} == set(manifest.calibrated(stage))
        assert {name for name in mean if mean[name] != before[name]} == set(manifest.plan.stages[stage].active)
        learned = difference_of("server", manifest.specs(manifest.calibrated(stage)), stage, 0)
        for name in manifest.calibrated(stage):
            specs = manifest.segment(name).tensors
            start = tensors_of(blobs[name], specs, tmp_path)
            for tensor, value in tensors_of(coordinator.blob(new[name]), specs, tmp_path).items():
                exact = start[tensor].astype(np.float64) + learned[f"{name}/{tensor}"]
                np.testing.assert_array_equal(value, exact.astype(np.float32))
        asked = device.work()
        assert (asked.phase, asked.weights["head"]) == ("evaluate", new["head"])
        device.evaluate(asked)
    assert set(manifest.plan.stages[1].frozen) < set(manifest.calibrated(1))
    status = coordinator.status()
    assert (status.state, [row.notes for row in status.rounds]) == ("finished", [(), ()])
    assert [[update.device for update in row.updates] for row in status.rounds] == [["a"], ["a"]]


def test_the_next_round_sends_the_calibrated_prefix_down(coordinator: InProcess) -> None:
    coordinator.publish(calibrated_bundle(rounds=[1, 2]))
    device, calibrator = coordinator.join("a"), coordinator.join("server", **CALIBRATOR)
    device.step(), calibrator.step()
    first = device.work()
    device.send(first)
    calibrator.step()
    second = device.work()
    assert second.round == 1
    frozen = calibrated_bundle().manifest.plan.stages[1].frozen
    assert frozen and all(first.weights[name] != second.weights[name] for name in frozen)


def test_a_calibrator_is_no_part_of_a_cohort_and_gets_no_other_work(coordinator: InProcess) -> None:
    coordinator.publish(calibrated_bundle(cohort=ONE.model_copy(update={"size": 2, "pool": 2})))
    calibrator = coordinator.join("server", test_examples=9, **CALIBRATOR)
    a, b = coordinator.join("a", test_examples=4), coordinator.join("b", test_examples=4)
    assert "0 of 2 devices are here" in calibrator.wait().detail
    assert "1 of 2 devices are here" in a.wait().detail
    assert isinstance(b.check_in(), Assignment)
    assert calibrator.wait().reason == "round"
    for device in (a, b):
        device.send(device.work())
    assert a.wait().reason == "round"
    calibrator.send(calibrator.work())
    assert calibrator.wait().reason == "round"
    assert (a.work().phase, b.work().phase) == ("evaluate", "evaluate")


def test_while_it_waits_everybody_is_told_how_to_start_it(pair, coordinator: InProcess, clock: FakeClock) -> None:
    device, calibrator = pair
    device.send(device.work())
    clock.jump(7)
    waiting = (
        "round 0 of stage 0 waits for the calibrator since 7 s: start it with `lamina calibrate URL --data FILE` on its data "
        "(own.npz); "
        "without it, the round goes on in 993 s"
    )
    assert device.wait().detail == coordinator.status().detail == waiting
    assert coordinator.status().rounds[0].state == "training"
    calibrator.work()
    assert "is being calibrated for 7 s by server, whose lease ends in 100 s" in coordinator.status().detail


def test_without_a_calibrator_the_round_goes_on_at_its_deadline_and_says_so(pair, coordinator, clock: FakeClock) -> None:
    device, calibrator = pair
    device.send(device.work())
    late = calibrator.work()
    mean = coordinator.status().weights
    clock.jump(1001)

    status = coordinator.status()
    assert (status.rounds[0].state, status.weights) == ("evaluating", mean)
    assert status.rounds[0].notes == ("not calibrated: no calibrator sent an update within 1000 s",)
    problem_of(calibrator.send(late), 409, "round-closed")
    assert device.work().phase == "evaluate"
    assert list((coordinator.state / "updates").iterdir()) == []


def test_a_calibrator_that_stays_silent_loses_the_work_to_another_one(pair, coordinator, clock: FakeClock) -> None:
    device, first = pair
    second = coordinator.join("other", **CALIBRATOR)
    device.send(device.work())
    old = first.work()
    assert second.wait().reason == "round"
    clock.jump(101)
    taken = second.work()
    assert taken == old
    assert first.wait().reason == "round"
    problem_of(first.send(old), 409, "round-closed")
    assert second.send(taken).status_code == 200


def test_a_calibration_counts_once_however_often_it_is_sent(pair, coordinator: InProcess) -> None:
    device, calibrator = pair
    device.send(device.work())
    work = calibrator.work()
    answers = [calibrator.send(work)]
    weights = coordinator.weights()
    coordinator.restart()
    answers += [calibrator.send(work), calibrator.send(work)]
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    other = encode({name: value * 0 for name, value in calibrator.difference(work).items()})
    assert "counted another update" in problem_of(calibrator.send(work, other), 409, "update-rejected")
    assert coordinator.weights() == weights


def test_only_a_calibrator_s_update_of_the_right_tensors_is_taken(pair, coordinator: InProcess) -> None:
    device, calibrator = pair
    work = device.work()
    early = work.model_copy(update={"phase": "calibrate"})
    problem_of(calibrator.send(early), 409, "update-rejected")
    device.send(work)
    problem_of(calibrator.send(early), 409, "round-closed")  # it has not asked for the work
    to_do = calibrator.work()
    problem_of(device.send(to_do, calibrator.body(to_do)), 409, "update-rejected")
    lacking = dict(list(calibrator.difference(to_do).items())[1:])
    assert "missing" in problem_of(calibrator.send(to_do, encode(lacking)), 422, "tensor-file")
    assert calibrator.send(to_do).status_code == 200


def test_a_device_may_be_the_calibrator_too(coordinator: InProcess) -> None:
    """One enrolment for both: its update and its calibration are told apart by what it checked in as."""
    coordinator.publish(calibrated_bundle(rounds=[0, 1]))
    device = coordinator.join("a", **CALIBRATOR)
    work = device.work(role="device")
    device.send(work)
    to_do = device.work()
    assert to_do.phase == "calibrate"
    assert device.send(to_do).status_code == 200
    assert device.send(work).status_code == device.send(to_do).status_code == 200
    assert coordinator.status().state == "finished"


@pytest.mark.parametrize(
    ("settings", "facts", "why"),
    [
        ({}, {"modalities": ("image",)}, "the calibrator has no data for motion"),
        ({}, {"engine": "executorch"}, "has no calibration programs for executorch"),
        ({"calibration": None}, {}, "has no `calibration` in its plan"),
    ],
)
def test_a_calibrator_that_fits_no_run_is_refused_with_the_reason(coordinator, settings, facts, why) -> None:
    coordinator.publish(calibrated_bundle(**settings))
    answer = coordinator.join("server", **CALIBRATOR).check_in(**facts)
    assert isinstance(answer, Refused) and why in answer.detail


def test_calibration_travels_on_agreed_terms(coordinator: InProcess) -> None:
    coordinator.publish(calibrated_bundle(encoding="fp16", download_encoding="fp16", compression="zstd"))
    able = {"encodings": ("fp32", "fp16"), "compressions": ("none", "zstd")}
    device, calibrator = coordinator.join("a", **able), coordinator.join("server", **able, **CALIBRATOR)
    device.send(device.work())
    work = calibrator.work()
    assert (work.download_encoding, work.upload_encoding, work.upload_compression) == ("fp16", "fp16", "zstd")
    assert calibrator.send(work).status_code == 200


def test_a_bundle_without_calibration_programs_is_refused(coordinator: InProcess) -> None:
    bundle = calibrated_bundle()
    stages = tuple(stage.model_copy(update={"calibrate": {}}) for stage in bundle.manifest.stages)
    for data in bundle.blobs.values():
        coordinator.http.put(f"/v1/blobs/{hash_bytes(data)}", content=data, headers=coordinator.admin)
    answer = coordinator.post_manifest(bundle.manifest.model_copy(update={"stages": stages}).to_json())
    assert "wants calibration, and the bundle has no programs" in problem_of(answer, 422, "bundle")


@pytest.mark.parametrize(
    "name", ["coordinator.aggregation.aggregator.apply_calibration", "coordinator.aggregation.calibration.commit_calibration"]
)
def test_a_kill_between_acceptance_and_the_calibrated_weights_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    calm = InProcess(tmp_path / "calm")
    calm.publish(calibrated_bundle(rounds=[1, 0]))
    work_until_finished(calm, [calm.join("a"), calm.join("server", **CALIBRATOR)])
    weights = calm.weights()
    calm.stop()

    first = Process(tmp_path / "state", dying_in(name))
    first.publish(calibrated_bundle(rounds=[1, 0]))
    device, calibrator = first.join("a"), first.join("server", **CALIBRATOR)
    assert device.send(device.work()).status_code == 200
    poll(lambda: isinstance(calibrator.check_in(), Assignment))
    work = calibrator.work()
    calibrator.send_to_the_dying(work)
    assert first.join_process() == -9
    assert [path.name for path in (tmp_path / "state" / "updates").iterdir()] == ["calibration-1"]

    second = Process(tmp_path / "state")
    calibrator.coordinator = second
    assert calibrator.send(work).status_code == 200
    assert second.status().state == "finished"
    assert second.weights() == weights
    assert list((tmp_path / "state" / "updates").iterdir()) == []
    second.terminate()


def test_the_heads_and_norms_of_the_stage_before_come_as_the_teacher(coordinator: InProcess) -> None:
    bundle = make_bundle(rounds=[1, 0, 2], layers=3, cohort=ONE, has_teacher=True, download_encoding="int8", seed=4)
    coordinator.publish(bundle)
    device = coordinator.join("a", encodings=("fp32", "int8"), test_examples=4)
    first = device.work()
    assert first.teacher_weights == {}
    device.send(first)
    device.step()
    end_of_stage_0 = coordinator.status().weights
    teacher = {name: end_of_stage_0[name] for name in ("motion.norm", "motion.projection", "head")}
    for number in range(2):
        work = device.work()
        assert (work.stage, work.round, work.teacher_weights) == (2, number, teacher)
        device.send(work)
        coordinator.restart()
        asked = device.work()
        assert (asked.phase, asked.teacher_weights) == ("evaluate", {})
        assert all(hash_bytes(coordinator.blob(digest)) == digest for digest in teacher.values())
        assert not set(teacher.values()) & set(coordinator.status().weights.values())
        device.evaluate(asked)
    assert coordinator.status().state == "finished"


def test_a_device_gets_the_teacher_of_its_modalities(coordinator: InProcess) -> None:
    modalities, sets = ("audio", "image"), (("audio",),)
    coordinator.publish(make_bundle(rounds=[1, 1], modalities=modalities, device_modalities=sets, cohort=ONE, has_teacher=True))
    device = coordinator.join("ear", modalities=("audio",))
    device.step()
    assert set(device.work().teacher_weights) == {"audio.norm", "audio.projection", "head"}
    assert set(device.work(modalities=modalities).teacher_weights) == {
        "audio.norm", "audio.projection", "image.norm", "image.projection", "head",
    }  # fmt: skip


def test_without_a_program_that_asks_for_it_nothing_is_remembered(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1], cohort=ONE))
    device = coordinator.join("a")
    device.step()
    assert device.work().teacher_weights == {}


def test_a_device_that_enrolled_with_the_enrolment_token_cannot_calibrate(coordinator: InProcess) -> None:
    device = coordinator.join("a")
    answer = device.check_in(**CALIBRATOR)
    assert answer.kind == "refused"
    assert "enrols with the admin token" in answer.detail
