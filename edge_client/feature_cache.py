"""The feature cache: what the frozen prefix makes of the device's examples, computed once per stage and kept on disk.

The prefix never changes while it is frozen, so its output over the data is a constant. When the next stage freezes one
more segment, only that segment runs, over the features that are already there: O(stages), not O(stages x rounds x epochs
x depth). One segment's weights and one chunk of rows are in memory at a time.

A file is named `<key>-<sha256>.npy`. The key stands for the data, the modality, the split and the chain of weights and
programs that made the features; the sha256 is that of the file, so that a damaged one, for whatever reason, is noticed and
made again. A file under its final name is complete: it is written under another name and renamed, so a device that is
killed goes on from the last segment that was finished.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.checks import check_inputs, find_fault
from edge_client.data import Split
from edge_client.engines.base import Engine
from edge_client.memory import give_back_free_memory
from edge_client.progress import Progress, Say
from edge_client.rows import RowFile, RowWriter
from lamina.bundle import hash_file
from lamina.errors import EngineError, NonFiniteError
from lamina.manifest import Program
from lamina.segments import Segment
from lamina.tensors import decode_file, hash_bytes

Fetch = Callable[[str], Path]
"""A blob's file by its sha256, downloaded if it is not there yet."""


@dataclass(frozen=True)
class FrozenStep:
    """One segment of a frozen prefix."""

    segment: Segment
    weights: str
    program: Program


class FeatureCache:
    def __init__(self, folder: Path, fingerprint: str, engine: Engine, fetch: Fetch, say: Say) -> None:
        self._folder, self._fingerprint, self._engine, self._fetch, self._say = folder, fingerprint, engine, fetch, say
        self._verified: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def rows(
        self,
        modality: str,
        split: Split,
        source: RowFile,
        chain: Sequence[FrozenStep],
        limits: dict[str, int],
        on_chunk: Callable[[], None] = lambda: None,
    ) -> RowFile:
        """`source` after all steps of the chain. Blobs are fetched only for the steps that have to run.

        `limits` are those of `checks.limits_of`; `on_chunk` is called after every chunk. Raises NonFiniteError for a
        feature that is NaN or infinite.
        """
        depth, features = self._deepest(modality, split, chain)
        for done in range(depth, len(chain)):
            step = chain[done]
            key = self._key(modality, split, chain[: done + 1])
            path = self._run(step, features or source, key, f"{split} features of {step.segment.name}", limits, on_chunk)
            features = RowFile(path)
        return features or source

    def keep_only(self, chains: Sequence[tuple[str, Split, Sequence[FrozenStep]]]) -> None:
        """Deletes every file that is not the deepest one of these (modality, split, chain)."""
        keep = set()
        for modality, split, chain in chains:
            for depth in range(len(chain), 0, -1):
                found = list(self._folder.glob(f"{self._key(modality, split, chain[:depth])}-*.npy"))
                if found:
                    keep |= set(found)
                    break
        for path in self._folder.iterdir():
            if path not in keep:
                path.unlink()

    def _deepest(self, modality: str, split: Split, chain: Sequence[FrozenStep]) -> tuple[int, RowFile | None]:
        """How many steps of the chain are there already, and their features."""
        for depth in range(len(chain), 0, -1):
            for path in self._folder.glob(f"{self._key(modality, split, chain[:depth])}-*.npy"):
                if path in self._verified or hash_file(path) == path.stem.rpartition("-")[2]:
                    self._verified.add(path)
                    return depth, RowFile(path)
                self._say(f"cached features {path.name} are damaged; making them again")
                path.unlink()
        return 0, None

    def _key(self, modality: str, split: Split, chain: Sequence[FrozenStep]) -> str:
        # The program is part of the key: the same weights in another graph, or in another engine, give other features.
        steps = [(step.segment.name, step.weights, step.program.blob) for step in chain]
        return hash_bytes(json.dumps([self._fingerprint, modality, split, steps]).encode())[:40]

    def _run(
        self, step: FrozenStep, source: RowFile, key: str, what: str, limits: dict[str, int], on_chunk: Callable[[], None]
    ) -> Path:
        weights_file = self._fetch(step.weights)
        program_file = self._fetch(step.program.blob)
        weights = list(decode_file(str(weights_file), step.segment.tensors).values())
        if tuple(weight.shape for weight in weights) != step.program.weights:
            raise EngineError(f"the frozen program of {step.segment.name} takes other weights than the segment has")
        # A frozen program's input has no modality's name; the vocabulary of a text stem is that of the segment's modality.
        own_limits = {spec.name: limits[name] for spec in step.program.inputs if (name := step.segment.modality) in limits}
        progress = Progress(self._say, what, len(source))
        writer = RowWriter(self._folder / f"{key}.partial", len(source))
        program = self._engine.load(program_file, step.program)
        try:
            for first, rows in source.chunks(step.program.max_batch):
                check_inputs(step.program, [rows], own_limits)
                (features,) = program.run([*weights, rows])
                if features.dtype != np.float32 or features.shape[:1] != rows.shape[:1]:
                    raise EngineError(f"{what}: the program gave {features.dtype} {features.shape} for {len(rows)} rows")
                fault = find_fault(features, None, first)
                if fault is not None:
                    raise NonFiniteError(f"{what}: {fault}; the frozen weights or the data hold extreme values")
                writer.append(features)
                progress.at(first + len(rows))
                on_chunk()
            path = self._folder / f"{key}-{writer.finish()}.npy"
            # No fsync: should power fail before the bytes are on the disk, the sha256 in the name shows it.
            writer.path.replace(path)
        except BaseException:
            writer.abandon()
            raise
        finally:
            program.close()
            del weights
            give_back_free_memory()
        self._verified.add(path)
        return path
