"""What a coordinator refuses of a user, and how a turn ends: over a real socket, message by message."""

import time
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lamina.bundles.bundle import MANIFEST
from lamina.digests import CONTENT_DIGEST
from lamina.errors import ConfigError
from lamina.split.bodies import pack, unpack
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, LOGITS, task_adapter
from lamina.split.wire import SplitCheckIn, SplitReport, features_down, features_up, gradients_up
from lamina.wire import REPORT_HEADER, Enrolment
from tests.split.house import Loopback, loopback, varied

FACTS = SplitCheckIn(engine="onnxruntime", modalities=("audio", "image"), train_examples=8, test_examples=0)
REPORT = SplitReport(
    num_examples=8, loss={"image": 1.0, "audio": 1.0}, fused_loss=1.0, train_seconds=1, peak_bytes=1, bytes_down=1, bytes_up=1
)


class User:
    """Sends single messages, right or wrong ones."""

    def __init__(self, house: Loopback, run: str, name: str) -> None:
        self._http = httpx.Client(base_url=house.url)
        answer = self.send("POST", "/v1/devices", Enrolment(name=name).to_json(), token=house.enrolment_token)
        self.token = answer.json()["device_token"]
        self.run = run

    def send(self, method: str, path: str, body: bytes, token: str | None = None, **headers: str) -> httpx.Response:
        digest = f"sha-256=:{b64encode(sha256(body).digest()).decode()}:"
        given = {"Authorization": f"Bearer {token or self.token}", CONTENT_DIGEST: digest} | headers
        return self._http.request(method, path, content=body, headers=given)

    def close(self) -> None:
        self._http.close()

    def check_in(self, **changes: Any) -> dict[str, Any]:
        return self.send("POST", "/v1/split/check-in", FACTS.model_copy(update={"run": self.run} | changes).to_json()).json()

    def step(self, kind: str, step: int, body: bytes, examples: int = 8, round: int = 0, **headers: str) -> httpx.Response:
        return self.send("POST", self.path(f"steps/{step}/{kind}?examples={examples}", round), body, **headers)

    def update(self, body: bytes, round: int = 0, report: SplitReport = REPORT) -> httpx.Response:
        return self.send("PUT", self.path("update", round), body, **{REPORT_HEADER: report.model_dump_json()})

    def path(self, rest: str, round: int = 0) -> str:
        return f"/v1/split/runs/{self.run}/rounds/{round}/{rest}"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("house")) as found:
        yield found


@pytest.fixture(scope="module")
def bundle(server_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SplitManifest]:
    """Two users, no evaluation."""
    changes = {"users": {"size": 2, "min_users": 1, "evaluate_every": 0, "lease_seconds": 30}}
    return varied(server_bundle, tmp_path_factory.mktemp("bundle"), **changes)


@pytest.fixture
def two(house: Loopback, bundle: tuple[Path, SplitManifest]) -> Iterator[tuple[User, User, SplitManifest]]:
    """A new run; both users have checked in, and it is the turn of the first."""
    house.clock = time.time
    run = house.publish(*bundle)
    first, second = User(house, run, f"{run}-a"), User(house, run, f"{run}-b")
    assert first.check_in()["reason"] == "cohort"
    assert second.check_in()["detail"].endswith(f"turn of {run}-a")
    assert first.check_in()["kind"] == "work"
    yield first, second, bundle[1]
    first.close()
    second.close()


def _up(manifest: SplitManifest, seed: int = 0, examples: int = 8) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {s.name: random.normal(size=s.shape).astype(np.float32) for s in features_up(manifest.plan, examples)}


