"""The real command in a process of its own: killed, restarted, refused its port, cut off within a body."""

import base64
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from statistics import median

import pytest
from coordinator_harness import (
    REPORT,
    SERVE,
    Device,
    InProcess,
    Process,
    dying_in,
    make_bundle,
    path_of,
    poll,
    problem_of,
    work_until_finished,
)

from lamina.plans.plan import Cohort
from lamina.wire import Assignment, Wait

COHORT = Cohort(size=3)


@pytest.fixture
def calm(tmp_path: Path) -> dict[str, bytes]:
    """The final weights of a run that nothing disturbs."""
    coordinator = InProcess(tmp_path / "calm")
    coordinator.publish(make_bundle(cohort=COHORT))
    work_until_finished(coordinator, [coordinator.join(name, test_examples=4) for name in "abc"])
    weights = coordinator.weights()
    coordinator.stop()
    return weights


def start_round(coordinator: Process) -> list[Device]:
    """A published run and three devices that are here."""
    coordinator.publish(make_bundle(cohort=COHORT))
    devices = [coordinator.join(name, test_examples=4) for name in "abc"]
    for device in devices:
        device.check_in()
    return devices


def test_a_kill_within_a_round_loses_nothing(tmp_path: Path, calm: dict[str, bytes]) -> None:
    first = Process(tmp_path / "state")
    devices = start_round(first)
    sent = [devices[0].work(), devices[1].work()]
    answers = [device.send(work) for device, work in zip(devices, sent, strict=False)]
    assert [answer.status_code for answer in answers] == [200, 200]
    first.kill()

    second = Process(tmp_path / "state")
    for device in devices:
        device.coordinator = second
    assert [update.device for update in second.status().rounds[0].updates] == ["a", "b"]
    assert devices[0].send(sent[0]).content == answers[0].content
    status = work_until_finished(second, devices)
    assert [len(row.updates) for row in status.rounds] == [3, 3]
    assert second.weights() == calm
    second.terminate()


@pytest.mark.parametrize(
    "name",
    [
        "aggregate_round",  # accepted, not aggregated
        "commit_round",  # the new weights are blobs, no row names them
        "remove_updates",  # committed, the updates' bodies are still there
    ],
)
def test_a_kill_between_acceptance_and_the_next_round_loses_nothing(tmp_path: Path, calm: dict[str, bytes], name: str) -> None:
    first = Process(tmp_path / "state", dying_in(f"coordinator.aggregation.aggregator.{name}"))
    devices = start_round(first)
    *others, last = devices
    for device in others:
        assert device.send(device.work()).status_code == 200
    last.send_to_the_dying(last.work())
    assert first.join_process() == -9

    second = Process(tmp_path / "state")
    (row,) = second.status().rounds
    assert (row.state, [update.device for update in row.updates]) == ("evaluating", ["a", "b", "c"])
    assert list((tmp_path / "state" / "updates").iterdir()) == []
    for device in devices:
        device.coordinator = second
    status = work_until_finished(second, devices)
    assert [row.test_examples for row in status.rounds] == [12, 12]
    assert second.weights() == calm
    second.terminate()


def test_a_kill_before_the_commit_leaves_the_update_to_be_sent_again(tmp_path: Path, calm: dict[str, bytes]) -> None:
    """The body is in place, the row is not: the device had no answer, so it sends again."""
    trap = dying_in("coordinator.rounds.updates.UpdateRow")
    # The class is also used in queries; only making a row is the moment to die.
    trap = trap.replace("module.UpdateRow = ", "module.UpdateRow.__init__ = ")
    first = Process(tmp_path / "state", trap)
    devices = start_round(first)
    with pytest.raises(Exception, match=r"disconnected|reset|closed"):
        devices[0].send(devices[0].work())
    assert first.join_process() == -9
    assert len(list((tmp_path / "state" / "updates").iterdir())) == 1

    second = Process(tmp_path / "state")
    for device in devices:
        device.coordinator = second
    assert second.status().rounds[0].updates == ()
    work_until_finished(second, devices)
    assert second.weights() == calm
    second.terminate()


def test_devices_that_work_at_the_same_time_end_where_those_in_turn_do(tmp_path: Path, calm: dict[str, bytes]) -> None:
    """Three devices in threads of their own, each sending every update four times at once."""
    coordinator = Process(tmp_path / "state")
    devices = start_round(coordinator)

    def work(device: Device) -> None:
        with ThreadPoolExecutor(4) as senders:
            while isinstance(answer := device.check_in(), Assignment) or answer.reason != "no_run":
                if isinstance(answer, Wait):
                    continue
                send = device.send if answer.phase == "train" else device.evaluate
                answers = list(senders.map(send, [answer] * 4))
                assert {(one.status_code, one.content) for one in answers} == {(200, answers[0].content)}

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, devices))
    status = coordinator.status()
    assert [(len(row.updates), row.test_examples) for row in status.rounds] == [(3, 12), (3, 12)]
    assert coordinator.weights() == calm
    coordinator.terminate()


