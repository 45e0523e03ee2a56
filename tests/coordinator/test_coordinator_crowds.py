"""The real coordinator on loopback among peers that mean it no good: silent connections, bodies that do not end, floods."""

import contextlib
import json
import logging
import os
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from coordinator_harness import InProcess, Process, make_bundle, poll, problem_of

from coordinator.http.bodies import MOST_UPDATES
from coordinator.http.connections import Limits, Sparse
from coordinator.security.private import make_private
from coordinator.security.throttle import Throttle
from lamina.wire import MAX_JSON_BYTES, SMALL_JSON_BYTES

MIB = 1 << 20
FILES = 1024
BEFORE = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
"""
QUICK = """
import coordinator.http.bodies, coordinator.settings
coordinator.http.bodies.GRACE_SECONDS = 0.5
coordinator.settings.Settings.model_fields["idle_seconds"].default = 0.5
coordinator.settings.Settings.model_rebuild(force=True)
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Process]:
    """A coordinator that may open 1024 files."""
    coordinator = Process(tmp_path / "state", BEFORE)
    yield coordinator
    coordinator.process.kill()
    coordinator.join_process()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Process]:
    """The same with limits of half a second."""
    coordinator = Process(tmp_path / "state", BEFORE + QUICK)
    yield coordinator
    coordinator.process.kill()
    coordinator.join_process()


@contextlib.contextmanager
def sockets(coordinator: Process, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that say no more than `sent`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, count + 500)), hard))
    url = httpx.URL(coordinator.url)
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            one = socket.create_connection((url.host, url.port), timeout=5)
            opened.append(one)
            with contextlib.suppress(OSError):
                one.sendall(sent)
        yield opened
    finally:
        for one in opened:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def memory_bytes(coordinator: Process) -> int:
    """What the process has resident of its own; the peak would have start-up in it."""
    text = Path(f"/proc/{coordinator.process.pid}/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert match
    return int(match.group(1)) << 10


def is_closed(one: socket.socket) -> bool:
    """Whether the other side has ended the connection, whatever it said before."""
    one.settimeout(0.01)
    try:
        while one.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def ask(coordinator: Process, headers: dict[str, str]) -> tuple[float, httpx.Response]:
    """A check-in on a connection of its own, and how long it took."""
    facts = {"engine": "torch", "modalities": ["motion"], "train_examples": 1, "test_examples": 0}
    with httpx.Client(base_url=coordinator.url, timeout=10) as http:
        began = time.monotonic()
        answer = http.post("/v1/check-in", json=facts, headers=headers)
    return time.monotonic() - began, answer


@pytest.mark.parametrize("sent", [b"", b"POST /v1/check-in HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["silent", "half a head"])
def test_more_silent_connections_than_files_stop_nobody_and_write_no_log(running: Process, sent: bytes) -> None:
    device = running.join("phone")
    before = len(running.log())
    with sockets(running, 1050, sent):
        asked = [ask(running, device.headers) for _ in range(3)]
        assert {answer.status_code for _, answer in asked} == {200}
        assert min(seconds for seconds, _ in asked) < 1
    assert len(running.log()) - before < 10_000


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /v1/health HTTP/1.1\r\n", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["silent", "half a head", "after an answer"],
)
def test_a_silent_connection_is_closed(quick: Process, sent: bytes) -> None:
    with sockets(quick, 3, sent) as opened:
        poll(lambda: all(is_closed(one) for one in opened), 10)


def test_a_head_that_drips_is_closed_too(quick: Process) -> None:
    with sockets(quick, 1, b"GET /v1/health HTTP/1.1\r\n") as (one,):

        def drips_and_is_closed() -> bool:
            with contextlib.suppress(OSError):
                one.sendall(b"X-A: b\r\n")
            return is_closed(one)

        poll(drips_and_is_closed, 10)


def test_unfinished_bodies_cost_little_and_end(quick: Process) -> None:
    device = quick.join("phone")
    token = device.headers["Authorization"]
    ask(quick, device.headers)
    head = f"POST /v1/check-in HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%s" % (SMALL_JSON_BYTES, b" " * (SMALL_JSON_BYTES - 1))
    before = memory_bytes(quick)
    with sockets(quick, 60, head.encode() + body) as opened:
        seconds, answer = ask(quick, device.headers)
        assert answer.status_code == 200 and seconds < 1
        assert memory_bytes(quick) - before < 16 * MIB
        poll(lambda: all(is_closed(one) for one in opened), 20)


@pytest.mark.parametrize("who", ["device", "enroller", "admin"])
def test_unfinished_bodies_of_many_bytes_cost_little(running: Process, who: str) -> None:
    """What is too large is not kept, and what may be large is not in memory."""
    device = running.join("phone")
    token = {"device": device.headers, "enroller": running.enroller, "admin": running.admin}[who]["Authorization"]
    path = {"device": "/v1/check-in", "enroller": "/v1/devices", "admin": "/v1/runs"}[who]
    method = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n"
    head = f"{method}Content-Length: {MAX_JSON_BYTES}\r\n\r\n".encode()
    ask(running, device.headers)
    before = memory_bytes(running)
    with sockets(running, 60, head + b"x" * (512 << 10)):
        seconds, answer = ask(running, device.headers)
        assert answer.status_code == 200 and seconds < 1
        assert memory_bytes(running) - before < 16 * MIB


def test_a_body_that_drips_is_answered_with_408(quick: Process) -> None:
    device = quick.join("phone")
    token = device.headers["Authorization"]
    head = f"POST /v1/check-in HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Length: 9000\r\n\r\n"
    with sockets(quick, 1, head.encode()) as (one,):
        one.settimeout(0.1)
        answer = b""
        until = time.monotonic() + 10
        while not answer and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                one.sendall(b" ")
                answer = one.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408") and b"application/problem+json" in answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / SPDY/3\r\n\r\n", 400),
        (b"GET /v1/health HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /v1/health HTTP/1.1\r\nX: " + b"x" * 100_000, 431),
    ],
    ids=["TLS", "version", "two lengths", "large head"],
)
def test_what_is_no_request_is_refused_with_a_problem(running: Process, sent: bytes, status: int) -> None:
    with sockets(running, 1, sent) as (one,):
        answer = b""
        with contextlib.suppress(OSError):
            while piece := one.recv(4096):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert json.loads(body)["code"] == "protocol"


