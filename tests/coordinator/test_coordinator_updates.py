"""Updates and evaluations: what is refused and why, and that a refusal changes nothing."""

import numpy as np
import pytest
from coordinator_harness import REPORT, Device, InProcess, make_bundle, problem_of
from safetensors.numpy import save

from lamina.encoding.tensors import encode, max_file_bytes
from lamina.plans.plan import Cohort
from lamina.wire import Accepted, Assignment, TrainReport


@pytest.fixture
def device(coordinator: InProcess) -> Device:
    """A device with a place in the first round; another one has the second place."""
    coordinator.publish(make_bundle(rounds=[1, 1]))
    first, second = coordinator.join("first"), coordinator.join("second")
    first.check_in()
    second.work()
    return first


@pytest.fixture
def assignment(device: Device) -> Assignment:
    return device.work()


def nothing_was_kept(device: Device) -> bool:
    """No update is counted, no file is left, and the device still has its work."""
    coordinator = device.coordinator
    files = list((coordinator.state / "updates").iterdir())
    return not files and not coordinator.status().rounds[0].updates and isinstance(device.check_in(), Assignment)


def test_an_update_is_accepted_with_its_hash(device: Device, assignment: Assignment) -> None:
    answer = device.send(assignment)
    assert Accepted.model_validate_json(answer.content).sha256 is not None
    (row,) = device.coordinator.status().rounds
    assert [(update.device, update.engine, update.report) for update in row.updates] == [("first", "onnxruntime", REPORT)]


def test_sending_an_update_again_gives_the_same_answer_and_counts_once(device: Device, assignment: Assignment) -> None:
    answers = [device.send(assignment) for _ in range(3)]
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert len(device.coordinator.status().rounds[0].updates) == 1


def test_sending_again_works_after_the_round_has_closed(device: Device, assignment: Assignment) -> None:
    first = device.send(assignment)
    other = device.coordinator.join("third")
    device.coordinator.clock.jump(1001)
    assert other.wait()
    assert device.coordinator.status().rounds[0].state == "closed"

    again = device.send(assignment)
    assert (again.status_code, again.content) == (200, first.content)
    assert len(device.coordinator.status().rounds[0].updates) == 1


def test_another_body_for_a_round_that_counted_the_device_is_refused(device: Device, assignment: Assignment) -> None:
    device.send(assignment)
    changed = {name: value + 1 for name, value in device.difference(assignment).items()}
    detail = problem_of(device.send(assignment, encode(changed)), 409, "update-rejected")
    assert "has counted another update of this device" in detail


def _altered(device: Device, assignment: Assignment, name: str, value: object) -> bytes:
    """The device's update with one tensor replaced, or dropped if the value is None; written without lamina's checks."""
    tensors = {**device.difference(assignment), name: value}
    return save({key: np.asarray(item) for key, item in tensors.items() if item is not None}, {"encoding": "fp32"})


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("head/weight", np.zeros((3, 8), np.float32), "'head/weight' has shape (3, 8), expected (8, 3)"),
        ("head/weight", np.zeros((8, 3), np.float64), "'head/weight' has dtype F64"),
        ("head/weight", np.zeros((8, 3), np.float16), "'head/weight' has dtype F16"),
        ("head/weight", np.full((8, 3), np.nan, np.float32), "'head/weight' holds NaN or infinity"),
        ("head/weight", np.full((8, 3), np.inf, np.float32), "'head/weight' holds NaN or infinity"),
        ("head/weight", np.full((8, 3), -3e38, np.float32), "'head/weight' holds 3e+38, above 10000"),
        ("head/weight", None, "1 tensors are missing, the first is 'head/weight'"),
        ("head/extra", np.zeros(3, np.float32), "1 tensors were not expected, the first is 'head/extra'"),
    ],
)
def test_wrong_tensors_are_refused_by_name(device: Device, assignment: Assignment, name, value, what) -> None:
    assert what in problem_of(device.send(assignment, _altered(device, assignment, name, value)), 422, "tensor-file")
    assert nothing_was_kept(device)


