"""A small run over real processes: one `lamina serve`, two `lamina join` with different engines, HTTP on loopback."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lamina.bundles.manifest import ENGINES as ALL_ENGINES
from lamina.bundles.manifest import EngineName, Manifest
from lamina.client import Client, read_token
from lamina.plans.plan import SGD, Cohort, Plan, Training
from lamina.plans.strategies import make_stages
from lamina.wire import RunStatus
from tests.small_plans import MAX_BATCH, SUPERVISED, make_plan, shared_bundle

ENGINES: tuple[EngineName, ...] = ("executorch", "onnxruntime")
TIMEOUT_SECONDS = 120


@pytest.fixture(scope="session")
def bundle(shared_folder: Path, program_cache: Path) -> tuple[Path, Manifest]:
    """Three stages of 1, 1 and 2 rounds; training takes long enough to be interrupted.

    The model is that of the conformance suite with one more layer, so all its programs are those of that suite.
    """
    # Made, or waited for where another test process is at it, so that no program is lowered twice.
    shared_bundle(make_plan(SUPERVISED), ALL_ENGINES, shared_folder, program_cache)
    image, audio = SUPERVISED.encoders
    model = SUPERVISED.model_copy(update={"name": "deep", "encoders": (image.model_copy(update={"layers": 3}), audio)})
    plan = Plan(
        name="deep",
        model=model,
        strategy="layerwise",
        stages=make_stages(model, "layerwise", rounds=[1, 1, 2], learning_rate=0.02),
        training=Training(batch_size=MAX_BATCH, local_epochs=60, optimizer=SGD(momentum=0.9)),
        cohort=Cohort(size=2, min_updates=2, lease_seconds=60),
    )
    return shared_bundle(plan, ENGINES, shared_folder, program_cache)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four classes that differ in the mean of both modalities; 100 training and 40 test examples for each device."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(7)
    image_of, audio_of = (rng.normal(size=(4, *encoder.input.shape)) for encoder in SUPERVISED.encoders)
    files = []
    for device in range(len(ENGINES)):
        arrays = {}
        for split, count in (("train", 100), ("test", 40)):
            label = rng.integers(0, 4, count)
            arrays[f"{split}_label"] = label.astype(np.int64)
            arrays[f"{split}_image"] = (image_of[label] + rng.normal(size=(count, *image_of.shape[1:]))).astype(np.float32)
            arrays[f"{split}_audio"] = (audio_of[label] + rng.normal(size=(count, *audio_of.shape[1:]))).astype(np.float32)
        files.append(folder / f"device-{device}.npz")
        np.savez(files[-1], **arrays)
    return files


class House:
    """The processes of one run. Each may be killed and started again with the same command."""

    def __init__(self, folder: Path, bundle: Path, manifest: Manifest, data: list[Path]) -> None:
        self.folder, self._bundle, self._manifest, self._data = folder, bundle, manifest, data
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = 0
        self.state = folder / "coordinator"
        self.folder.mkdir(parents=True, exist_ok=True)

    def start_coordinator(self) -> None:
        address = self.state / "address"
        address.unlink(missing_ok=True)
        waits = ["--wait-seconds-min", "0.05", "--wait-seconds-max", "0.1"]
        self._start("coordinator", ["serve", "--state", str(self.state), "--port", str(self._port), *waits])
        self.wait_until(lambda: address.exists() and bool(address.read_text().strip()), "the coordinator listens")
        self._port = int(address.read_text().strip().rsplit(":", 1)[1])  # a restart keeps the address

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def client(self) -> Client:
        return Client(self.url, read_token(self.state / "admin.token"))

    def publish(self) -> str:
        with self.client() as client:
            return client.publish(self._bundle, self._manifest).run

    def start_device(self, index: int) -> None:
        """One device keeps its processes between rounds, the other has one at a time; the results must not tell."""
        name = f"device-{index}"
        options = ["--data", str(self._data[index]), "--name", name, "--engine", ENGINES[index]]
        files = ["--state", str(self.folder / name), "--token-file", str(self.state / "enrolment.token")]
        resident = ["--resident"] if index else []
        self._start(name, ["join", self.url, *options, *files, *resident, "--until-finished"])

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        assert process.poll() is None, f"{name} had ended by itself: {self.log(name)}"
        process.send_signal(signal.SIGKILL)
        process.wait()

    def status(self, run: str) -> RunStatus:
        with self.client() as client:
            return client.run(run)

    def finish(self, run: str) -> RunStatus:
        self.wait_until(lambda: self.status(run).state == "finished", f"{run} is finished")
        return self.status(run)

    def wait_until(self, is_true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not is_true():
            for name, process in self._processes.items():
                assert process.poll() in (None, 0), f"{name} ended with {process.returncode}: {self.log(name)}"
            assert time.monotonic() < end, f"{what}: not within {TIMEOUT_SECONDS} s\n" + self.log("coordinator")
            time.sleep(0.05)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def _start(self, name: str, arguments: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "lamina.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )


@pytest.fixture
def make_house(tmp_path: Path, bundle: tuple[Path, Manifest], data: list[Path]) -> Iterator[Callable[[str], House]]:
    houses: list[House] = []

    def make(name: str) -> House:
        houses.append(House(tmp_path / name, *bundle, data))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture(scope="session")
def undisturbed(shared_folder: Path, bundle: tuple[Path, Manifest], data: list[Path]) -> RunStatus:
    """The run that nothing interrupts: what every interrupted one has to equal. One for all test processes."""
    told = shared_folder / "undisturbed.json"
    with told.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            told.write_bytes(_run_undisturbed(shared_folder / "undisturbed", bundle, data).to_json())
    return RunStatus.from_json(told.read_bytes())


def _run_undisturbed(folder: Path, bundle: tuple[Path, Manifest], data: list[Path]) -> RunStatus:
    house = House(folder, *bundle, data)
    try:
        house.start_coordinator()
        run = house.publish()
        for index in range(len(ENGINES)):
            house.start_device(index)
        return house.finish(run)
    finally:
        house.close()
