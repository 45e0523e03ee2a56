"""Hostile answers to a real device: one changed answer for each command that it is started with.

    python -m tests.fuzz.device --messages 10000 --seed 0

The device asks a coordinator that is a function. Of the answers that one start needs (enrolment, check-in, signature, manifest,
weights and programs, an update's acceptance), one is changed: its body, its status, or its headers. A changed manifest is
signed by a key that the device trusts, so that it is read. Whatever comes, the device ends with an error that lamina names, or
goes on.
"""

import argparse
import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import httpx
import numpy as np

from edge_client.process.outcome import JOB, UPDATE, write_outcome
from edge_client.talk.device import Device, Options
from edge_client.talk.transport import Transport
from lamina.bundles.keys import VARIABLE, own_key
from lamina.encoding.tensors import encode, hash_bytes
from lamina.errors import LaminaError
from tests.edge_client.fake_coordinator import ENROLMENT_TOKEN, FakeCoordinator
from tests.edge_client.tiny import TinyPrograms, make_data
from tests.fuzz.mutations import HOSTILE_TEXT, damaged, mutated

KINDS = ("devices", "check-in", "check-in", "signature", "manifest", "blob", "update")
_HEADERS = ("Content-Length", "Content-Encoding", "Content-Range", "Location", "Retry-After", "Content-Type")
_STATUSES = (200, 201, 204, 206, 301, 302, 303, 307, 400, 401, 404, 409, 416, 422, 429, 500, 503, 507, 599)
_PAUSES = 4
_WARM_UP = 300


class StoppedError(Exception):
    """The device waits, or tries again, for longer than this looks."""


@dataclass
class Outcome:
    """`growth_bytes` is what the peak of resident memory grew by after a tenth of the messages, and 300 at least."""

    messages: int
    ends: Counter[str] = field(default_factory=Counter)
    unnamed: list[str] = field(default_factory=list)
    """Tracebacks of what lamina does not name."""
    growth_bytes: int = 0
    has_kept_its_work: bool = False
    """Whether the update that lay in the work folder all along was sent in the end, and nothing else."""


def attack(folder: Path, messages: int, seed: int) -> Outcome:
    random, outcome = Random(f"{seed}/device"), Outcome(messages)
    manifest, blobs = TinyPrograms(folder / "programs").bundle("onnxruntime", rounds=2)
    data = make_data(folder / "data.npz")
    before = 0
    for index in range(messages):
        if index == max(_WARM_UP, messages // 10):
            before = _peak_bytes()
        state = folder / "state"
        shutil.rmtree(state, ignore_errors=True)
        kind = random.choice(KINDS)
        peer = _Hostile(random, FakeCoordinator(manifest, blobs), kind)
        if kind == "update":
            _start(state, data, peer.honest)
            _leave_work(state, peer.coordinator)
        outcome.ends[_end_of(lambda: _start(state, data, peer), outcome)] += 1  # noqa: B023
    outcome.growth_bytes = _peak_bytes() - before
    outcome.has_kept_its_work = _keeps_its_work(folder, data, FakeCoordinator(manifest, blobs), random, outcome)
    return outcome


class _Hostile:
    """Answers as the coordinator does, but for the answers of one kind."""

    def __init__(self, random: Random, coordinator: FakeCoordinator, kind: str) -> None:
        self._random, self.coordinator, self._kind = random, coordinator, kind
        self.honest = coordinator.__call__
        if kind == "manifest":
            self._replace_manifest()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self._kind == "manifest" and request.url.path.endswith("/signature"):
            return httpx.Response(200, content=self.coordinator.signature.to_json())
        response = self.honest(request)
        if self._kind == "check-in" and request.url.path == "/v1/check-in":
            response = self._other_answer(response)
        if not self._is_mine(request):
            return response
        random = self._random
        content = response.read() if isinstance(response.stream, httpx.SyncByteStream) else response.content
        if random.random() < 0.75:
            is_json = content[:1] == b"{"
            content = mutated(random, json.loads(content)) if is_json else damaged(random, content)
        headers = {name: value for name, value in response.headers.items() if name.lower() != "content-length"}
        if random.random() < 0.3:
            name = random.choice(
                ("Content-Length", "Content-Encoding", "Content-Range", "Location", "Retry-After", "Content-Type")
            )
            text = random.choice((*HOSTILE_TEXT, "-1", "9" * 30, "gzip", "zstd", "bytes 5-1/3", "http://127.0.0.1:9/", "1e9"))
            headers[name] = "".join(letter for letter in text if letter.isascii() and letter.isprintable())[:1000]
        status = response.status_code
        if random.random() < 0.2:
            status = random.choice(
                (200, 201, 204, 206, 301, 302, 303, 307, 400, 401, 404, 409, 416, 422, 429, 500, 503, 507, 599)
            )
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))

    def _is_mine(self, request: httpx.Request) -> bool:
        path = request.url.path
        parts = {"devices": "/v1/devices", "check-in": "/v1/check-in", "signature": "/signature", "update": "/update"}
        if self._kind == "manifest":
            return False
        return parts[self._kind] in path if self._kind in parts else path.startswith("/v1/blobs/")

    def _other_answer(self, response: httpx.Response) -> httpx.Response:
        """Sometimes a wait or a refusal is what is changed."""
        wait = {"kind": "wait", "reason": "cohort", "detail": "1 of 4", "wait_seconds_min": 1, "wait_seconds_max": 2}
        answer = self._random.choice((None, None, wait, {"kind": "refused", "detail": "no"}))
        return response if answer is None else httpx.Response(200, content=json.dumps(answer).encode())

    def _replace_manifest(self) -> None:
        fake = self.coordinator
        body = mutated(self._random, json.loads(fake.manifest.to_json()))
        fake.blobs[hash_bytes(body)] = body
        fake.signature = own_key().sign(body)
        next_work = fake.next_work
        fake.next_work = lambda: next_work().model_copy(update={"manifest": hash_bytes(body)})


