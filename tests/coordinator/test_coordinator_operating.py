"""What an operator can do: to devices and to runs, at any moment, with crashes in between; and that all of it is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from coordinator_harness import Device, FakeClock, InProcess, make_bundle, problem_of, work_until_finished
from typer.testing import CliRunner

import lamina.client
from lamina.cli.main import app
from lamina.encoding.tensors import hash_bytes
from lamina.errors import LaminaError
from lamina.plans.plan import Cohort
from lamina.wire import Assignment, Enrolments, History, HistoryEntry

ONE = Cohort(size=1, deadline_seconds=1000, lease_seconds=100)
TWO = Cohort(size=2, min_updates=2, deadline_seconds=1000, lease_seconds=100)


def try_command(coordinator: InProcess, command: str, run: str = "run-1", **rest: Any) -> httpx.Response:
    return coordinator.http.post(f"/v1/runs/{run}/commands", json={"command": command, **rest}, headers=coordinator.admin)


def do(coordinator: InProcess, command: str, run: str = "run-1", **rest: Any) -> HistoryEntry:
    answer = try_command(coordinator, command, run, **rest)
    assert answer.status_code == 200, answer.text
    return HistoryEntry.model_validate_json(answer.content)


def history(coordinator: InProcess, run: str = "") -> list[HistoryEntry]:
    answer = coordinator.http.get(f"/v1/runs/{run}/history" if run else "/v1/history", headers=coordinator.admin)
    return list(History.model_validate_json(answer.content).entries)


def test_a_removed_device_is_dead_at_once_and_its_name_is_free(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[2], strategy="end_to_end", cohort=TWO))
    old, other = coordinator.join("pi"), coordinator.join("other")
    old.check_in()
    other.send(other.work())
    held = old.work()
    removed = coordinator.http.post("/v1/devices/pi/removal", headers=coordinator.admin)
    assert (removed.json()["before"], removed.json()["after"]) == ("enrolled", "removed")
    problem_of(old.try_check_in(), 401, "not-enrolled")
    problem_of(old.send(held), 401, "not-enrolled")
    problem_of(coordinator.http.get("/v1/runs", headers=old.headers), 401, "not-enrolled")
    problem_of(coordinator.http.post("/v1/devices/pi/removal", headers=coordinator.admin), 404, "unknown-name")

    coordinator.restart()
    problem_of(old.try_check_in(), 401, "not-enrolled")
    new = coordinator.join("pi")
    assert new.enrolled.device_id != old.enrolled.device_id
    assert new.send(new.work()).status_code == 200  # the place of the removed one, at once
    assert {update.device for update in coordinator.status().rounds[0].updates} == {"pi", "other"}


def test_what_a_removed_device_sent_counts_and_is_told_under_its_name(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=TWO))
    gone, other = coordinator.join("gone", test_examples=4), coordinator.join("other")
    gone.check_in()
    other.send(other.work())
    gone.send(gone.work())
    assert coordinator.status().rounds[0].state == "evaluating"
    coordinator.http.post("/v1/devices/gone/removal", headers=coordinator.admin)
    status = coordinator.status()
    assert status.state == "finished"  # its evaluation is not waited for
    assert [update.device for update in status.rounds[0].updates] == ["gone", "other"]


def test_a_renamed_device_works_on(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=ONE))
    device = coordinator.join("pi")
    coordinator.join("taken")
    work = device.work()

    def rename(name: str, new: str) -> httpx.Response:
        return coordinator.http.post(f"/v1/devices/{name}/name", json={"name": new}, headers=coordinator.admin)

    problem_of(rename("pi", "taken"), 422, "config")
    problem_of(rename("pi", "no/name"), 422, "config")
    problem_of(rename("nobody", "x"), 404, "unknown-name")
    assert rename("pi", "kitchen").status_code == 200
    assert device.send(work).status_code == 200
    assert [update.device for update in coordinator.status().rounds[0].updates] == ["kitchen"]
    listed = Enrolments.model_validate_json(coordinator.http.get("/v1/devices", headers=coordinator.admin).content)
    assert [(entry.name, entry.run, entry.seen_seconds_ago) for entry in listed.devices] == [
        ("kitchen", "run-1", 0),
        ("taken", "", None),
    ]


def test_a_paused_run_lets_devices_finish_and_gives_out_no_new_work(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1], cohort=TWO))
    a, b, c = (coordinator.join(name) for name in "abc")
    a.check_in()
    held = b.work()
    clock.jump(90)
    entry = do(coordinator, "pause", reason="new data")
    assert (entry.before, entry.after) == ("running, stage 0 round 0", "paused, stage 0 round 0")
    assert do(coordinator, "pause").before == "paused, stage 0 round 0"
    assert b.work() == held
    assert c.wait().detail == "run-1 is paused since 0 s: new data; `lamina run resume` lets it go on"
    clock.jump(1500)
    coordinator.restart()
    assert coordinator.status().state == "paused"
    assert b.send(held).status_code == 200
    assert a.wait().reason == c.wait().reason == "round"

    do(coordinator, "resume")
    assert "open for 90 s" in coordinator.status().detail  # the pause counts for nothing
    assert "closes in 910 s" in coordinator.status().detail
    assert a.send(a.work()).status_code == 200
    assert [entry.what for entry in history(coordinator)] == ["pause", "resume"]


def test_devices_of_a_paused_run_work_for_others(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=ONE))
    coordinator.publish(make_bundle(cohort=ONE, seed=1))
    do(coordinator, "pause")
    assert coordinator.join("a").work().run == "run-2"


def test_a_device_finishes_what_it_has_of_a_paused_run_before_it_works_for_another(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[2], strategy="end_to_end", cohort=ONE))
    coordinator.publish(make_bundle(cohort=ONE, seed=1))
    device = coordinator.join("a")
    held = device.work()
    do(coordinator, "pause")
    assert device.work() == held
    assert device.send(held).status_code == 200
    assert device.work().run == "run-2"


def lose_weights(coordinator: InProcess, segment: str = "head") -> None:
    (coordinator.state / "blobs" / coordinator.status().weights[segment]).unlink()


@pytest.mark.parametrize("encoding", ["fp32", "fp16"])
def test_weights_that_are_lost_fail_the_run_and_end_no_device(coordinator: InProcess, encoding: str) -> None:
    coordinator.publish(make_bundle(rounds=[3], strategy="end_to_end", cohort=ONE, download_encoding=encoding))
    device = coordinator.join("a", encodings=("fp32", "fp16"))
    run_rounds(coordinator, device, 2)
    lose_weights(coordinator)
    assert device.wait().reason == "no_run"
    status = coordinator.status()
    assert status.state == "failed" and "cannot be given out" in status.detail and "there is no blob" in status.detail
    do(coordinator, "rollback", stage=0, round=0)
    assert work_until_finished(coordinator, [device]).state == "finished"


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_cancelled_run_leaves_no_updates_on_the_disk(coordinator: InProcess, monkeypatch, is_killed: bool) -> None:
    """Also where the coordinator ends between the command and the deletion."""
    coordinator.publish(make_bundle(rounds=[2], strategy="end_to_end", cohort=TWO))
    device, other = coordinator.join("a"), coordinator.join("b")
    device.check_in(), other.check_in()
    assert device.send(device.work()).status_code == 200
    updates = coordinator.state / "updates"
    assert len(list(updates.iterdir())) == 1
    if is_killed:
        monkeypatch.setattr(type(coordinator.app.state.house), "remove_bodies", lambda house, round_id: None)
    do(coordinator, "cancel")
    if is_killed:
        assert list(updates.iterdir())
        coordinator.restart()
    assert list(updates.iterdir()) == []
    assert len(coordinator.status().rounds[0].updates) == 1


def test_a_cancelled_run_frees_its_devices(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=ONE))
    coordinator.publish(make_bundle(cohort=ONE, seed=1))
    device = coordinator.join("a")
    held = device.work()
    do(coordinator, "cancel", reason="wrong plan")
    assert "run-1 was cancelled: wrong plan" in problem_of(device.send(held), 409, "round-closed")
    assert device.work().run == "run-2"
    asked = device.wait(run="run-1")
    assert (asked.reason, asked.detail) == ("no_run", "run-1 was cancelled: wrong plan")
    assert do(coordinator, "cancel").before.startswith("cancelled")
    for command in ("pause", "resume", "close_round", "rollback"):
        assert "run-1 is cancelled" in problem_of(try_command(coordinator, command), 422, "config")
    coordinator.restart()
    assert (coordinator.status("run-1").state, coordinator.status("run-2").state) == ("cancelled", "running")


def test_a_round_is_closed_with_the_updates_that_are_there(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 1], cohort=TWO))
    a, b = coordinator.join("a", test_examples=4), coordinator.join("b")
    assert "has not started" in problem_of(try_command(coordinator, "close_round"), 422, "config")
    a.check_in()
    held = b.work()
    assert "has no update yet" in problem_of(try_command(coordinator, "close_round"), 422, "config")
    a.send(a.work())
    do(coordinator, "close_round", stage=0, round=0)
    assert (coordinator.status().rounds[0].state, len(coordinator.status().rounds[0].updates)) == ("evaluating", 1)
    problem_of(b.send(held), 409, "round-closed")
    do(coordinator, "close_round", stage=0, round=0)  # nor is a's evaluation waited for
    assert coordinator.status().rounds[0].state == "closed"
    problem_of(try_command(coordinator, "close_round", stage=0, round=0), 422, "config")
    assert coordinator.status().stage == 1


def run_rounds(coordinator: InProcess, device: Device, count: int) -> list[dict[str, str]]:
    """The weights after each of so many rounds."""
    after = []
    for _ in range(count):
        work = device.work()
        assert device.send(work).status_code == 200
        after.append(coordinator.status().weights)
    return after


@pytest.mark.parametrize("with_restart", [False, True])
def test_a_run_goes_back_to_a_closed_round_and_comes_to_the_same_end(coordinator: InProcess, with_restart: bool) -> None:
    """Over the boundary of a stage too: the devices of this test learn the same in the same round."""
    coordinator.publish(make_bundle(rounds=[3, 2], cohort=ONE, has_teacher=True))
    device = coordinator.join("a")
    after = run_rounds(coordinator, device, 4)
    held = device.work()
    assert (held.stage, held.round) == (1, 1)
    entry = do(coordinator, "rollback", stage=0, round=1, reason="a bad device")
    assert (entry.before, entry.after) == ("running, stage 1 round 1", "running, stage 0 round 2")
    if with_restart:
        coordinator.restart()
    status = coordinator.status()
    assert status.weights == after[1]
    assert [(row.stage, row.round, row.state) for row in status.rounds][1:] == [(0, 1, "closed"), (0, 2, "training")]

    assert device.wait().detail == "run-1 was taken back to an earlier round; ask again"  # it may be at work still
    problem_of(device.send(held), 409, "round-closed")
    again = run_rounds(coordinator, device, 2)
    assert again == after[2:4]
    finished = work_until_finished(coordinator, [device])
    assert [(row.stage, row.round) for row in finished.rounds] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_device_that_asks_while_it_trains_for_an_undone_round_is_told_to_stop(coordinator: InProcess) -> None:
    """Otherwise what it trains from the old weights would count in the new round of the same number."""
    coordinator.publish(make_bundle(rounds=[3], strategy="end_to_end", cohort=TWO))
    a, b = coordinator.join("a"), coordinator.join("b")
    for _ in range(2):
        a.check_in(), b.check_in()
        assert {a.send(a.work()).status_code, b.send(b.work()).status_code} == {200}
    a.check_in()
    b.send(b.work())
    training = a.work()
    do(coordinator, "rollback", stage=0, round=0)
    assert not isinstance(a.check_in(), Assignment)
    problem_of(a.send(training), 409, "round-closed")
    b.check_in()
    new = a.work()
    assert (new.round, b.work().round) == (1, 1)
    assert new.weights != training.weights
    assert a.send(new).status_code == 200


def test_the_initial_weights_can_always_be_gone_back_to(coordinator: InProcess) -> None:
    bundle = make_bundle(rounds=[2, 1], cohort=ONE)
    coordinator.publish(bundle)
    device = coordinator.join("a")
    finished = work_until_finished(coordinator, [device])
    do(coordinator, "rollback")
    assert coordinator.status().weights == bundle.manifest.initial_weights
    assert [(row.state, row.updates) for row in coordinator.status().rounds] == [("training", ())]
    assert coordinator.status().state == "running"
    assert work_until_finished(coordinator, [device]).weights == finished.weights


def test_the_weights_of_so_many_closed_rounds_are_kept_as_the_settings_say(make_coordinator) -> None:
    coordinator: InProcess = make_coordinator("short", keep_rounds=2)
    bundle = make_bundle(rounds=[5], strategy="end_to_end", cohort=ONE)
    coordinator.publish(bundle)
    after = run_rounds(coordinator, coordinator.join("a"), 4)
    refused = problem_of(try_command(coordinator, "rollback", stage=0, round=1), 422, "config")
    assert "are not kept. As STAGE.ROUND, these are: 0.2, 0.3; and `start`" in refused
    stored = {path.name for path in (coordinator.state / "blobs").iterdir()}
    assert stored == {hash_bytes(bundle.manifest.to_json()), *bundle.blobs, *after[2].values(), *after[3].values()}
    do(coordinator, "rollback", stage=0, round=2)
    coordinator.restart()
    stored = {path.name for path in (coordinator.state / "blobs").iterdir()}
    assert stored == {hash_bytes(bundle.manifest.to_json()), *bundle.blobs, *after[2].values()}


def test_a_finished_run_goes_back_and_its_history_tells_it(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[3], strategy="end_to_end", cohort=ONE))
    device = coordinator.join("a")
    work_until_finished(coordinator, [device])
    assert do(coordinator, "rollback", stage=0, round=1).after == "running, stage 0 round 2"
    work_until_finished(coordinator, [device])
    told = [(entry.who.partition(" from")[0], entry.what, entry.after) for entry in history(coordinator, "run-1")]
    assert told == [
        ("coordinator", "finish", "finished"),
        ("admin token", "rollback", "running, stage 0 round 2"),
        ("coordinator", "finish", "finished"),
    ]


def spoil_file(folder: Path) -> None:
    (path,) = (folder / "updates").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a value that is still a number
    path.write_bytes(data)


def lose_file(folder: Path) -> None:
    (path,) = (folder / "updates").iterdir()
    path.unlink()


@pytest.mark.parametrize(("harm", "told"), [(spoil_file, "is damaged"), (lose_file, "FileNotFoundError")])
def test_a_round_that_cannot_be_aggregated_fails_its_run_and_can_be_taken_back(
    coordinator: InProcess, harm: Callable[[Path], None], told: str
) -> None:
    coordinator.publish(make_bundle(rounds=[2], strategy="end_to_end", cohort=TWO))
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in(), b.check_in()
    a.send(a.work()), b.send(b.work())
    a.check_in()
    b.send(b.work())
    harm(coordinator.state)
    assert a.send(a.work()).status_code == 200
    for _ in range(4):
        coordinator.status()
    status = coordinator.status()
    assert status.state == "failed"
    assert "the aggregation failed 3 times" in status.detail and told in status.detail
    assert a.wait().reason == "no_run"
    assert [(entry.what, entry.who) for entry in history(coordinator)] == [("fail", "coordinator")]
    coordinator.restart()
    assert coordinator.status().state == "failed"

    do(coordinator, "rollback", stage=0, round=0)
    for device in (a, b):
        device.check_in()  # they may be at work for the undone round, so they wait once
    assert work_until_finished(coordinator, [a, b]).state == "finished"


def test_weights_that_would_not_be_numbers_fail_the_run_by_name(coordinator: InProcess, monkeypatch) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=ONE))
    device = coordinator.join("a")
    import coordinator.aggregation.aggregator as aggregation

    real = aggregation.aggregate
    monkeypatch.setattr(
        "coordinator.aggregation.aggregator.aggregate",
        lambda *arguments: ({name: value * float("inf") for name, value in real(*arguments)[0].items()}, {}),
    )
    assert device.send(device.work()).status_code == 200
    for _ in range(3):
        coordinator.status()
    assert coordinator.status().state == "failed"
    assert "holds NaN or infinity" in coordinator.status().detail
    monkeypatch.undo()
    do(coordinator, "resume")
    assert coordinator.status().state == "finished"  # the updates were not lost


class Kept(httpx.BaseTransport):
    """The app in place of a socket; it stays when a command closes its connection."""

    def __init__(self, coordinator: InProcess) -> None:
        self.handle_request = coordinator.http._transport.handle_request  # type: ignore[method-assign]


def invoke(coordinator: InProcess, monkeypatch, *arguments: str) -> str:
    """What a command prints."""
    client = lamina.client.Client
    with monkeypatch.context() as patch:
        patch.setattr("lamina.client.Client", lambda url, token: client(url, token, transport=Kept(coordinator)))
        result = CliRunner(env={"LAMINA_TOKEN": (coordinator.state / "admin.token").read_text().strip()}).invoke(app, arguments)
    if isinstance(result.exception, LaminaError):
        return f"error [{result.exception.code}]: {result.exception.message}"
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


URL = "http://coordinator:8763"


def test_every_command_by_its_name(coordinator: InProcess, monkeypatch) -> None:
    coordinator.publish(make_bundle(rounds=[4], strategy="end_to_end", cohort=TWO))
    a, b = coordinator.join("a"), coordinator.join("b")
    assert "a  onnxruntime, run-1, asked 0 s ago" not in invoke(coordinator, monkeypatch, "device", "list", URL)
    a.check_in()
    b.check_in()
    a.send(a.work())
    assert "a  onnxruntime, run-1, asked 0 s ago" in invoke(coordinator, monkeypatch, "device", "list", URL)
    said = [
        invoke(coordinator, monkeypatch, *words)
        for words in (
            ("run", "close-round", URL, "run-1"),
            ("run", "pause", URL, "run-1", "--reason", "lunch"),
            ("run", "pause", URL, "run-1"),
            ("run", "resume", URL, "run-1"),
            ("run", "rollback", URL, "run-1", "--to", "start"),
            ("run", "rollback", URL, "run-1", "--to", "0.7"),
            ("run", "rollback", URL, "run-1", "--to", "seven"),
            ("run", "cancel", URL, "run-1"),
            ("device", "rename", URL, "a", "c"),
            ("device", "remove", URL, "c"),
            ("device", "remove", URL, "../../runs"),
        )
    ]
    assert said == [
        "run-1: running, stage 0 round 0 -> running, stage 0 round 0 (round 0 of stage 0 closed with 1 updates)\n",
        "run-1: running, stage 0 round 1 -> paused, stage 0 round 1 (lunch)\n",
        "run-1 is paused, stage 0 round 1 already; nothing was done\n",
        "run-1: paused, stage 0 round 1 -> running, stage 0 round 1\n",
        "run-1: running, stage 0 round 1 -> running, stage 0 round 0 (2 rounds undone)\n",
        said[5],
        said[6],
        "run-1: running, stage 0 round 0 -> cancelled, stage 0 round 0\n",
        "a is called c from now on\n",
        "c is removed, and the name is free\n",
        said[10],
    ]
    assert "are not kept" in said[5] and "'seven' is no round: say STAGE.ROUND" in said[6]
    assert "there is no " in said[10]
    lines = invoke(coordinator, monkeypatch, "run", "history", URL).splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == [
        "close_round",
        "pause",
        "resume",
        "rollback",
        "cancel",
        "rename-device",
        "remove-device",
    ]
    assert "admin token from 127.0.0.1: pause run-1: running, stage 0 round 1 -> paused, stage 0 round 1 (lunch)" in lines[1]
    assert (
        History.from_json(invoke(coordinator, monkeypatch, "run", "history", URL, "run-1", "--json")).entries[-1].what
        == "cancel"
    )


def test_only_the_admin_operates(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    device = coordinator.join("a")
    for method, path in (
        ("GET", "/v1/devices"),
        ("GET", "/v1/history"),
        ("POST", "/v1/devices/a/removal"),
        ("POST", "/v1/runs/run-1/commands"),
    ):
        problem_of(coordinator.http.request(method, path, headers=device.headers), 401, "not-enrolled")
