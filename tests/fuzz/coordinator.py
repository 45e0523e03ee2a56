"""Hostile requests to a real coordinator, one at a time, over connections of their own.

    python -m tests.fuzz.coordinator --messages 10000 --seed 0

Legal requests of every route are changed: what stands in the body, the headers, the address, and the frame of HTTP around them.
Some carry an admin's, some a device's, some an enrolment's token, so that all parsers behind them are reached.
"""

import argparse
import errno
import json
import os
import socket
import sys
from base64 import b64encode
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[1] / "coordinator"))

from coordinator_harness import REPORT, Device, Process, make_bundle, work_until_finished

from lamina.bundles.keys import VARIABLE, own_key
from lamina.plans.plan import Cohort
from tests.fuzz.mutations import HOSTILE_TEXT, damaged, mutated

_ANSWER_SECONDS = 20.0
_WARM_UP = 300
_FRAMING = ("Content-Length", "Transfer-Encoding")


@dataclass
class Outcome:
    """`growth_bytes` is what the coordinator's resident memory grew by after a tenth of the messages, and 300 at least."""

    messages: int
    statuses: Counter[int] = field(default_factory=Counter)
    server_errors: list[str] = field(default_factory=list)
    growth_bytes: int = 0
    log_bytes: int = 0
    tracebacks: int = 0
    has_finished: bool = False
    """Whether honest devices finished a run afterwards."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    def raw(self) -> bytes:
        headers = {"Host": "coordinator", "Connection": "close", "Content-Length": str(len(self.body))} | self.headers
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogatepass") + self.body


def attack(folder: Path, messages: int, seed: int) -> Outcome:
    random, outcome = Random(f"{seed}/coordinator"), Outcome(messages)
    coordinator = Process(folder / "state")
    try:
        coordinator.publish(make_bundle(cohort=Cohort(size=3)))
        honest = [coordinator.join(name) for name in ("ann", "ben")]  # before this address has to wait for that
        author = _Author(random, coordinator, coordinator.join("mallory"))
        before = 0
        for index in range(messages):
            if index == max(_WARM_UP, messages // 10):
                before = _resident_bytes(coordinator)
            raw, is_framed = author.request()
            status = _status_of(coordinator, raw, is_framed)
            outcome.statuses[status] += 1
            if status >= 500:
                outcome.server_errors.append(f"{status}: {raw[:300]!r}")
        outcome.growth_bytes = _resident_bytes(coordinator) - before
        run = coordinator.publish(make_bundle(cohort=Cohort(size=2), seed=1))
        for device in honest:
            device.facts["run"] = run
        outcome.has_finished = work_until_finished(coordinator, honest, run).state == "finished"
    finally:
        if coordinator.process.poll() is None:
            coordinator.terminate()
    log = Path(folder / "state.log").read_bytes()
    outcome.log_bytes, outcome.tracebacks = len(log), log.count(b"Traceback")
    return outcome


class _Author:
    """Writes requests. `device` has a place in the round, so that its uploads are read to their end."""

    def __init__(self, random: Random, coordinator: Process, device: Device) -> None:
        self._random, self._coordinator, self._device = random, coordinator, device
        self._device_token = device.headers["Authorization"]
        self._admin, self._enroller = coordinator.admin["Authorization"], coordinator.enroller["Authorization"]
        for name in ("other-1", "other-2"):
            coordinator.join(name).check_in()
        self._work = device.check_in()
        self._manifest = make_bundle(seed=2).manifest
        self._blob = next(iter(self._manifest.blobs))

    def request(self) -> tuple[bytes, bool]:
        """The bytes, and whether HTTP can tell where they end."""
        is_framed = True
        makers = (self._enrol, self._check_in, self._check_in, self._update, self._evaluation, self._publish, self._read)
        request = self._random.choice((*makers, self._operate))()
        if self._random.random() < 0.1:
            request.path = self._hostile_path(request.path)
        if self._random.random() < 0.15:
            name = self._random.choice((*_FRAMING, "Content-Encoding", "Content-Digest", "Range", "X"))
            request.headers[name] = self._hostile_header()
            is_framed = name not in _FRAMING
        if self._random.random() < 0.01:  # few: who shows wrong tokens has to wait
            request.headers["Authorization"] = self._hostile_header()
        if self._random.random() < 0.05:
            request.method = self._random.choice(("PATCH", "DELETE", "OPTIONS", "HEAD", "GET", "POST", "PUT"))
        raw = request.raw()
        return (damaged(self._random, raw), False) if self._random.random() < 0.05 else (raw, is_framed)

    def _enrol(self) -> Request:
        body = mutated(self._random, {"name": f"m-{self._random.randrange(50)}", "token_sha256": "0" * 64})
        return Request("POST", "/v1/devices", self._as(self._enroller), body)

    def _check_in(self) -> Request:
        message: dict[str, Any] = {
            "engine": "onnxruntime",
            "modalities": ["motion"],
            "train_examples": 10,
            "test_examples": 4,
            "run": "run-1",
            "encodings": ["fp32", "fp16", "int8"],
            "compressions": ["none", "zstd"],
            "role": "device",
        }
        return Request("POST", "/v1/check-in", self._as(self._device_token), mutated(self._random, message))

    def _update(self) -> Request:
        body = self._device.body(self._work) if hasattr(self._work, "upload_encoding") else b"no work"
        body = damaged(self._random, body) if self._random.random() < 0.5 else body
        report = mutated(self._random, json.loads(REPORT.model_dump_json())).decode("utf-8", "replace")
        headers = self._as(self._device_token) | {"Content-Digest": f"sha-256=:{b64encode(sha256(body).digest()).decode()}:"}
        if self._random.random() < 0.8:
            headers["Lamina-Report"] = "".join(letter for letter in report if letter.isprintable())[:20_000]
        return Request("PUT", self._round_path("update"), headers, body)

    def _evaluation(self) -> Request:
        body = mutated(self._random, {"num_examples": 4, "correct": 3, "loss": 0.5})
        return Request("PUT", self._round_path("evaluation"), self._as(self._device_token), body)

    def _publish(self) -> Request:
        body = mutated(self._random, json.loads(self._manifest.to_json()))
        headers = self._as(self._admin)
        if self._random.random() < 0.7:
            headers["Lamina-Signature"] = own_key().sign(body).model_dump_json()
        elif self._random.random() < 0.5:
            signature = json.loads(own_key().sign(body).model_dump_json())
            headers["Lamina-Signature"] = mutated(self._random, signature).decode("utf-8", "replace")[:10_000]
        return Request("POST", "/v1/runs", headers, body)

    def _read(self) -> Request:
        path = self._random.choice(
            (
                "/v1/runs",
                "/v1/runs/run-1",
                f"/v1/blobs/{self._blob}",
                f"/v1/manifests/{self._blob}/signature",
                "/v1/health",
                "/",
            )
        )
        headers = self._as(self._device_token)
        if self._random.random() < 0.5:
            headers["Range"] = self._random.choice(("bytes=0-", "bytes=5-1", "bytes=-0", "bytes=99999999999999999999-", "x"))
        return Request("GET", path, headers)

    def _operate(self) -> Request:
        """Operators' routes, whatever they are: the app says which there are."""
        method, path = self._random.choice(operators_routes())
        for name in ("{run}", "{name}", "{device}", "{digest}", "{stage}", "{number}"):
            path = path.replace(name, self._hostile_part() if self._random.random() < 0.7 else "0")
        body = mutated(self._random, {"to": 0, "stage": 0, "round": 0, "name": "x", "reason": "x"})
        return Request(method, path, self._as(self._admin), body)

    def _round_path(self, what: str) -> str:
        run, stage, round_number = "run-1", "0", "0"
        if self._random.random() < 0.1:
            stage = self._hostile_part()
        if self._random.random() < 0.1:
            round_number = self._hostile_part()
        return f"/v1/runs/{run}/stages/{stage}/rounds/{round_number}/{what}"

    def _hostile_path(self, path: str) -> str:
        parts = path.split("/")
        parts[self._random.randrange(len(parts))] = self._hostile_part()
        return "/".join(parts) or "/"

    def _hostile_part(self) -> str:
        text = self._random.choice((*HOSTILE_TEXT, "-1", "9" * 30, "1e3", "run-9999999999", "run-0", "٣"))[:3000]
        return quote(text.encode("utf-8", "replace"), safe="")

    def _hostile_header(self) -> str:
        text = self._random.choice(
            (*HOSTILE_TEXT, "-1", "9" * 30, "chunked", "gzip", "zstd", "bytes=0-", "Bearer ", "sha-256=:::")
        )
        return "".join(letter for letter in text if letter.isprintable())[:20_000]

    def _as(self, token: str) -> dict[str, str]:
        return {"Authorization": token, "Content-Type": "application/json"}


