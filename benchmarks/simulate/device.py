"""The devices of a simulated run (`benchmarks.simulate.simulation`), and the one engine that they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_client.engines.base import Engine, LoadedProgram
from edge_client.rows.local_data import LocalData
from edge_client.talk.program_files import Fetch
from lamina.bundles.manifest import EngineName, Manifest
from lamina.encoding.compression import available_compressions
from lamina.encoding.tensors import ENCODINGS
from lamina.errors import ConfigError
from lamina.federation.modalities import largest_set
from lamina.names import ProgramShape
from lamina.wire import Assignment, CheckIn, DeviceRole


class Device:
    """A device's data, the modalities that it takes part with (none: all), what it keeps on disk, and which blobs it would
    hold."""

    def __init__(
        self,
        name: str,
        file: Path,
        state: Path,
        manifest: Manifest,
        engine: EngineName,
        role: DeviceRole = "device",
    ) -> None:
        self.name, self.state = name, state
        (state / "work").mkdir(parents=True, exist_ok=True)
        self.data = LocalData(file, state / "data")
        modalities = largest_set(manifest.plan, self.data.modalities)
        if modalities is None:
            raise ConfigError(f"{name} has data for {list(self.data.modalities)} alone, and the plan has no programs for that")
        self.modalities = modalities
        self.data.check(manifest.plan.model, modalities)
        self.facts = CheckIn(
            engine=engine,
            modalities=self.data.modalities,
            train_examples=self.data.train_examples,
            test_examples=self.data.test_examples,
            encodings=ENCODINGS,
            compressions=available_compressions(),
            role=role,
        )
        self.bytes_down = 0
        self._held: set[str] = set()

    def fetcher(self, assignment: Assignment, path_of: Fetch, manifest_bytes: int) -> Fetch:
        """What `prepare_job` fetches with: finds the file, and counts its bytes if the device does not hold it yet."""
        if assignment.manifest not in self._held:
            self._held.add(assignment.manifest)
            self.bytes_down += manifest_bytes
        packed = {assignment.weights[name]: digest for name, digest in assignment.compressed_weights.items()}

        def fetch(digest: str) -> Path:
            if digest not in self._held:
                self._held.add(digest)
                self.bytes_down += path_of(packed.get(digest, digest)).stat().st_size
            return path_of(digest)

        return fetch

    def keep_only(self, digests: set[str]) -> None:
        """As `edge_client.talk.blobs.BlobCache.keep_only`."""
        self._held &= digests


class SharedEngine:
    """An engine that loads each program once; a program that is closed stays loaded for the next device."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.name = engine, engine.name
        self._programs: dict[tuple[str, str], LoadedProgram] = {}

    def load(self, path: Path, program: ProgramShape) -> LoadedProgram:
        # A file is named by its sha256; torch runs one file in several roles, each in its own way.
        key = (path.name, program.role)
        if key not in self._programs:
            self._programs[key] = self._engine.load(path, program)
        return _Open(self._programs[key])

    def close(self) -> None:
        """Gives back the runtime's memory; the engine can go on and loads anew."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()


class _Open:
    """A shared program as one device sees it."""

    def __init__(self, program: LoadedProgram) -> None:
        self._program = program

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        return self._program.run(arrays)

    def close(self) -> None:
        """The program stays loaded."""
