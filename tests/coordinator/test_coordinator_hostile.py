"""What devices say has bounds: hostile numbers, keys and text are refused or made harmless, and the status stays readable."""

import json
import sqlite3
from typing import Any

import pytest
from coordinator_harness import REPORT, InProcess, downgrade, make_bundle, problem_of

from lamina.wire import Assignment, TrainReport

HUGE = "9" * 400
ESCAPES = "\x1b]0;owned\x07\x1b[2J[/x]"


def raw_report(**fields: str) -> str:
    """A report as JSON whose named fields hold these texts, unquoted."""
    text = REPORT.model_dump_json()
    for name, value in fields.items():
        text = text.replace(f'"{name}":{json.dumps(getattr(REPORT, name))}', f'"{name}":{value}')
    return text


@pytest.mark.parametrize("field", ["num_examples", "loss", "train_seconds", "peak_bytes", "bytes_down", "bytes_up"])
def test_a_report_with_a_number_beyond_its_bound_is_refused_and_the_status_stays(coordinator: InProcess, field: str) -> None:
    coordinator.publish(make_bundle())
    a, _ = coordinator.join("a"), coordinator.join("b").check_in()
    work = a.work()
    answer = a.send(work, headers={"Lamina-Report": raw_report(**{field: HUGE})})
    assert field in problem_of(answer, 422, "config")
    assert coordinator.status().rounds[0].updates == ()
    assert a.send(work).status_code == 200


def test_a_failure_is_kept_as_printable_text(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    a, _ = coordinator.join("a"), coordinator.join("b").check_in()
    report = json.dumps({**json.loads(REPORT.model_dump_json()), "failed_attempts": 1, "failure": ESCAPES})
    assert a.send(a.work(), headers={"Lamina-Report": report}).status_code == 200
    raw = coordinator.http.get("/v1/runs/run-1", headers=coordinator.admin).text
    assert "\\u001b" not in raw and "\x1b" not in raw
    (update,) = coordinator.status().rounds[0].updates
    assert update.report.failure.isprintable() and "owned" in update.report.failure


def test_a_database_from_before_the_bounds_shows_its_status(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0]))
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in(), b.check_in()
    a.send(a.work())
    coordinator.stop()
    downgrade(coordinator.state, 4)
    with sqlite3.connect(coordinator.state / "coordinator.sqlite") as connection:
        connection.execute("UPDATE updates SET report = ?", (raw_report(peak_bytes=HUGE, loss="1e300"),))
    connection.close()
    coordinator.start()
    (update,) = coordinator.status().rounds[0].updates
    assert update.report.peak_bytes == 2**53 and update.report.loss == 1e39 and update.report.bytes_up == REPORT.bytes_up


def test_an_unknown_key_is_named_short_and_printable(coordinator: InProcess) -> None:
    device = coordinator.join("phone")
    key = ESCAPES * 100
    answer = coordinator.http.post("/v1/check-in", json={key: 1}, headers=device.headers)
    assert problem_of(answer, 422, "config").isprintable()
    assert len(answer.content) < 1000


@pytest.mark.parametrize("number", ["9" * 30, "9" * 5000, "-1", "1e3", "0x1", "%00", "\uff11"])
@pytest.mark.parametrize("what", ["update", "evaluation"])
def test_a_stage_or_round_that_cannot_be_is_refused(coordinator: InProcess, number: str, what: str) -> None:
    coordinator.publish(make_bundle())
    device = coordinator.join("a")
    for path in (f"stages/{number}/rounds/0", f"stages/0/rounds/{number}"):
        answer = coordinator.http.put(f"/v1/runs/run-1/{path}/{what}", json={}, headers=device.headers)
        assert 400 <= answer.status_code < 500
        assert answer.headers["content-type"] == "application/problem+json" and len(answer.content) < 2000


@pytest.mark.parametrize("host", ["[", "a b", "]", "\x7f"])
def test_a_host_header_that_is_none_is_no_bug(coordinator: InProcess, host: str) -> None:
    answer = coordinator.http.get("/v2/%1b%5b2Jnothing", headers={"Host": host})
    assert problem_of(answer, 404, "unknown-name").isprintable()


def facts(**changes: Any) -> dict[str, Any]:
    return {"engine": "torch", "modalities": ["motion"], "train_examples": 1, "test_examples": 0, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"train_examples": int(HUGE)},
        {"test_examples": 2**53 + 1},
        {"run": "../../../v1/devices?x="},
        {"modalities": ["m"] * 65},
        {"encodings": ["fp32"] * 17},
        {"role": ESCAPES},
    ],
)
def test_a_check_in_beyond_its_bounds_is_refused(coordinator: InProcess, changes: dict[str, Any]) -> None:
    device = coordinator.join("phone")
    answer = coordinator.http.post("/v1/check-in", json=facts(**changes), headers=device.headers)
    detail = problem_of(answer, 422, "config")
    assert next(iter(changes)) in detail and detail.isprintable() and len(detail) < 500


def test_an_evaluation_beyond_its_bounds_is_refused(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a", test_examples=4), coordinator.join("b")
    b.check_in()
    a.send(a.work())
    b.send(b.work())
    work = a.check_in()
    assert isinstance(work, Assignment) and work.phase == "evaluate"
    path = f"/v1/runs/{work.run}/stages/0/rounds/0/evaluation"
    for field in ("num_examples", "correct", "loss"):
        text = json.dumps({"num_examples": 4, "correct": 3, "loss": 1.0, field: 0}).replace(
            f'"{field}": 0', f'"{field}": {HUGE}'
        )
        assert field in problem_of(coordinator.http.put(path, content=text, headers=a.headers), 422, "config")
    assert a.evaluate(work).status_code == 200
    assert coordinator.status().rounds[0].test_examples == 4


def test_the_report_of_the_tests_is_within_the_bounds() -> None:
    assert TrainReport.from_json(raw_report()) == REPORT
