"""Who may do what, and that every refusal is a problem document without a secret in it."""

import logging
import sqlite3
import stat
from hashlib import sha256

import pytest
from coordinator_harness import InProcess, as_json, make_bundle, problem_of

from coordinator.http.problems import STATUS_OF_CODE
from coordinator.store.tables import SCHEMA_VERSION
from lamina.errors import ConfigError, StoreError, all_errors
from lamina.wire import SMALL_JSON_BYTES

ROUND = "/v1/runs/run-1/stages/0/rounds/0"
CALLS = [
    ("POST", "/v1/devices"),
    ("POST", "/v1/check-in"),
    ("GET", f"/v1/blobs/{'0' * 64}"),
    ("PUT", f"/v1/blobs/{'0' * 64}"),
    ("POST", "/v1/runs"),
    ("GET", f"/v1/manifests/{'0' * 64}/signature"),
    ("GET", "/v1/runs"),
    ("GET", "/v1/runs/run-1"),
    ("GET", "/v1/devices"),
    ("POST", "/v1/devices/phone/removal"),
    ("POST", "/v1/devices/phone/name"),
    ("GET", "/v1/history"),
    ("GET", "/v1/runs/run-1/history"),
    ("GET", "/v1/runs/run-1/devices"),
    ("PUT", "/v1/data-card"),
    ("POST", "/v1/runs/run-1/commands"),
    ("PUT", f"{ROUND}/update"),
    ("PUT", f"{ROUND}/evaluation"),
]


def test_every_route_but_health_is_in_the_list_of_calls(coordinator: InProcess) -> None:
    """So that the tests below cannot miss a new one."""
    routes = {
        (method, route.path)
        for route in coordinator.app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    }
    assert len(routes) == len(CALLS) + 1 and ("GET", "/v1/health") in routes


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic abc", "Bearer \xe9\xe9"])
def test_without_a_known_token_nothing_is_answered(coordinator: InProcess, method: str, path: str, header) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = coordinator.http.request(method, path, headers=headers, content=b"not even read")
    problem_of(answer, 401, "not-enrolled")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [call for call in CALLS if call != ("POST", "/v1/devices")])
def test_the_enrolment_token_only_enrols(coordinator: InProcess, method: str, path: str) -> None:
    problem_of(coordinator.http.request(method, path, headers=coordinator.enroller), 401, "not-enrolled")


def test_the_admin_token_is_no_device_and_a_device_token_enrols_none(coordinator: InProcess) -> None:
    problem_of(coordinator.http.post("/v1/check-in", headers=coordinator.admin), 401, "not-enrolled")
    device = coordinator.join("phone")
    problem_of(coordinator.http.post("/v1/devices", json={"name": "x"}, headers=device.headers), 401, "not-enrolled")


def test_health_needs_no_token(coordinator: InProcess) -> None:
    assert as_json(coordinator.http.get("/v1/health")) == {"status": "ok"}


def test_the_status_is_for_the_admin_and_for_devices(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    device = coordinator.join("phone")
    for headers in (coordinator.admin, device.headers):
        assert coordinator.http.get("/v1/runs", headers=headers).status_code == 200
        assert coordinator.http.get("/v1/runs/run-1", headers=headers).status_code == 200
    problem_of(coordinator.http.get("/v1/runs/run-7", headers=coordinator.admin), 404, "unknown-name")


def test_token_files_are_for_their_owner_and_stay_the_same(coordinator: InProcess) -> None:
    paths = [coordinator.state / name for name in ("enrolment.token", "admin.token")]
    before = [path.read_text() for path in paths]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600, 0o600]
    assert before[0] != before[1]
    device = coordinator.join("phone")
    coordinator.restart()
    assert [path.read_text() for path in paths] == before
    assert device.wait().reason == "no_run"  # its token is still known, too


def test_an_empty_token_file_is_refused(make_coordinator) -> None:
    coordinator = make_coordinator("one")
    (coordinator.state / "admin.token").write_text("\n")
    coordinator.stop()
    with pytest.raises(ConfigError, match="holds no token"):
        coordinator.start()
    (coordinator.state / "admin.token").unlink()
    coordinator.start()


def test_device_tokens_are_not_in_the_state_folder_nor_in_the_log(coordinator: InProcess, caplog) -> None:
    with caplog.at_level(logging.DEBUG):
        coordinator.publish(make_bundle())
        device = coordinator.join("phone")
        device.check_in()
        coordinator.http.get("/v1/runs", headers={"Authorization": "Bearer guessed-secret"})
    token = device.enrolled.device_token
    coordinator.restart()
    found = [path for path in coordinator.state.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert found == []
    assert token not in caplog.text and "guessed-secret" not in caplog.text


def test_a_name_is_given_once(coordinator: InProcess) -> None:
    coordinator.join("phone")
    answer = coordinator.http.post("/v1/devices", json={"name": "phone"}, headers=coordinator.enroller)
    assert "'phone'" in problem_of(answer, 422, "config")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"name": ""}', b'{"name": "a/b"}', b'{"name": "a", "x": 1}', b"\xff"])
def test_a_malformed_message_is_refused(coordinator: InProcess, body: bytes) -> None:
    answer = coordinator.http.post("/v1/devices", content=body, headers=coordinator.enroller)
    assert "the enrolment" in problem_of(answer, 422, "config")


