"""A message that was damaged on its way changes nothing, and its sender learns that it was damaged and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from coordinator_harness import REPORT, Device, InProcess, make_bundle, path_of, problem_of

from lamina.digests import CONTENT_DIGEST, REQUEST_DIGEST, content_digest, request_digest
from lamina.plans.plan import Cohort
from lamina.wire import CheckIn


@dataclass(frozen=True)
class Request:
    """As it leaves a device, with both digests."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, method: str, path: str, headers: dict[str, str], body: bytes) -> "Request":
        headers = headers | {CONTENT_DIGEST: content_digest(body)}
        return cls(method, path, headers | {REQUEST_DIGEST: request_digest(method, path, headers)}, body)

    def send(self, coordinator: InProcess, **damaged: str | bytes) -> httpx.Response:
        """`damaged` replaces `path`, `body`, or a header (its name with `_` for `-`)."""
        headers = self.headers | {name.replace("_", "-"): value for name, value in damaged.items() if isinstance(value, str)}
        path, body = str(headers.pop("path", self.path)), damaged.get("body", self.body)
        return coordinator.http.request(self.method, path, content=body, headers=headers)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[InProcess]:
    made = InProcess(tmp_path / "state")
    made.publish(make_bundle(cohort=Cohort(size=2)))
    yield made
    made.stop()


def update_of(device: Device) -> Request:
    work = device.work()
    headers = {**device.headers, "Lamina-Report": REPORT.model_dump_json()}
    return Request.of("PUT", path_of(work, "update"), headers, device.body(work))


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def test_no_damaged_part_of_an_update_is_believed(coordinator: InProcess) -> None:
    first, second = coordinator.join("a"), coordinator.join("b")
    second.check_in()
    update = update_of(first)
    report = update.headers["Lamina-Report"]
    damaged = {
        "path": update.path.replace("rounds/0", "rounds/1"),
        "Authorization": update.headers["Authorization"][:-1] + "~",
        "Lamina_Report": report.replace(f'"num_examples":{REPORT.num_examples}', f'"num_examples":{REPORT.num_examples + 1}'),
        "Content_Encoding": "zstd",
        "Content_Digest": content_digest(b"other"),
        "Lamina_Request_Digest": content_digest(b"other"),
    }
    assert damaged["Lamina_Report"] != report
    for part, value in damaged.items():
        assert "send it again" in problem_of(update.send(coordinator, **{part: value}), 400, "hash-mismatch"), part
    for index in range(0, len(update.body), 97):
        answer = update.send(coordinator, body=flipped(update.body, index))
        assert "send it again" in problem_of(answer, 400, "hash-mismatch")
    assert coordinator.status().rounds[0].updates == ()

    assert update.send(coordinator).status_code == 200
    (accepted,) = coordinator.status().rounds[0].updates
    assert (accepted.device, accepted.report.num_examples) == ("a", REPORT.num_examples)


def test_a_name_that_was_damaged_on_its_way_is_not_enrolled(coordinator: InProcess) -> None:
    body = b'{"name": "device-0"}'
    enrolment = Request.of("POST", "/v1/devices", coordinator.enroller, body)
    problem_of(enrolment.send(coordinator, body=body.replace(b"-0", b"-1")), 400, "hash-mismatch")
    assert enrolment.send(coordinator).status_code == 201
    assert coordinator.join("device-1").name == "device-1"


def test_a_request_without_digests_is_taken_as_before(coordinator: InProcess) -> None:
    assert coordinator.join("old").try_check_in().status_code == 200


def test_every_answer_brings_the_digest_of_its_body(coordinator: InProcess) -> None:
    device = coordinator.join("a")
    facts = CheckIn(engine="onnxruntime", modalities=("motion",), train_examples=1, test_examples=0)
    answers = [
        coordinator.http.post("/v1/check-in", content=facts.to_json(), headers=device.headers),
        coordinator.http.get("/v1/runs/run-1", headers=coordinator.admin),
        coordinator.http.get("/v1/runs/run-9", headers=coordinator.admin),
        coordinator.http.get("/v1/nothing"),
        coordinator.http.get("/v1/runs"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 404, 401]
    for answer in answers:
        assert answer.headers[CONTENT_DIGEST] == content_digest(answer.content)