@cache
def operators_routes() -> list[tuple[str, str]]:
    """(method, path) of the routes that no device asks."""
    from coordinator.app import create_app
    from coordinator.settings import Settings

    with TemporaryDirectory() as folder:
        app = create_app(Settings(state=Path(folder) / "state"))
        rows = [
            (method, route.path)
            for route in app.routes
            for method in sorted(getattr(route, "methods", None) or ())
            if route.path.startswith("/v1/") and not route.path.endswith(("/update", "/evaluation", "/check-in"))
        ]
        app.state.house.close()
    return rows


def _status_of(coordinator: Process, raw: bytes, is_framed: bool) -> int:
    """The status of the answer; 0 if the connection ended without one, as it may where the request is no HTTP."""
    host, port = coordinator.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS) as connection:
        answer = b""
        with suppress(ConnectionError):  # the coordinator may have read enough
            connection.sendall(raw)
        try:
            if not is_framed:  # the end of what is sent is then the only end
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer = answer or piece[:64]
        except TimeoutError as error:
            raise AssertionError(f"no answer within {_ANSWER_SECONDS:.0f} s to {raw[:500]!r}") from error
        except OSError as error:  # it closed, or was never connected any more
            assert error.errno in (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE), error
    parts = answer.split(b" ", 2)
    return int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else 0


def _resident_bytes(coordinator: Process) -> int:
    lines = Path(f"/proc/{coordinator.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ[VARIABLE] = f"{folder}/keys"
        outcome = attack(Path(folder), chosen.messages, chosen.seed)
    print(json.dumps(vars(outcome) | {"statuses": dict(sorted(outcome.statuses.items()))}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