@pytest.mark.parametrize(
    ("field", "value"),
    [("engine", "abacus"), ("train_examples", 0), ("test_examples", -1), ("modalities", "motion"), ("extra", 1)],
)
def test_a_check_in_with_an_illegal_value_is_refused_by_name(coordinator: InProcess, field: str, value) -> None:
    device = coordinator.join("phone")
    facts = {"engine": "torch", "modalities": ["motion"], "train_examples": 1, "test_examples": 0, field: value}
    answer = coordinator.http.post("/v1/check-in", json=facts, headers=device.headers)
    assert field in problem_of(answer, 422, "config")


def test_a_check_in_for_an_unknown_run_is_refused(coordinator: InProcess) -> None:
    assert "'run-9'" in problem_of(coordinator.join("phone").try_check_in(run="run-9"), 404, "unknown-name")


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_json_body_above_the_limit_is_refused(coordinator: InProcess, is_announced: bool) -> None:
    headers = dict(coordinator.enroller)
    if is_announced:
        headers["Content-Length"] = str(SMALL_JSON_BYTES + 1)
        answer = coordinator.http.post("/v1/devices", content=b"{}", headers=headers)
    else:
        pieces = (b" " * 1024 for _ in range(SMALL_JSON_BYTES // 1024 + 1))
        answer = coordinator.http.post("/v1/devices", content=pieces, headers=headers)
    assert str(SMALL_JSON_BYTES) in problem_of(answer, 413, "too-large")


def test_unknown_addresses_and_methods_are_problems_too(coordinator: InProcess) -> None:
    assert "/v2/nothing" in problem_of(coordinator.http.get("/v2/nothing"), 404, "unknown-name")
    answer = coordinator.http.delete("/v1/runs")
    problem_of(answer, 405, "protocol")
    assert answer.headers["allow"]


def test_a_bug_is_answered_with_a_problem_and_logged(coordinator: InProcess, monkeypatch, caplog) -> None:
    monkeypatch.setattr("coordinator.view.status.list_runs", lambda house: 1 / 0)
    coordinator.http._transport._inner.raise_app_exceptions = False
    answer = coordinator.http.get("/v1/runs", headers=coordinator.admin)
    assert "ZeroDivisionError" in problem_of(answer, 500, "lamina")
    assert "ZeroDivisionError" in caplog.text and "GET /v1/runs" in caplog.text


def test_every_status_belongs_to_a_code_of_lamina() -> None:
    assert set(STATUS_OF_CODE) <= set(all_errors())


def test_a_newer_database_is_left_alone(coordinator: InProcess, make_coordinator) -> None:
    other = make_coordinator("newer")
    other.stop()
    with sqlite3.connect(other.state / "coordinator.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="schema version 99"):
        other.start()
    with sqlite3.connect(other.state / "coordinator.sqlite") as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.close()
    other.start()


def enrolment(name: str = "phone", secret: str = "s" * 43) -> dict[str, str]:
    return {"name": name, "token_sha256": sha256(secret.encode()).hexdigest()}


def test_an_enrolment_whose_answer_was_lost_is_answered_again(coordinator: InProcess) -> None:
    first = coordinator.http.post("/v1/devices", json=enrolment(), headers=coordinator.enroller)
    coordinator.restart()
    again = coordinator.http.post("/v1/devices", json=enrolment(), headers=coordinator.enroller)
    assert (first.status_code, again.status_code) == (201, 200)
    assert as_json(first) == as_json(again)
    assert as_json(first).keys() == {"device_id"}  # the device has its token already
    body = {"engine": "torch", "modalities": ["motion"], "train_examples": 1, "test_examples": 0}
    asked = coordinator.http.post("/v1/check-in", json=body, headers={"Authorization": f"Bearer {'s' * 43}"})
    assert as_json(asked)["reason"] == "no_run"


@pytest.mark.parametrize("other", [enrolment(secret="t" * 43), {"name": "phone"}])
def test_a_taken_name_is_refused_to_whoever_has_another_token(coordinator: InProcess, other: dict[str, str]) -> None:
    coordinator.http.post("/v1/devices", json=enrolment(), headers=coordinator.enroller).raise_for_status()
    refused = coordinator.http.post("/v1/devices", json=other, headers=coordinator.enroller)
    assert "`lamina device remove phone`" in problem_of(refused, 422, "config")


def test_a_token_is_that_of_one_device(coordinator: InProcess) -> None:
    coordinator.http.post("/v1/devices", json=enrolment(), headers=coordinator.enroller).raise_for_status()
    refused = coordinator.http.post("/v1/devices", json=enrolment("other"), headers=coordinator.enroller)
    assert "another device has this token" in problem_of(refused, 422, "config")


@pytest.mark.parametrize("digest", ["", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", None, 5])
def test_a_hash_of_a_token_is_64_hex_digits_or_absent(coordinator: InProcess, digest: object) -> None:
    answer = coordinator.http.post("/v1/devices", json={"name": "x", "token_sha256": digest}, headers=coordinator.enroller)
    if digest == "":
        assert answer.status_code == 201
    else:
        assert "token_sha256" in problem_of(answer, 422, "config")
