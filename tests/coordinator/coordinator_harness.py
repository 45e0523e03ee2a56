"""What the tests of the coordinator stand on: a tiny bundle, a device that "trains" by a rule, and two ways to run the service.

`InProcess` is the real app behind an httpx transport, with a clock that only moves when a test moves it. `Process` is the
real `lamina serve` on a free port. Devices cannot tell the two apart.
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from coordinator.app import create_app
from coordinator.settings import Settings
from coordinator.store.tables import SCHEMA_VERSION, UPGRADES
from lamina.bundles.bundle import sign_bundle
from lamina.bundles.keys import own_key
from lamina.bundles.manifest import Manifest, PartialStage, Program, ProgramReference, StageCost, StagePrograms
from lamina.encoding.compression import Compression, compress
from lamina.encoding.tensors import Encoding, Float32, decode_file, encode, hash_bytes
from lamina.plans.model import Encoder, ModelDescription, Objective, Projection, SensorWindows, Supervised
from lamina.plans.plan import Cohort, Plan, Training
from lamina.plans.segments import Segment, TensorSpec, segment_names
from lamina.plans.strategies import make_stages
from lamina.wire import (
    CHECK_IN_ANSWER,
    SIGNATURE_HEADER,
    Assignment,
    CheckIn,
    Enrolled,
    Evaluation,
    Problem,
    Published,
    Refused,
    RunStatus,
    TrainReport,
    Wait,
)

WIDTH = 8
REPORT = TrainReport(num_examples=10, loss=0.5, train_seconds=1.5, peak_bytes=9_000_000, bytes_down=1000, bytes_up=500)


@dataclass(frozen=True)
class Bundle:
    manifest: Manifest
    blobs: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """The bundle as the exporter would write it."""
        (folder / "blobs").mkdir(parents=True)
        (folder / "manifest.json").write_bytes(self.manifest.to_json())
        for digest, data in self.blobs.items():
            (folder / "blobs" / digest).write_bytes(data)
        sign_bundle(folder, own_key())
        return folder


CLASSES = Supervised(classes=3)


def make_bundle(
    rounds: list[int] | None = None,
    layers: int = 2,
    strategy: str = "layerwise",
    cohort: Cohort | None = None,
    engines: tuple[str, ...] = ("onnxruntime", "torch"),
    modalities: tuple[str, ...] = ("motion",),
    encoding: Encoding = "fp32",
    download_encoding: Encoding = "fp32",
    compression: Compression = "none",
    seed: int = 0,
    training: dict[str, Any] | None = None,
    has_teacher: bool = False,
    objective: Objective = CLASSES,
    **settings: Any,
) -> Bundle:
    """A bundle of width 8 whose weights are random and whose programs are any bytes: the coordinator never looks inside.

    `rounds` is the number for each stage, by default one. `training` and `settings` are further keys of the plan's training
    and of the plan. With `has_teacher`, the programs of all stages but the first compare with the stage before.
    """
    window = SensorWindows(channels=2, samples=8, patch=4)
    model = ModelDescription(
        name="tiny",
        encoders=tuple(Encoder(modality=name, input=window, width=WIDTH, heads=2, layers=layers) for name in modalities),
        projection=Projection(hidden=WIDTH, output=4),
        objective=objective,
    )
    plan = Plan(
        name="tiny_plan",
        model=model,
        strategy=strategy,
        stages=make_stages(model, strategy, rounds or [1] * (1 if strategy == "end_to_end" else layers), 0.01),
        training=Training(
            upload_encoding=encoding, download_encoding=download_encoding, compression=compression, **(training or {})
        ),
        cohort=cohort or Cohort(size=2, min_updates=1, deadline_seconds=1000, lease_seconds=100),
        seed=seed,
        **settings,
    )
    blobs: dict[str, bytes] = {}

    def put(data: bytes) -> str:
        blobs[hash_bytes(data)] = data
        return hash_bytes(data)

    random = np.random.default_rng(seed)
    segments = tuple(
        Segment(name=name, modality=None if name == "head" else name.partition(".")[0], tensors=_tensors_of(name))
        for name in segment_names(model)
    )
    weights = {segment.name: put(encode({t.name: _normal(random, t.shape) for t in segment.tensors})) for segment in segments}
    programs: dict[str, Program] = {}

    def program(engine: str, role: str, stage: int, what: str = "") -> str:
        digest = put(f"{engine} {role} {stage} {seed} {what}".encode())
        is_pupil = has_teacher and role == "train" and stage > 0
        shapes = ((WIDTH,),)
        programs[digest] = Program(
            engine=engine,
            role=role,
            blob=digest,
            weights=shapes,
            inputs=(),
            max_batch=4,
            activation_bytes=0,
            references=(ProgramReference(kind="teacher", tensors=(0,)),) if is_pupil else (),
        )
        return digest

    cost = StageCost(
        active_parameters=1,
        frozen_parameters=0,
        flops_per_sample=1,
        prefix_flops_per_sample=0,
        planned_bytes={engine: 1 for engine in engines},
        round_bytes_down=1,
        round_bytes_up=1,
        program_bytes={engine: 1 for engine in engines},
        frozen_bytes=0,
    )
    stages = tuple(
        StagePrograms(
            index=stage.index,
            train={engine: program(engine, "train", stage.index) for engine in engines},
            eval={engine: program(engine, "eval", stage.index) for engine in engines},
            partial=tuple(
                PartialStage(
                    modalities=subset,
                    train={engine: program(engine, "train", stage.index, " ".join(subset)) for engine in engines},
                    eval={engine: program(engine, "eval", stage.index, " ".join(subset)) for engine in engines},
                    planned_bytes={engine: 1 for engine in engines},
                )
                for subset in plan.device_modalities
            ),
            calibrate={engine: program(engine, "train", stage.index, "all") for engine in engines if plan.calibration},
            cost=cost,
        )
        for stage in plan.stages
    )
    manifest = Manifest(
        plan=plan,
        segments=segments,
        initial_weights=weights,
        programs=programs,
        frozen_programs={engine: {} for engine in engines},
        stages=stages,
        blobs={digest: len(data) for digest, data in blobs.items()},
        versions={"lamina": "test"},
    )
    return Bundle(manifest, blobs)


def _tensors_of(segment: str) -> tuple[TensorSpec, ...]:
    if segment.endswith("norm"):
        return (TensorSpec(name="weight", shape=(WIDTH,)), TensorSpec(name="bias", shape=(WIDTH,)))
    return (TensorSpec(name="weight", shape=(WIDTH, 3)), TensorSpec(name="bias", shape=(3,)), TensorSpec(name="s", shape=()))


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> Float32:
    return np.asarray(random.standard_normal(shape), np.float32)


def difference_of(name: str, specs: Iterable[TensorSpec], stage: int, round: int) -> dict[str, Float32]:
    """What a device of this name "learns" in a round: always the same."""
    seed = int.from_bytes(sha256(f"{name} {stage} {round}".encode()).digest()[:8], "big")
    random = np.random.default_rng(seed)
    return {spec.name: _normal(random, spec.shape) * np.float32(0.01) for spec in specs}


class FakeClock:
    """Seconds since 1970 that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        self.now += seconds