def _gradients(manifest: SplitManifest, scale: float = 0.1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    specs = gradients_up(manifest.plan, 8, False)
    return {s.name: (scale * random.normal(size=s.shape)).astype(np.float32) for s in specs}


def _problem(answer: httpx.Response) -> tuple[int, str, str]:
    found = answer.json()
    return answer.status_code, found["code"], found["detail"]


def test_nobody_without_a_token_is_heard(two: tuple, house: Loopback) -> None:
    user = two[0]
    for method, path in (("POST", "/v1/split/check-in"), ("POST", user.path("steps/0/features?examples=8"))):
        assert user.send(method, path, b"{}", token="wrong-token-wrong").status_code == 401
    assert user.send("POST", "/v1/split/runs", b"{}").status_code == 401  # a device is no admin
    assert user.send("GET", f"/v1/split/runs/{user.run}", b"").status_code == 200
    assert _problem(user.send("GET", "/v1/split/runs/split-99", b""))[1] == "unknown-name"
    assert _problem(user.send("GET", "/v1/split/runs/..%2f..", b""))[0] == 404


def test_a_user_that_cannot_take_part_is_told_why(two: tuple) -> None:
    user = two[0]
    assert "needs 'audio'" in user.check_in(modalities=("image",))["detail"]
    assert "no programs for torch" in user.check_in(engine="torch")["detail"]


def test_only_the_user_whose_turn_it_is_may_step(two: tuple) -> None:
    first, second, manifest = two
    body = pack(_up(manifest), "fp32")
    assert _problem(second.step("features", 0, body))[1] == "round-closed"
    assert _problem(first.step("features", 0, body, round=1))[1] == "round-closed"
    assert first.step("features", 0, body).status_code == 200


def test_bad_activations_are_refused_and_the_turn_goes_on(two: tuple) -> None:
    user, _, manifest = two
    good = _up(manifest)
    bodies = {
        "holds NaN": _raw(good | {"image": np.full_like(good["image"], np.nan)}),
        "expected F32 of": _raw(good | {"image": good["image"][:, :3]}),
        "F64": _raw(good | {"image": good["image"].astype(np.float64)}),
        "are missing": _raw({"image": good["image"]}),
        "no valid tensor file": b"\xff" * 100,
    }
    for reason, body in bodies.items():
        status, code, detail = _problem(user.step("features", 0, body))
        assert (status, code) == (422, "tensor-file") and reason in detail, detail
    body = pack(good, "fp32")
    for examples in (0, 9, 10**9, 7):
        assert user.step("features", 0, body, examples=examples).status_code in (409, 422), examples
    assert _problem(user.step("features", 0, b"\0" * (1 << 20)))[0] == 413
    wrong = f"sha-256=:{b64encode(sha256(b'other').digest()).decode()}:"
    assert _problem(user.step("features", 0, body, **{CONTENT_DIGEST: wrong}))[1] == "hash-mismatch"
    huge = {name: np.full_like(value, 3e38) for name, value in good.items()}
    assert _problem(user.step("features", 0, pack(huge, "fp32")))[1] == "update-rejected"
    assert user.step("features", 0, body).status_code == 200


def test_gradients_that_would_break_the_model_change_nothing(two: tuple) -> None:
    user, _, manifest = two
    up = pack(_up(manifest), "fp32")
    before = user.step("features", 0, up).content
    bad = {name: np.full_like(value, 3e38) for name, value in _gradients(manifest).items()}
    assert _problem(user.step("gradients", 0, pack(bad, "fp32")))[1] == "update-rejected"
    assert user.step("features", 0, up).content == before
    good = user.step("gradients", 0, pack(_gradients(manifest), "fp32"))
    assert good.status_code == 200
    downs = unpack(good.content, features_up(manifest.plan, 8), "fp32")
    assert all(np.isfinite(value).all() and value.any() for value in downs.values())


def test_steps_come_in_order_and_repeating_one_gives_the_same_answer(two: tuple) -> None:
    user, _, manifest = two
    up, gradients = pack(_up(manifest), "fp32"), pack(_gradients(manifest), "fp32")
    assert _problem(user.step("gradients", 0, gradients))[1] == "round-closed"
    assert _problem(user.step("features", 1, up))[1] == "round-closed"
    first = user.step("features", 0, up)
    assert user.step("features", 0, up).content == first.content
    assert _problem(user.step("features", 0, pack(_up(manifest, seed=9), "fp32")))[1] == "round-closed"
    assert _problem(user.update(_update(manifest)))[1] == "update-rejected"  # in the middle of a step
    down = user.step("gradients", 0, gradients)
    assert user.step("gradients", 0, gradients).content == down.content
    # Had the repeated gradients counted, the features of the same activations would have moved twice.
    second = unpack(user.step("features", 1, up).content, features_down(manifest.plan, 8, False), "fp32")
    before = unpack(first.content, features_down(manifest.plan, 8, False), "fp32")
    assert not np.array_equal(second[LOGITS], before[LOGITS])


def test_a_user_that_begins_again_finds_the_coordinator_as_it_was_at_the_start_of_its_turn(two: tuple) -> None:
    user, _, manifest = two
    up, gradients = pack(_up(manifest), "fp32"), pack(_gradients(manifest), "fp32")
    first = user.step("features", 0, up).content
    down = user.step("gradients", 0, gradients).content
    assert user.check_in()["kind"] == "work"
    assert user.step("features", 0, up).content == first
    assert user.step("gradients", 0, gradients).content == down


def test_a_silent_user_loses_its_turn_and_leaves_no_trace(two: tuple, house: Loopback, server_bundle: Path) -> None:
    first, second, manifest = two
    first.step("features", 0, pack(_up(manifest), "fp32"))
    first.step("gradients", 0, pack(_gradients(manifest), "fp32"))
    now = time.time()
    house.clock = lambda: now + 31
    assert second.check_in()["kind"] == "work"
    assert _problem(first.step("features", 1, pack(_up(manifest), "fp32")))[1] == "round-closed"
    assert second.update(_update(manifest)).status_code == 200
    assert second.update(_update(manifest)).status_code in (200, 409)  # the round is over: too late, and not counted twice
    status = house.status(second.run)
    (done,) = status.rounds
    assert [user.user for user in done.users] == [f"{second.run}-b"]
    assert done.notes == (f"{second.run}-a fell silent and does not count",)
    before = SplitManifest.from_file(server_bundle / MANIFEST)
    for part in (FUSION, *(task_adapter(m) for m in manifest.plan.modalities)):  # nobody that counts has stepped them
        old = house.house.blobs.path(before.initial_weights[part]).read_bytes()
        assert house.house.blobs.path(status.weights[part]).read_bytes() == old, part


def test_updates_are_checked_like_activations(two: tuple) -> None:
    user, _, manifest = two
    assert _problem(user.update(_update(manifest, parts=manifest.plan.trained)))[1] in ("tensor-file", "too-large")
    assert _problem(user.update(_update(manifest, value=2e30)))[1] == "update-rejected"
    for changes, code in (({"loss": {"image": 1.0}}, "update-rejected"), ({"fused_loss": 1e308}, "config")):
        report = REPORT.model_copy(update=changes)
        assert _problem(user.update(_update(manifest), report=report))[1] == code, changes
    assert _problem(user.send("PUT", user.path("update"), b""))[1] == "protocol"
    assert user.update(_update(manifest)).status_code == 200
    assert user.update(_update(manifest)).status_code == 200  # the same again
    assert _problem(user.update(_update(manifest, value=0.5)))[1] == "update-rejected"


def test_an_evaluation_that_nobody_asked_for_is_refused(two: tuple) -> None:
    user, _, manifest = two
    body = b'{"num_examples":1,"correct":{"image":1,"audio":1},"loss":{},"fused_correct":1,"fused_loss":0}'
    assert _problem(user.send("PUT", user.path("evaluation"), body))[1] == "round-closed"
    assert _problem(user.send("POST", user.path("answers?examples=8"), pack(_up(manifest), "fp32")))[1] == "round-closed"


def test_a_coordinator_without_an_engine_takes_no_plan_that_needs_one(tmp_path: Path, server_bundle: Path) -> None:
    with loopback(tmp_path, engine=None) as house, pytest.raises(ConfigError, match="start it with an engine"):
        house.publish(server_bundle, SplitManifest.from_file(server_bundle / MANIFEST))


def _update(manifest: SplitManifest, value: float = 0.0, parts: list[str] | None = None) -> bytes:
    specs = manifest.specs(parts or manifest.plan.sent(False))
    return pack({spec.name: np.full(spec.shape, value, np.float32) for spec in specs}, "fp32")


def _raw(tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save(tensors)
