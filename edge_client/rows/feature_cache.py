"""The feature cache: what the frozen prefix makes of the device's examples, computed once per stage and kept on disk.

The prefix never changes while it is frozen, so its output over the data is a constant. When the next stage freezes one
more segment, only that segment runs, over the features that are already there: O(stages), not O(stages x rounds x epochs
x depth). One segment's weights and one chunk of rows are in memory at a time.

A file is named `<key>-<crc>.npy`. The key stands for the data, the modality, the split, the view, the encoding and the
chain of weights and programs that made the features; the CRC-32 is that of the file, so that a damaged one is noticed and
made again. A file under its final name is complete: it is written under another name and renamed, so a device that is
killed goes on from the last segment that was finished.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_client.engines.base import Array, Engine, LoadedProgram
from edge_client.job import FeaturePlan, FrozenStep, SegmentFile
from edge_client.process.memory import give_back_free_memory
from edge_client.progress import Progress, Say
from edge_client.rows.augment import AugmentedRows
from edge_client.rows.checks import check_inputs
from edge_client.rows.feature_encoding import decode_rows, encode_rows
from edge_client.rows.row_files import Indices, RowFile, RowSource, RowWriter, file_crc
from lamina.encoding.quantize import frozen_weights
from lamina.encoding.tensors import Float32, decode_one_by_one
from lamina.errors import EngineError

VERIFIED = "verified.json"


class FeaturesLostError(Exception):
    """Features that the job counted on are gone or damaged: it has to be prepared again, with all that makes them."""


class FeatureCache:
    def __init__(self, folder: Path, engine: Engine, encoding: str, say: Say) -> None:
        self._folder, self._engine, self._encoding, self._say = folder, engine, encoding, say
        folder.mkdir(parents=True, exist_ok=True)
        self._verified = _Verified(folder / VERIFIED)
        self._prefixes: dict[tuple[FrozenStep, ...], _Prefix] = {}

    def rows(
        self, plan: FeaturePlan, view: int, stored_examples: int, on_chunk: Callable[[], None] = lambda: None
    ) -> RowSource:
        """The modality's rows after all frozen steps, in one view.

        The first `stored_examples` come from disk, and are put there if they are not; the others are computed whenever they
        are asked for. Raises NonFiniteError for a feature that is NaN or infinite.
        """
        raw: RowSource = RowFile(Path(plan.rows.path), plan.rows.offset, plan.rows.source, plan.rows.identity)
        if plan.augmentation is not None:
            raw = AugmentedRows(raw, plan.augmentation, view)
        if not plan.steps:
            return raw
        stored_examples = min(stored_examples, len(raw))
        stored: StoredRows | None = None
        if stored_examples:
            done, stored = self._deepest(plan, view)
            while done < len(plan.steps):
                stored = self._extend(plan, view, done, stored or raw, stored_examples, on_chunk)
                done += 1
        if stored is not None and len(stored) == len(raw):
            return stored
        # The views of a modality share one: program and weights would else be in memory once for each of them.
        return PartlyStored(stored, raw, self._prefixes.setdefault(plan.steps, _Prefix(self._engine, plan)))

    def keep_only(self, keys: Iterable[Sequence[str]]) -> None:
        """Deletes all but the deepest file of each of these chains of keys."""
        keep = {self._folder / VERIFIED}
        for chain in keys:
            for key in reversed(chain):
                found = list(self._folder.glob(f"{key}-*.npy"))
                if found:
                    keep |= set(found)
                    break
        for path in self._folder.iterdir():
            if path not in keep:
                path.unlink()

    def _deepest(self, plan: FeaturePlan, view: int) -> tuple[int, "StoredRows | None"]:
        """How many steps are on disk already, and their rows."""
        for depth in range(len(plan.steps), 0, -1):
            for path in self._folder.glob(f"{plan.keys[view][depth - 1]}-*.npy"):
                if path in self._verified or file_crc(path) == _promised_crc(path):
                    self._verified.add(path)
                    return depth, StoredRows(path)
                self._say(f"cached features {path.name} are damaged; making them again")
                path.unlink()
        return 0, None

    def _extend(
        self, plan: FeaturePlan, view: int, done: int, source: RowSource, count: int, on_chunk: Callable[[], None]
    ) -> "StoredRows":
        """Runs one more step over the first `count` rows of a source, and stores what it gives."""
        step, key = plan.steps[done], plan.keys[view][done]
        what = f"features of {step.segment.name}" + (f", view {view}" if len(plan.keys) > 1 else "")
        progress = Progress(self._say, what, count)
        writer = RowWriter(self._folder / f"{key}.partial", count)
        prefix = _Prefix(self._engine, plan)
        try:
            for first in range(0, count, step.program.max_batch):
                chunk = np.arange(first, min(first + step.program.max_batch, count))
                features = prefix.run(source.take(chunk), done)
                writer.append(encode_rows(features, self._encoding, first, what))
                progress.at(first + len(chunk))
                on_chunk()
            path = self._folder / f"{key}-{writer.finish():08x}.npy"
            # No fsync: should power fail before the bytes are on the disk, the CRC in the name shows it.
            writer.path.replace(path)
        except BaseException:
            writer.abandon()
            raise
        finally:
            prefix.close()
        self._verified.add(path)
        return StoredRows(path)


class StoredRows:
    """A file of stored features; its rows as float32."""

    def __init__(self, path: Path) -> None:
        self._file = RowFile(path)

    def __len__(self) -> int:
        return len(self._file)

    def take(self, indices: Indices) -> Array:
        return decode_rows(self._file.take(indices))


class PartlyStored:
    """Features of which only the first rows fit the disk; the others go through the whole prefix each time."""

    def __init__(self, stored: StoredRows | None, raw: RowSource, prefix: "_Prefix") -> None:
        self._stored, self._raw, self._prefix = stored, raw, prefix

    def __len__(self) -> int:
        return len(self._raw)

    def take(self, indices: Indices) -> Array:
        wanted = np.asarray(indices)
        if self._stored is None:
            return self._prefix.run_all(self._raw.take(wanted))
        is_held = wanted < len(self._stored)
        held = self._stored.take(wanted[is_held])
        if is_held.all():
            return held
        rows = np.empty((len(wanted), *held.shape[1:]), np.float32)
        rows[is_held], rows[~is_held] = held, self._prefix.run_all(self._raw.take(wanted[~is_held]))
        return rows


class _Prefix:
    """Runs frozen steps; the program and the weights of one step are in memory at a time."""

    def __init__(self, engine: Engine, plan: FeaturePlan) -> None:
        self._engine, self._plan = engine, plan
        self._program: tuple[str, LoadedProgram] | None = None
        self._weights: tuple[int, list[Array]] | None = None

    def run_all(self, rows: Array) -> Array:
        """All steps over some rows; in between, one chunk of the program's size at a time."""
        for index, step in enumerate(self._plan.steps):
            size = step.program.max_batch
            pieces = [self.run(rows[first : first + size], index) for first in range(0, len(rows), size)]
            rows = np.concatenate(pieces)
        return rows

    def run(self, rows: Array, index: int) -> Array:
        """One step over at most one chunk of rows; a new array."""
        step = self._plan.steps[index]
        own_limits = {} if step.limit is None else {spec.name: step.limit for spec in step.program.inputs}
        check_inputs(step.program, [rows], own_limits)
        (features,) = self._opened(step).run([*self._loaded(index, step), rows])
        if features.dtype != np.float32 or features.shape[:1] != rows.shape[:1]:
            raise EngineError(f"{step.segment.name} gave {features.dtype} {features.shape} for {len(rows)} rows")
        return features.copy()

    def close(self) -> None:
        if self._program is not None:
            self._program[1].close()
        self._program = self._weights = None
        give_back_free_memory()

    def _opened(self, step: FrozenStep) -> LoadedProgram:
        """Equal layers are one program, so a chain of them opens it once."""
        if not step.program.path:
            raise FeaturesLostError(step.segment.name)
        if self._program is None or self._program[0] != step.program.blob:
            self.close()
            self._program = (step.program.blob, self._engine.load(Path(step.program.path), step.program))
        return self._program[1]

    def _loaded(self, index: int, step: FrozenStep) -> list[Array]:
        if self._weights is None or self._weights[0] != index:
            self._weights = None  # the old ones go before the new ones come
            given: list[Array] = []
            shapes = []
            for tensor in _tensors_of(step.segment):
                shapes.append(tensor.shape)
                given += frozen_weights([tensor], step.program.precision)  # one at a time, so int8 never needs all in float32
            if tuple(shapes) != (*step.program.weights, *step.program.frozen):
                raise EngineError(f"the frozen program of {step.segment.name} takes other weights than the segment has")
            self._weights = (index, given)
        return self._weights[1]


def _tensors_of(segment: SegmentFile) -> Iterator[Float32]:
    """All tensors of a segment as its frozen program takes them, one resident at a time: those that some stage trains, then
    those that none does."""
    for _, tensor in decode_one_by_one(segment.path, segment.tensors):
        yield tensor
    if segment.frozen:
        for _, tensor in decode_one_by_one(segment.frozen_path, segment.frozen):
            yield tensor


class _Verified:
    """Files whose CRC was right, by name, size and time of change: an unchanged file is not read again at every start."""

    def __init__(self, note: Path) -> None:
        self._note = note
        try:
            self._known: dict[str, list[int]] = dict(json.loads(note.read_bytes())) if note.is_file() else {}
        except ValueError:
            self._known = {}

    def __contains__(self, path: Path) -> bool:
        return self._known.get(path.name) == _stamp(path)

    def add(self, path: Path) -> None:
        if path not in self:
            self._known[path.name] = _stamp(path)
            partial = self._note.with_suffix(".partial")
            partial.write_text(json.dumps(self._known))
            partial.replace(self._note)


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _promised_crc(path: Path) -> int:
    return int(path.stem.rpartition("-")[2], 16)