def _start(state: Path, data: Path, peer: Callable[[httpx.Request], httpx.Response]) -> None:
    pauses = 0
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal pauses, now
        pauses, now = pauses + 1, now + seconds
        if pauses > _PAUSES:
            raise StoppedError

    connect = partial(
        Transport,
        transport=httpx.MockTransport(peer),
        patience_seconds=60.0,
        say=lambda line: None,
        clock=lambda: now,
        sleep=sleep,
    )
    options = Options("http://coordinator", str(data), "attic", "onnxruntime", str(state))
    state.mkdir(exist_ok=True)
    with connect(options.url) as transport:
        Device(options, transport, lambda: ENROLMENT_TOKEN, lambda line: None).next_job()


def _end_of(start: Callable[[], None], outcome: Outcome) -> str:
    try:
        start()
    except StoppedError:
        return "waits"
    except LaminaError as error:
        if not error.message.replace("\n", "").isprintable():
            outcome.unnamed.append(f"not printable: {error.message!r}")
        return error.code
    except BaseException:
        outcome.unnamed.append(traceback.format_exc(limit=-4))
        return "unnamed"
    return "job"


def _leave_work(state: Path, coordinator: FakeCoordinator) -> bytes:
    """What the training process leaves when it is done; gives the update."""
    manifest = coordinator.manifest
    body = encode({spec.name: np.ones(spec.shape, np.float32) for spec in manifest.exchange_specs(0)})
    work = state / "work"
    assert (work / JOB).is_file()
    (work / UPDATE).write_bytes(body)
    write_outcome(work, "trained", num_examples=10, loss=0.5, train_seconds=1.0, peak_bytes=1)
    return body


def _keeps_its_work(folder: Path, data: Path, coordinator: FakeCoordinator, random: Random, outcome: Outcome) -> bool:
    """A hundred starts whose first answer is cut off or says that something is broken, then an honest one."""
    state = folder / "kept"
    _start(state, data, coordinator)
    body = _leave_work(state, coordinator)

    def broken(request: httpx.Request) -> httpx.Response:
        if random.random() < 0.5:
            raise httpx.ReadError("cut")
        return httpx.Response(random.choice((429, 502, 503, 504)), content=damaged(random, b'{"code": "x"}'))

    for _ in range(100):
        _end_of(lambda: _start(state, data, broken), outcome)
    _end_of(lambda: _start(state, data, coordinator), outcome)
    return coordinator.updates == [body]


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ[VARIABLE] = f"{folder}/keys"
        os.fsync = lambda file: None  # thousands of folders are made and thrown away, and no power loss is looked at here
        outcome = attack(Path(folder), chosen.messages, chosen.seed)
    print(json.dumps(vars(outcome) | {"ends": dict(sorted(outcome.ends.items()))}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