class Coordinator:
    """A running coordinator as its users see it; subclasses say how it runs."""

    http: httpx.Client
    state: Path

    @property
    def admin(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self.state / 'admin.token').read_text().strip()}"}

    @property
    def enroller(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self.state / 'enrolment.token').read_text().strip()}"}

    def publish(self, bundle: Bundle) -> str:
        for digest, data in bundle.blobs.items():
            self.http.put(f"/v1/blobs/{digest}", content=data, headers=self.admin).raise_for_status()
        answer = self.post_manifest(bundle.manifest.to_json())
        assert answer.status_code == 201, answer.text
        return Published.model_validate_json(answer.content).run

    def post_manifest(self, manifest: bytes) -> httpx.Response:
        """Publishes a manifest signed by this machine's key, which the coordinator trusts."""
        signature = own_key().sign(manifest).model_dump_json()
        return self.http.post("/v1/runs", content=manifest, headers={**self.admin, SIGNATURE_HEADER: signature})

    def join(self, name: str, **facts: Any) -> "Device":
        token = self.admin if facts.get("role") == "calibrator" else self.enroller
        answer = self.http.post("/v1/devices", json={"name": name}, headers=token)
        assert answer.status_code == 201, answer.text
        return Device(self, name, Enrolled.model_validate_json(answer.content), facts)

    def status(self, run: str = "run-1") -> RunStatus:
        answer = self.http.get(f"/v1/runs/{run}", headers=self.admin)
        assert answer.status_code == 200, answer.text
        return RunStatus.model_validate_json(answer.content)

    def blob(self, digest: str) -> bytes:
        answer = self.http.get(f"/v1/blobs/{digest}", headers=self.admin)
        assert answer.status_code == 200, answer.text
        return answer.content

    def weights(self, run: str = "run-1") -> dict[str, bytes]:
        """The newest bytes of every segment."""
        return {name: self.blob(digest) for name, digest in self.status(run).weights.items()}