WAIT_IN_AGGREGATION = """
import time, pathlib
import coordinator.aggregation.aggregator as module
real = module.aggregate_round
def slow(*arguments):
    while not pathlib.Path({gate!r}).exists():
        time.sleep(0.01)
    real(*arguments)
module.aggregate_round = slow
"""


def test_nobody_waits_for_an_aggregation_without_an_answer(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    coordinator = Process(tmp_path / "state", WAIT_IN_AGGREGATION.format(gate=str(gate)))
    devices = start_round(coordinator)
    assert [device.send(device.work()).status_code for device in devices] == [200, 200, 200]
    assert all("is being aggregated" in device.wait().detail for device in devices)
    assert coordinator.status().rounds[0].state == "training"

    gate.touch()
    poll(lambda: coordinator.status().rounds[0].state == "evaluating")
    coordinator.terminate()


def test_a_body_that_is_far_too_large_is_refused_and_the_refusal_arrives(tmp_path: Path) -> None:
    coordinator = Process(tmp_path / "state")
    (device, *_) = start_round(coordinator)
    answer = device.send(device.work(), bytes(30 << 20))
    assert "at most 11776 are legal" in problem_of(answer, 413, "too-large")
    coordinator.terminate()


def test_a_connection_that_ends_within_a_body_leaves_nothing_behind(tmp_path: Path) -> None:
    coordinator = Process(tmp_path / "state")
    (device, *_) = start_round(coordinator)
    work = device.work()
    body = device.body(work)
    digest = base64.b64encode(sha256(body).digest()).decode()
    head = (
        f"PUT {path_of(work, 'update')} HTTP/1.1\r\nHost: x\r\nAuthorization: {device.headers['Authorization']}\r\n"
        f"Content-Digest: sha-256=:{digest}:\r\nLamina-Report: {REPORT.model_dump_json()}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    updates = tmp_path / "state" / "updates"
    with socket.create_connection(("127.0.0.1", int(coordinator.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body[: len(body) // 2])
        poll(lambda: len(list(updates.iterdir())) == 1)
    poll(lambda: not list(updates.iterdir()))
    assert coordinator.status().rounds[0].updates == ()
    assert device.send(work).status_code == 200
    coordinator.terminate()


def test_the_address_and_the_token_files_are_told_and_no_token_is(tmp_path: Path) -> None:
    coordinator = Process(tmp_path / "state")
    device = coordinator.join("phone")
    device.check_in()
    assert coordinator.http.get("/v1/health").json() == {"status": "ok"}
    tokens = [(tmp_path / "state" / name).read_text().strip() for name in ("enrolment.token", "admin.token")]
    assert coordinator.terminate() in (0, -15)

    log = coordinator.log()
    assert f"The coordinator listens on {coordinator.url}" in log
    assert str(tmp_path / "state" / "enrolment.token") in log and str(tmp_path / "state" / "admin.token") in log
    assert not [token for token in [*tokens, device.enrolled.device_token] if token in log]
    assert not (tmp_path / "state" / "address").exists()


def test_answers_are_not_held_back_by_the_kernel(tmp_path: Path) -> None:
    """Nagle's algorithm would add 40 ms to nearly each; the median of many says whether it does."""
    coordinator = Process(tmp_path / "state")
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        coordinator.http.get("/v1/health")
        seconds.append(time.perf_counter() - begin)
    coordinator.terminate()
    assert median(seconds) < 0.03


def test_a_port_in_use_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        error = _failing_serve(tmp_path / "state", str(taken.getsockname()[1]))
    assert "PortInUseError" in error and "--port" in error


def test_a_state_folder_has_one_coordinator(tmp_path: Path) -> None:
    coordinator = Process(tmp_path / "state")
    assert "another coordinator works on" in _failing_serve(tmp_path / "state", "0")
    coordinator.terminate()


def test_a_host_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    assert "cannot listen on 203.0.113.1" in _failing_serve(tmp_path / "state", "0", "--host", "203.0.113.1")


def test_waiting_times_must_fit_each_other(tmp_path: Path) -> None:
    error = _failing_serve(tmp_path / "state", "0", "--wait-seconds-min", "3", "--wait-seconds-max", "1")
    assert "--wait-seconds-min 3.0 is above --wait-seconds-max 1.0" in error


def _failing_serve(state: Path, port: str, *arguments: str) -> str:
    """What the command writes when it refuses to start."""
    command = [sys.executable, "-c", SERVE, "--state", str(state), "--port", port, *arguments]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    return done.stderr
