"""What no training changes of the low ends, computed once per example and kept on the device's disk.

The modality adapter sits behind the first layer's MLP, so a batch needs two stored arrays for each modality (`base` and
`branch`, each tokens x width float32) and no frozen weights at all.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from edge_client.engines.base import Array
from edge_client.job import SPLITS, Split
from edge_client.progress import Progress, Say
from edge_client.rows.local_data import LocalData
from edge_client.rows.row_files import Indices, RowFile, RowWriter
from edge_client.split.parts import Programs
from lamina.encoding.tensors import hash_bytes
from lamina.names import LABEL
from lamina.split.plan import SplitPlan

_KINDS = ("base", "branch")


class PrefixStore:
    """The stored arrays of one run's data, in `folder/<key>`; those of other models or data are deleted. `modalities`: none
    for all of the plan."""

    def __init__(
        self,
        folder: Path,
        manifest: str,
        plan: SplitPlan,
        modalities: Sequence[str],
        data: LocalData,
        programs: Programs,
        say: Say,
    ) -> None:
        self._plan, self._data = plan, data
        self._folder = folder / hash_bytes(f"{manifest} {data.fingerprint}".encode())[:32]
        for other in folder.glob("*"):
            if other != self._folder:
                shutil.rmtree(other)
        self._folder.mkdir(parents=True, exist_ok=True)
        for m in modalities or plan.modalities:
            for split in SPLITS:
                if data.examples(split) and not all(self._file(split, m, kind).is_file() for kind in _KINDS):
                    self._compute(split, m, programs, say)
            programs.close(f"{m}.prefix")

    def take(self, split: Split, modality: str, indices: Indices) -> list[Array]:
        """[base, branch] of these examples."""
        return [RowFile(self._file(split, modality, kind)).take(indices) for kind in _KINDS]

    def labels(self, split: Split, indices: Indices) -> Array:
        return self._data.rows(split, LABEL).take(indices)

    def _compute(self, split: Split, modality: str, programs: Programs, say: Say) -> None:
        rows = self._data.rows(split, modality)
        partial = {kind: self._file(split, modality, kind).with_suffix(".partial") for kind in _KINDS}
        writers = {kind: RowWriter(path, len(rows)) for kind, path in partial.items()}
        progress = Progress(say, f"frozen part of {modality}, {split} examples", len(rows))
        for first, chunk in rows.chunks(self._plan.training.batch_size):
            given = programs.run(f"{modality}.prefix", None, [chunk])
            for kind, writer in writers.items():
                writer.append(given[kind])
            progress.at(first + len(chunk))
        for kind, writer in writers.items():
            writer.finish()
            partial[kind].replace(self._file(split, modality, kind))

    def _file(self, split: Split, modality: str, kind: str) -> Path:
        return self._folder / f"{split}-{modality}-{kind}.npy"