@dataclass
class Device:
    """The smallest device: asks, adds a known difference, sends it, evaluates."""

    coordinator: Coordinator
    name: str
    enrolled: Enrolled
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.enrolled.device_token}"}

    def check_in(self, **facts: Any) -> Assignment | Wait | Refused:
        answer = self.try_check_in(**facts)
        assert answer.status_code == 200, answer.text
        return CHECK_IN_ANSWER.validate_json(answer.content)

    def try_check_in(self, **facts: Any) -> httpx.Response:
        known: dict[str, Any] = {
            "engine": "onnxruntime",
            "modalities": ("motion",),
            "train_examples": 10,
            "test_examples": 0,
        }
        body = CheckIn.model_validate(known | self.facts | facts).model_dump_json()
        return self.coordinator.http.post("/v1/check-in", content=body, headers=self.headers)

    def work(self, **facts: Any) -> Assignment:
        answer = self.check_in(**facts)
        assert isinstance(answer, Assignment), answer
        return answer

    def wait(self, **facts: Any) -> Wait:
        answer = self.check_in(**facts)
        assert isinstance(answer, Wait), answer
        return answer

    def specs(self, assignment: Assignment) -> list[TensorSpec]:
        manifest = Manifest.from_json(self.coordinator.blob(assignment.manifest))
        if assignment.phase == "calibrate":
            return manifest.specs(manifest.calibrated(assignment.stage))
        return manifest.exchange_specs(assignment.stage, assignment.modalities)

    def difference(self, assignment: Assignment) -> dict[str, Float32]:
        return difference_of(self.name, self.specs(assignment), assignment.stage, assignment.round)

    def body(self, assignment: Assignment) -> bytes:
        return encode(self.difference(assignment), assignment.upload_encoding)

    def send(
        self,
        assignment: Assignment,
        body: bytes | None = None,
        report: TrainReport = REPORT,
        headers: Mapping[str, str | None] | None = None,
        **address: Any,
    ) -> httpx.Response:
        """Sends an update; `headers` replaces (or with None drops) single headers, `address` parts of the path.

        Without a `body`, it is what the assignment asks for.
        """
        if body is None:
            body = compress(self.body(assignment), assignment.upload_compression)
            report = report.model_copy(update={"upload_encoding": assignment.upload_encoding})
            if assignment.upload_compression != "none":
                headers = {"Content-Encoding": assignment.upload_compression, **(headers or {})}
        sent: dict[str, str | None] = {
            **self.headers,
            "Content-Digest": f"sha-256=:{base64.b64encode(sha256(body).digest()).decode()}:",
            "Lamina-Report": report.model_dump_json(),
            **(headers or {}),
        }
        kept = {name: value for name, value in sent.items() if value is not None}
        # An iterator has no length: httpx then sends the body in chunks.
        content = iter([body]) if "Content-Length" in sent and sent["Content-Length"] is None else body
        return self.coordinator.http.put(path_of(assignment, "update", **address), content=content, headers=kept)

    def send_to_the_dying(self, assignment: Assignment) -> None:
        """Sends an update to a coordinator with a trap behind its acceptance, which may die before the answer is out."""
        with contextlib.suppress(httpx.TransportError):
            assert self.send(assignment).status_code == 200

    def evaluate(
        self, assignment: Assignment, correct: int = 3, num_examples: int = 4, loss: float = 1.0, **address: Any
    ) -> httpx.Response:
        body = Evaluation(num_examples=num_examples, correct=correct, loss=loss).model_dump_json()
        path = path_of(assignment, "evaluation", **address)
        return self.coordinator.http.put(path, content=body, headers=self.headers)

    def step(self) -> Assignment | Wait | Refused:
        """Asks for work and does it."""
        answer = self.check_in()
        if isinstance(answer, Assignment):
            done = self.evaluate(answer) if answer.phase == "evaluate" else self.send(answer)
            assert done.status_code == 200, done.text
        return answer


def path_of(assignment: Assignment, what: str, **address: Any) -> str:
    parts = {"run": assignment.run, "stage": assignment.stage, "round": assignment.round} | address
    return f"/v1/runs/{parts['run']}/stages/{parts['stage']}/rounds/{parts['round']}/{what}"


def work_until_finished(coordinator: Coordinator, devices: list[Device], run: str = "run-1") -> RunStatus:
    """All devices work in turn until the run is finished."""
    for _ in range(200):
        for device in devices:
            device.step()
        status = coordinator.status(run)
        if status.state == "finished":
            return status
    raise AssertionError(f"{run} does not finish: {coordinator.view.status(run).detail}")


