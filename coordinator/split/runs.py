"""All split runs of a coordinator: publishing one, finding one, handing out work."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from coordinator.house import House
from coordinator.rounds.devices import get_device
from coordinator.security.signatures import keep_signature, publishers_trust
from coordinator.split.high_ends import HighEnds
from coordinator.split.keeping import Keeping
from coordinator.split.run import SplitRun
from coordinator.split.runtime import Runtime
from coordinator.split.state import SplitState, save_state
from lamina.bundles.signing import parse_signature
from lamina.encoding.compression import available_compressions
from lamina.encoding.tensors import decode_one_by_one, hash_bytes
from lamina.errors import BundleError, ConfigError, TensorFileError, UnknownNameError
from lamina.split.manifest import SplitManifest
from lamina.split.wire import SplitCheckIn, SplitWork
from lamina.wire import SIGNATURE_HEADER, Published, Refused, RunList, Wait

log = logging.getLogger("lamina.coordinator")
_RUN = re.compile(r"split-([0-9]{1,9})")


class SplitRuns:
    """`runtime` runs the coordinator's own programs; without it, only plans whose devices do all are taken."""

    def __init__(self, house: House, runtime: Runtime | None) -> None:
        """Takes up the runs that the state folder holds. Raises ConfigError for a damaged file of one."""
        self._house, self._runtime = house, runtime
        self._runs: dict[str, SplitRun] = {}
        self._publishing = Lock()
        self._keeping = Keeping(house.blobs, lambda: {blob for run in list(self._runs.values()) for blob in run.needed})
        folder = house.settings.state / "split"
        folder.mkdir(exist_ok=True)
        for path in sorted(folder.glob("split-*.json"), key=lambda path: int(path.stem.partition("-")[2])):
            state = SplitState.from_file(path)
            self._open(state, SplitManifest.from_file(house.blobs.path(state.manifest)))
        for run in self._runs.values():
            run.remove_superseded()  # in case the coordinator was stopped between a round's end and this

    def publish_file(self, path: Path, signature_text: str | None) -> Published:
        """`publish` of the manifest in a file; one at a time, because a manifest takes many times its size while it is read."""
        with self._publishing:
            return self.publish(path.read_bytes(), signature_text)

    def publish(self, body: bytes, signature_text: str | None) -> Published:
        """A new run of the plan of a manifest. Raises as `coordinator.rounds.publish.publish` does."""
        signature = None if signature_text is None else parse_signature(signature_text, f"the {SIGNATURE_HEADER} header")
        signer = publishers_trust(self._house.settings).check(hash_bytes(body), signature)
        manifest = SplitManifest.from_json(body, "the manifest")
        with self._keeping.lock:  # no other run deletes what this one is about to need
            high = self._check(manifest)
            digest = self._house.blobs.put(body)
            if signature is not None:
                keep_signature(self._house.settings, digest, signature)
            number = 1 + max((int(run.partition("-")[2]) for run in self._runs), default=0)
            weights = {part: manifest.initial_weights[part] for part in manifest.plan.trained}
            state = SplitState(run=f"split-{number}", manifest=digest, weights=weights)
            save_state(self._house, state)
            self._open(state, manifest, high)
        log.info("%s is published: plan %r, manifest %s, %s", state.run, manifest.plan.name, digest, signer)
        return Published(run=state.run)

    def find(self, run: str) -> SplitRun:
        found = self._runs.get(run) if _RUN.fullmatch(run) else None
        if found is None:
            raise UnknownNameError(f"there is no split run {run[:40]!r} here; GET /v1/split/runs lists them")
        return found

    def list(self) -> RunList:
        return RunList(runs=tuple(self._runs))

    def check_in(self, device: str, facts: SplitCheckIn) -> SplitWork | Wait | Refused:
        """Work of the first open run that can use this user, or of the one that it names."""
        runs = [self.find(facts.run)] if facts.run is not None else list(self._runs.values())
        answer: SplitWork | Wait | Refused | None = None
        for run in runs:
            if facts.run is None and run.is_finished:
                continue
            found = run.check_in(device, facts)
            if not isinstance(found, Refused):
                return found
            answer = answer or found
        settings = self._house.settings
        return answer or Wait(
            reason="no_run",
            detail="no split run is open",
            wait_seconds_min=settings.wait_seconds_min,
            wait_seconds_max=settings.wait_seconds_max,
        )

    def _open(self, state: SplitState, manifest: SplitManifest, high: HighEnds | None = None) -> None:
        make = self._high_ends_of(manifest)
        self._runs[state.run] = SplitRun(self._house, manifest, state, lambda: high or make(), self._name_of, self._keeping)

    def _high_ends_of(self, manifest: SplitManifest) -> Callable[[], HighEnds]:
        def make() -> HighEnds:
            if self._runtime is None or self._runtime.name not in manifest.programs:
                raise ConfigError(
                    f"this coordinator runs no programs of {', '.join(manifest.programs)}, which its part of the model needs: "
                    "start it with an engine that the bundle has programs for"
                )
            return HighEnds(manifest, self._runtime, self._house.blobs.path)

        return make

    def _name_of(self, device: str) -> str:
        with self._house.database.read() as session:
            return get_device(session, device).name

    def _check(self, manifest: SplitManifest) -> HighEnds | None:
        """Its blobs are whole, and the coordinator's programs load: what is wrong shows now, and not in the first round."""
        plan = manifest.plan
        if plan.traffic.compression not in available_compressions():
            raise ConfigError(f"the plan wants {plan.traffic.compression}, which is missing: pip install 'lamina[coordinator]'")
        for digest, size in manifest.blobs.items():
            if (found := self._house.blobs.size_bytes(digest)) != size:
                what = "is not here; send it before the manifest" if found is None else f"has {found} bytes, not {size}"
                raise BundleError(f"blob {digest} of the manifest {what}")
        for part in manifest.parts:
            try:
                for _ in decode_one_by_one(str(self._house.blobs.path(manifest.initial_weights[part.name])), part.tensors):
                    pass
            except TensorFileError as error:
                raise TensorFileError(f"initial weights of part {part.name}: {error.message}") from error
        return self._high_ends_of(manifest)() if plan.party == "server" else None