def test_bytes_that_are_no_tensor_file_are_refused(device: Device, assignment: Assignment) -> None:
    for body in (b"", b"hello", b"\xff" * 64, device.body(assignment)[:-1]):
        problem_of(device.send(assignment, body), 422, "tensor-file")
    assert nothing_was_kept(device)


def test_an_unknown_encoding_is_refused(device: Device, assignment: Assignment) -> None:
    body = encode(device.difference(assignment)).replace(b"fp32", b"int3")
    assert "'int3' is not known" in problem_of(device.send(assignment, body), 422, "tensor-file")


def test_a_truncated_body_leaves_nothing_behind(device: Device, assignment: Assignment) -> None:
    body = device.body(assignment)
    headers = {"Content-Length": str(len(body) + 10)}
    assert "ended after" in problem_of(device.send(assignment, body, headers=headers), 400, "protocol")
    assert nothing_was_kept(device)
    assert device.send(assignment).status_code == 200


def test_a_body_is_refused_by_its_announced_length_before_it_is_read(device: Device, assignment: Assignment) -> None:
    limit = max_file_bytes(device.specs(assignment))
    detail = problem_of(device.send(assignment, headers={"Content-Length": str(limit + 1)}), 413, "too-large")
    assert f"at most {limit}" in detail
    assert nothing_was_kept(device)


def test_a_body_without_length_is_refused_as_soon_as_it_is_too_large(device: Device, assignment: Assignment) -> None:
    limit = max_file_bytes(device.specs(assignment))
    answer = device.send(assignment, b"x" * (limit + 1), headers={"Content-Length": None})
    assert f"larger than the {limit} bytes" in problem_of(answer, 413, "too-large")
    assert nothing_was_kept(device)


@pytest.mark.parametrize("length", ["-1", "ten", "1.5"])
def test_a_length_that_is_no_number_is_refused(device: Device, assignment: Assignment, length: str) -> None:
    problem_of(device.send(assignment, headers={"Content-Length": length}), 400, "protocol")


def test_a_body_with_another_hash_than_announced_is_refused(device: Device, assignment: Assignment) -> None:
    headers = {"Content-Digest": f"sha-256=:{'A' * 43}=:"}
    assert "send it again" in problem_of(device.send(assignment, headers=headers), 400, "hash-mismatch")
    assert nothing_was_kept(device)


@pytest.mark.parametrize("digest", [None, "", "sha-256=abc", "sha-256=:YWJj:", "sha-256=:!:", "sha-512=:YWJj:"])
def test_a_missing_or_malformed_digest_is_refused(device: Device, assignment: Assignment, digest) -> None:
    problem_of(device.send(assignment, headers={"Content-Digest": digest}), 400, "protocol")


def test_a_report_is_needed_and_must_be_valid(device: Device, assignment: Assignment) -> None:
    problem_of(device.send(assignment, headers={"Lamina-Report": None}), 400, "protocol")
    whole = REPORT.model_dump_json()
    for wrong in (
        "{",
        whole.replace('"num_examples":10', '"num_examples":0'),
        whole.replace('"loss":0.5', '"loss":NaN'),
        whole.replace('"loss"', '"lost"'),
    ):
        assert "Lamina-Report" in problem_of(device.send(assignment, headers={"Lamina-Report": wrong}), 422, "config")
    assert nothing_was_kept(device)


@pytest.mark.parametrize(
    "address",
    [
        {"run": "run-2"},
        {"run": "run-01"},
        {"run": "walk-1"},
        {"run": "run-99999999999999999999"},
        {"stage": 2},
        {"round": 1},
        {"stage": 1, "round": 0},
    ],
)
def test_an_unknown_run_stage_or_round_is_named(device: Device, assignment: Assignment, address) -> None:
    problem_of(device.send(assignment, **address), 404, "unknown-name")
    problem_of(device.evaluate(assignment, **address), 404, "unknown-name")
    assert nothing_was_kept(device)