def problem_of(answer: httpx.Response, status: int, code: str) -> str:
    """The detail of a refusal that has this status and code."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    assert (problem.code, problem.status) == (code, status), problem
    return problem.detail


def tensors_of(data: bytes, specs: Iterable[TensorSpec], folder: Path) -> dict[str, Float32]:
    """The tensors of a blob."""
    path = folder / "tensors.tmp"
    path.write_bytes(data)
    return decode_file(str(path), specs)


class InProcess(Coordinator):
    """The real app without a network. `restart` drops the app as a crash would and opens the folder again."""

    def __init__(self, state: Path, clock: FakeClock | None = None, steady: FakeClock | None = None, **settings: Any) -> None:
        """Without `steady`, the wall clock is all that the coordinator has to tell the time by."""
        self.state = state
        self.clock = clock or FakeClock()
        self.steady = steady
        self._settings = Settings(state=state, **settings)
        self.start()

    def start(self) -> None:
        self.app = create_app(self._settings, self.clock, steady=self.steady)
        self.transport = _AppTransport(self.app)
        self.http = httpx.Client(transport=self.transport, base_url="http://coordinator")

    def start_worker(self) -> None:
        """From now on the worker has its thread, as in the real process, and no request waits for it."""
        self.transport.has_thread = True
        self.app.state.worker.start()

    def stop(self) -> None:
        self.app.state.worker.stop()
        self.app.state.house.close()
        self.http.close()

    def restart(self) -> None:
        self.stop()
        self.start()


class _AppTransport(httpx.BaseTransport):
    """Runs an ASGI app to the end of each request, and its worker before and after it, so that tests need not wait."""

    def __init__(self, app: Any) -> None:
        self._runner = asyncio.Runner()
        self._inner = httpx.ASGITransport(app)
        self._worker = app.state.worker
        self.has_thread = False
        self._lifespan = app.router.lifespan_context(app)
        self._runner.run(self._lifespan.__aenter__())

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        content = request.read()
        if self.has_thread:
            return self._runner.run(self._handle(request, content))
        self._worker.work()
        answer = self._runner.run(self._handle(request, content))
        self._worker.work()
        return answer

    async def _handle(self, request: httpx.Request, content: bytes) -> httpx.Response:
        # The headers go as they are: a test may announce another length than it sends.
        inner = httpx.Request(request.method, request.url, headers=request.headers, stream=httpx.ByteStream(content))
        answer = await self._inner.handle_async_request(inner)
        body = await answer.aread()
        return httpx.Response(answer.status_code, headers=answer.headers, content=body)

    def close(self) -> None:
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()


def dying_in(function: str) -> str:
    """A trap for `Process`: power loss at the moment when the coordinator would call this function (`module.name`)."""
    module, _, name = function.rpartition(".")
    return (
        f"import os, signal; import {module} as module\n"
        f"module.{name} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    )


SERVE = "import typer; from lamina.cli.serve import serve; typer.run(serve)"
"""`lamina serve`, without the other verbs."""


class Process(Coordinator):
    """The real command in a process of its own. `before` is Python that runs in it first: where a test puts its trap."""

    def __init__(self, state: Path, before: str = "") -> None:
        self.state = state
        (state / "address").unlink(missing_ok=True)
        arguments = ["--state", str(state), "--port", "0", "--wait-seconds-min", "0.01", "--wait-seconds-max", "0.02"]
        self._log = state.parent / f"{state.name}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", f"{before}\n{SERVE}", *arguments], stdout=log, stderr=log)
        weakref.finalize(self, _end, self.process)  # a test that fails leaves no process behind
        self.url = self._wait_for_address()
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def _wait_for_address(self) -> str:
        until = time.monotonic() + 30
        while not (self.state / "address").exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.01)  # the one thing that is outside of this process and has to be polled
        return (self.state / "address").read_text().strip()

    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        """Ends the process as power loss does to it: at once."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.join_process()

    def terminate(self) -> int:
        self.process.terminate()
        return self.join_process()

    def join_process(self) -> int:
        code = self.process.wait(timeout=30)
        self.http.close()
        return code


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=30)


def poll(what: Callable[[], bool], seconds: float = 20) -> None:
    """For processes only: waits until something has happened in another one."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def as_json(answer: httpx.Response) -> Any:
    return json.loads(answer.content)


def downgrade(state: Path, version: int) -> None:
    """Makes the database of a stopped coordinator one of an older version: without the columns and tables of later ones."""
    tables = {1: ["variants"], 2: ["calibrations", "teachers"], 3: ["superseded"], 4: ["clock"]}
    with sqlite3.connect(state / "coordinator.sqlite") as connection:
        for later in range(version, SCHEMA_VERSION):
            for table in tables.get(later, []):
                connection.execute(f"DROP TABLE {table}")
            for statement in UPGRADES[later]:
                if not statement.startswith("ALTER"):
                    continue
                _, _, table, _, _, column, *_ = statement.split()
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()


def schema_version(state: Path) -> int:
    with sqlite3.connect(state / "coordinator.sqlite") as connection:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return found
