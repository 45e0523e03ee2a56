"""Who is here, whom a run waits for, and what each device did last."""

import json
import logging
import sqlite3

import pytest
from coordinator_harness import REPORT, Coordinator, FakeClock, InProcess, make_bundle

from coordinator.view.roster import MOST_DEVICES
from lamina.plans.plan import Cohort
from lamina.wire import DeviceList, DeviceState


def devices_of(coordinator: Coordinator, run: str = "run-1") -> DeviceList:
    answer = coordinator.http.get(f"/v1/runs/{run}/devices", headers=coordinator.admin)
    assert answer.status_code == 200, answer.text
    return DeviceList.model_validate_json(answer.content)


def by_name(devices: DeviceList) -> dict[str, DeviceState]:
    return {state.device: state for state in devices.devices}


def test_a_run_that_waits_for_its_cohort_names_who_is_not_here(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=4)))
    pis = [coordinator.join(f"pi-{number}") for number in range(3)]
    pis[2].check_in()
    clock.jump(200)  # past presence_seconds
    pis[0].check_in()

    devices = devices_of(coordinator)
    assert (devices.here, devices.awaited, devices.to_join, devices.more) == (1, 2, 1, 0)
    states = by_name(devices)
    assert [(name, state.awaited) for name, state in states.items()] == [
        ("pi-1", "check_in"),  # never asked for work
        ("pi-2", "check_in"),
        ("pi-0", "none"),
    ]
    assert states["pi-1"].seen_seconds is None
    assert (states["pi-2"].seen_seconds, states["pi-2"].is_here) == (200, False)
    assert (states["pi-0"].seen_seconds, states["pi-0"].is_here) == (0, True)


def test_a_round_names_whose_update_and_whose_evaluation_it_waits_for(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=2, lease_seconds=1000)))
    a, b = (coordinator.join(name, test_examples=4) for name in ("pi-a", "pi-b"))
    a.check_in(), b.check_in()
    work = a.work()
    b.work()
    clock.jump(30)
    a.send(work)
    clock.jump(5)

    states = by_name(devices_of(coordinator))
    assert (states["pi-b"].awaited, states["pi-a"].awaited) == ("update", "none")
    assert (states["pi-b"].did, states["pi-b"].did_seconds) == ("took its place in round 0 of stage 0 of run-1", 35)
    assert (states["pi-a"].did, states["pi-a"].did_seconds) == ("sent its update of round 0 of stage 0 of run-1", 5)

    b.send(b.work())
    a.evaluate(a.work())
    states = by_name(devices_of(coordinator))
    assert (states["pi-b"].awaited, states["pi-a"].awaited) == ("evaluation", "none")
    assert states["pi-a"].did == "evaluated round 0 of stage 0 of run-1"


def test_the_last_refusal_of_a_device_is_remembered_and_survives_a_restart(
    coordinator: InProcess, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1)))
    device = coordinator.join("pi-1")
    work = device.work()
    with caplog.at_level(logging.INFO, "lamina.coordinator"):
        for _ in range(5):  # the same again is written down once
            assert device.send(work, b"no tensor file").status_code == 422
    clock.jump(60)
    coordinator.restart()

    (state,) = devices_of(coordinator).devices
    assert state.refusal.startswith("tensor-file: this is no valid tensor file")
    assert state.refused_seconds == 60
    assert [record.getMessage() for record in caplog.records if "refused" in record.getMessage()] == [
        f"pi-1 is refused: {state.refusal}"
    ]
    assert device.send(device.work()).status_code == 200
    assert device.check_in(engine="executorch").kind == "refused"
    (state,) = devices_of(coordinator).devices
    assert state.refusal.startswith("refused: run-1 has programs for onnxruntime, torch, not for executorch")


def test_a_fleet_does_not_make_the_list_long(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=500)))
    for number in range(MOST_DEVICES + 10):
        coordinator.join(f"pi-{number}")
    devices = devices_of(coordinator)
    assert (len(devices.devices), devices.more, devices.awaited) == (MOST_DEVICES, 10, MOST_DEVICES + 10)
    assert devices.to_join == 500 - (MOST_DEVICES + 10)


def test_a_finished_run_waits_for_nobody(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
    device = coordinator.join("pi-1")
    device.send(device.work())
    devices = devices_of(coordinator)
    assert (devices.awaited, devices.to_join) == (0, 0)
    assert coordinator.http.get("/v1/runs/run-9/devices", headers=coordinator.admin).status_code == 404
    assert coordinator.http.get("/v1/runs/run-1/devices").status_code == 401


def test_the_log_speaks_of_devices_by_name(coordinator: InProcess, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, lease_seconds=10)))
    a, b = (coordinator.join(name, test_examples=4) for name in ("pi-a", "pi-b"))
    with caplog.at_level(logging.DEBUG, "lamina.coordinator"):
        a.work()
        clock.jump(11)
        b.send(b.work())
        b.evaluate(b.work())
    text = caplog.text
    assert "pi-a fell silent, pi-b has its place in round 0 of stage 0" in text
    assert "update of pi-b accepted" in text and "evaluation of pi-b accepted" in text
    assert "dev-" not in text


@pytest.mark.parametrize("digits", [17, 400, 6000])
def test_numbers_that_an_older_coordinator_took_do_not_break_the_status(coordinator: InProcess, digits: int) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1)))
    device = coordinator.join("pi-1")
    device.send(device.work())
    coordinator.stop()
    with sqlite3.connect(coordinator.state / "coordinator.sqlite") as connection:
        report = REPORT.model_dump_json().replace("9000000", "9" * digits)
        assert "9" * digits in report
        connection.execute("UPDATE updates SET report = ?", (report,))
    connection.close()
    coordinator.start()

    (update,) = coordinator.status().rounds[0].updates
    assert update.report.peak_bytes == 2**53
    assert update.report.loss == 0.5
    assert json.loads(coordinator.http.get("/v1/runs/run-1", headers=coordinator.admin).text)["run"] == "run-1"
