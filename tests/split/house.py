"""What the tests of split training stand on: a tiny plan, its bundle exported once, and a real coordinator on loopback."""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from coordinator.app import create_app
from coordinator.settings import Settings
from coordinator.split.routes import split_routes
from edge_client.split.runtime import EngineRuntime
from edge_client.split.transport import SplitTransport
from edge_client.split.user import SplitOptions, SplitUser, join_split
from lamina.bundles.bundle import MANIFEST, blob_path, sign_bundle
from lamina.bundles.keys import own_key
from lamina.bundles.manifest import EngineName
from lamina.client import read_token
from lamina.encoding.tensors import Float32, decode_file, encode, hash_bytes
from lamina.files import write_durably
from lamina.plans.model import AudioFrames, Encoder, ImagePatches
from lamina.split.client import SplitClient
from lamina.split.manifest import SplitManifest
from lamina.split.plan import AdapterSettings, FusionNet, SplitPlan, SplitTraining, Traffic, Users
from lamina.split.wire import SplitStatus

CLASSES = 4
_SIZES = {"width": 16, "heads": 2, "layers": 3}
ENCODERS = (
    Encoder(modality="image", input=ImagePatches(channels=1, height=8, width=8, patch=4), **_SIZES),
    Encoder(modality="audio", input=AudioFrames(frames=4, coefficients=5), **_SIZES),
)


def make_plan(**changes: Any) -> SplitPlan:
    settings = {
        "name": "tiny",
        "encoders": ENCODERS,
        "classes": CLASSES,
        "rounds": 3,
        "adapter": AdapterSettings(hidden=8),
        "fusion": FusionNet(heads=2, head_width=8, learning_rate=0.01),
        "training": SplitTraining(batch_size=8, learning_rate=0.02),
        "traffic": Traffic(activations="fp32", gradients="fp32"),
        "users": Users(size=2, min_users=1, evaluate_every=1, lease_seconds=60),
    }
    return SplitPlan.model_validate(settings | changes)


def export_once(plan: SplitPlan, engine: EngineName, folder: Path, cache: Path) -> Path:
    """The bundle of a plan; the first process that asks exports it, the others wait."""
    from export.split.split import export_split

    target = folder / f"split-{plan.party}-{engine}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / MANIFEST).exists():
            export_split(plan, target, (engine,), cache=cache, workers=1)
    return target


def varied(bundle: Path, folder: Path, seed: int | None = None, **changes: Any) -> tuple[Path, SplitManifest]:
    """The bundle with other settings that no program depends on and, with `seed`, trained parts that start at random."""
    manifest = SplitManifest.from_file(bundle / MANIFEST)
    blobs = {digest: blob_path(bundle, digest).read_bytes() for digest in manifest.blobs}
    initial = dict(manifest.initial_weights)
    if seed is not None:
        random = np.random.default_rng(seed)
        for name in manifest.plan.trained:
            data = encode({t.name: (0.3 * random.normal(size=t.shape)).astype(np.float32) for t in manifest.part(name).tensors})
            initial[name] = hash_bytes(data)
            blobs[initial[name]] = data
    plan = SplitPlan.model_validate(manifest.plan.model_dump() | changes)
    sizes = {digest: len(data) for digest, data in sorted(blobs.items())}
    made = manifest.model_copy(update={"plan": plan, "initial_weights": initial, "blobs": sizes})
    for digest, data in blobs.items():
        write_durably(blob_path(folder, digest), data)
    write_durably(folder / MANIFEST, made.to_json())
    sign_bundle(folder, own_key())
    return folder, SplitManifest.from_file(folder / MANIFEST)


def write_data(path: Path, seed: int, train: int = 40, test: int = 24, has: Sequence[str] = ("image", "audio")) -> Path:
    """Four classes that differ in the mean of both modalities, of which the file has those that are named."""
    fixed, random = np.random.default_rng(5), np.random.default_rng(seed)
    image_of, audio_of = fixed.normal(size=(CLASSES, 1, 8, 8)), fixed.normal(size=(CLASSES, 4, 5))
    arrays: dict[str, Any] = {}
    for split, count in (("train", train), ("test", test)):
        label = random.permutation(np.arange(count) % CLASSES)
        arrays[f"{split}_label"] = label.astype(np.int64)
        arrays[f"{split}_image"] = (image_of[label] + 0.5 * random.normal(size=(count, 1, 8, 8))).astype(np.float32)
        arrays[f"{split}_audio"] = (audio_of[label] + 0.5 * random.normal(size=(count, 4, 5))).astype(np.float32)
    np.savez(path, **{name: value for name, value in arrays.items() if name.partition("_")[2] in ("label", *has)})
    return path


class Loopback:
    """A coordinator behind a real socket. It may be stopped and started again on the same folder."""

    def __init__(self, folder: Path, engine: EngineName | None = "onnxruntime") -> None:
        self.folder = folder
        self.settings = Settings(state=folder / "coordinator", wait_seconds_min=0.01, wait_seconds_max=0.02)
        self._engine = engine
        self.clock: Callable[[], float] = time.time
        self.start()

    def start(self) -> None:
        app = create_app(self.settings, lambda: self.clock())
        self.house = app.state.house
        app.include_router(split_routes(self.house, EngineRuntime(self._engine) if self._engine else None))
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def publish(self, folder: Path, manifest: SplitManifest) -> str:
        with SplitClient(self.url, self.admin_token) as client:
            return client.publish_split(folder, manifest).run

    @property
    def admin_token(self) -> str:
        return read_token(self.settings.admin_token)

    @property
    def enrolment_token(self) -> str:
        return read_token(self.settings.enrolment_token)

    def status(self, run: str) -> SplitStatus:
        with SplitClient(self.url, self.admin_token) as client:
            return client.split_run(run)

    def weights(self, status: SplitStatus, manifest: SplitManifest, part: str) -> dict[str, Float32]:
        return decode_file(str(self.house.blobs.path(status.weights[part])), manifest.part(part).tensors)

    def join(self, files: list[Path], engine: EngineName = "onnxruntime") -> None:
        """Each file is a user's data; takes part until no run is open. Raises what a user raised."""
        options = [
            SplitOptions(
                url=self.url,
                data=str(file),
                name=f"user-{index}",
                engine=engine,
                state=str(self.folder / f"user-{index}"),
                until_finished=True,
            )
            for index, file in enumerate(files)
        ]
        if engine == "torch":
            self._take_turns(options)
        else:
            self._run_together(options)

    def _take_turns(self, options: list[SplitOptions]) -> None:
        """All users in this thread: torch reads its programs with a global of its own."""
        with ExitStack() as stack:
            users = []
            for each in options:
                transport = stack.enter_context(SplitTransport(each.url))
                users.append(SplitUser(each, transport, lambda: self.enrolment_token, say=_silent))
            while users:
                users = [user for user in users if user.work_once()]

    def _run_together(self, options: list[SplitOptions]) -> None:
        """One thread for each user."""
        errors: list[BaseException] = []

        def user(each: SplitOptions) -> None:
            try:
                join_split(each, lambda: self.enrolment_token, say=_silent)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=user, args=(each,), daemon=True) for each in options]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 100
        for thread in threads:
            while thread.is_alive() and not errors and time.monotonic() < end:
                thread.join(0.02)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "the users are not done"


def _silent(line: str) -> None:
    pass


@contextmanager
def loopback(folder: Path, engine: EngineName | None = "onnxruntime") -> Iterator[Loopback]:
    house = Loopback(folder, engine)
    try:
        yield house
    finally:
        house.stop()