def test_a_flood_of_what_is_no_request_writes_little_log(running: Process) -> None:
    before = len(running.log())
    for _ in range(300):
        with sockets(running, 1, b"nonsense\r\n\r\n") as (one,), contextlib.suppress(OSError):
            one.recv(4096)
    assert len(running.log()) - before < 5000


def test_one_device_sends_few_updates_at_a_time(running: Process) -> None:
    running.publish(make_bundle())
    a, b = running.join("a"), running.join("b")
    b.check_in()
    a.check_in()
    work = a.work()
    path = f"/v1/runs/{work.run}/stages/0/rounds/0/update"
    head = (
        f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {a.headers['Authorization']}\r\nContent-Length: 1000\r\n"
        f"Content-Digest: sha-256=:{'A' * 43}=:\r\n"
        'Lamina-Report: {"num_examples":1,"loss":0.5,"train_seconds":1,"peak_bytes":1,"bytes_down":1,"bytes_up":1}\r\n\r\n'
    )
    with sockets(running, 12, head.encode() + b"x") as opened:
        time.sleep(0.5)  # the others wait for their bodies and answer nothing, which is the point
        answers = []
        for one in opened:
            one.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                answers.append(one.recv(4096))
    assert len(answers) == 12 - MOST_UPDATES and all(
        b" 429 " in answer and b"retry-after" in answer.lower() for answer in answers
    )


def test_enrolments_of_one_address_are_limited(make_coordinator) -> None:
    coordinator: InProcess = make_coordinator("one", enrolment_burst=3, enrolments_per_minute=1)
    for name in "abc":
        coordinator.join(name)
    answer = coordinator.http.post("/v1/devices", json={"name": "d"}, headers=coordinator.enroller)
    problem_of(answer, 429, "busy")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    coordinator.join("calibrator", role="calibrator")  # the admin is not held up


def test_wrong_tokens_of_one_address_are_limited_and_right_ones_are_not(make_coordinator) -> None:
    coordinator: InProcess = make_coordinator("one", failure_burst=3, failures_per_minute=1)
    device = coordinator.join("a")
    for token in ("Bearer x", "Bearer y", ""):
        problem_of(coordinator.http.get("/v1/runs", headers={"Authorization": token}), 401, "not-enrolled")
    answer = coordinator.http.get("/v1/runs", headers={"Authorization": "Bearer z"})
    problem_of(answer, 429, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    assert device.wait().reason == "no_run"


def test_a_bucket_fills_again_and_no_number_of_addresses_fills_the_memory() -> None:
    now = [0.0]
    throttle = Throttle(per_minute=60, burst=2, clock=lambda: now[0])
    assert [throttle.wait_seconds("10.0.0.1") for _ in range(3)] == [0, 0, 1]
    assert throttle.wait_seconds("10.0.0.2") == 0
    now[0] = 1.0
    assert throttle.wait_seconds("10.0.0.1") == 0 and throttle.wait_seconds("10.0.0.1") > 0
    assert [throttle.wait_seconds(f"2001:db8::{i:x}") > 0 for i in range(3)] == [False, False, True]
    for i in range(30_000):
        throttle.wait_seconds(f"10.1.{i >> 8}.{i & 255}")
    assert len(throttle._left) <= 10_000


def test_blobs_are_for_whoever_has_the_token(coordinator: InProcess) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    answer = coordinator.http.get(f"/v1/blobs/{next(iter(bundle.blobs))}", headers=coordinator.admin)
    assert answer.headers["cache-control"].startswith("private")


def test_nobody_else_on_the_machine_reads_the_state(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for _ in range(2):
        coordinator = Process(state)
        if not (state / "blobs").exists() or not list((state / "blobs").iterdir()):
            coordinator.publish(make_bundle())
            a, b = coordinator.join("a"), coordinator.join("b")
            b.check_in()
            a.check_in()
            a.send(a.work()).raise_for_status()
        coordinator.terminate()
        modes = {path: path.stat().st_mode & 0o777 for path in (state, *state.rglob("*"))}
        assert len(modes) > 15
        assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
        assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
        for path in modes:  # as an older version left it
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_folder_that_holds_other_things_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "notes.txt").chmod(0o644)
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        make_private(tmp_path)
    finally:
        os.umask(before)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "notes.txt").stat().st_mode & 0o777 == 0o644


def test_there_are_fewer_connections_than_files() -> None:
    limits = Limits.of_machine(10**6, 10)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits.per_address < limits.connections < soft / 2


def test_the_same_message_is_logged_a_few_times_a_minute() -> None:
    sparse = Sparse()

    def passes(second: float, message: str) -> bool:
        record = logging.makeLogRecord({"msg": message, "levelno": logging.WARNING})
        record.created = second
        return sparse.filter(record)

    assert sum(passes(0, "again") for _ in range(100)) == Sparse.MOST
    assert passes(0, "another") and passes(61, "again")