@pytest.mark.parametrize("address", [{"stage": "first"}, {"stage": -1}, {"round": 99999999999999999999}])
def test_a_stage_or_round_that_can_be_none_is_refused(device: Device, assignment: Assignment, address) -> None:
    for answer in (device.send(assignment, **address), device.evaluate(assignment, **address)):
        assert "the address is not valid: path." in problem_of(answer, 422, "config")
    assert nothing_was_kept(device)


def test_a_device_without_a_place_cannot_send(device: Device, assignment: Assignment) -> None:
    stranger = device.coordinator.join("stranger")
    detail = problem_of(stranger.send(assignment, device.body(assignment)), 409, "update-rejected")
    assert "no place" in detail


def test_an_update_for_a_closed_round_is_refused(device: Device, assignment: Assignment) -> None:
    device.coordinator.clock.jump(1001)
    late = device.coordinator.join("late")
    device.send(assignment)
    assert device.coordinator.status().rounds[0].state == "closed"
    problem_of(late.send(assignment, device.body(assignment)), 409, "round-closed")


def test_a_refused_update_does_not_hinder_the_right_one(device: Device, assignment: Assignment) -> None:
    device.send(assignment, b"nonsense")
    assert device.send(assignment).status_code == 200


@pytest.fixture
def asked(coordinator: InProcess) -> tuple[Device, Assignment]:
    """A device that was asked to evaluate."""
    coordinator.publish(make_bundle(rounds=[1, 1], cohort=Cohort(size=1)))
    device = coordinator.join("judge", test_examples=4)
    device.send(device.work())
    return device, device.work()


def test_an_evaluation_counts_once_however_often_it_is_sent(asked: tuple[Device, Assignment]) -> None:
    device, assignment = asked
    answers = [device.evaluate(assignment) for _ in range(3)]
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert device.coordinator.status().rounds[0].test_examples == 4
    problem_of(device.evaluate(assignment, correct=1), 409, "update-rejected")


@pytest.mark.parametrize(("correct", "num_examples", "what"), [(5, 4, "5 correct of 4"), (0, 0, "nothing was evaluated")])
def test_an_impossible_evaluation_is_refused(asked, correct: int, num_examples: int, what: str) -> None:
    device, assignment = asked
    answer = device.evaluate(assignment, correct=correct, num_examples=num_examples)
    assert what in problem_of(answer, 409, "update-rejected")
    assert device.work() == assignment


def test_an_evaluation_from_a_device_that_was_not_asked_is_refused(asked: tuple[Device, Assignment]) -> None:
    device, assignment = asked
    stranger = device.coordinator.join("stranger")
    assert "not asked" in problem_of(stranger.evaluate(assignment), 409, "update-rejected")


def test_an_evaluation_before_the_round_is_aggregated_is_refused(device: Device, assignment: Assignment) -> None:
    problem_of(device.evaluate(assignment), 409, "update-rejected")


def test_an_update_in_the_evaluating_phase_is_refused(asked: tuple[Device, Assignment]) -> None:
    device, assignment = asked
    stranger = device.coordinator.join("stranger")
    problem_of(stranger.send(assignment, device.body(assignment)), 409, "round-closed")


def test_several_evaluations_are_weighted_by_their_examples(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a", test_examples=1), coordinator.join("b", test_examples=3)
    a.check_in()
    for device in (b, a):
        device.send(device.work())
    a.evaluate(a.work(), correct=1, num_examples=1, loss=4.0)
    b.evaluate(b.work(), correct=0, num_examples=3, loss=0.0)
    row = coordinator.status().rounds[0]
    assert (row.test_examples, row.test_correct, row.test_loss) == (4, 1, 1.0)


def test_the_reports_stand_in_the_status_as_they_were_sent(device: Device, assignment: Assignment) -> None:
    report = TrainReport(num_examples=7, loss=1e-9, train_seconds=0, peak_bytes=2**40, bytes_down=0, bytes_up=1)
    device.send(assignment, report=report)
    assert device.coordinator.status().rounds[0].updates[0].report == report
