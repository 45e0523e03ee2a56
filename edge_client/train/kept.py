"""What a device keeps from one round of a stage to its next one: the optimiser's moments, and the model that MOON moves away
from.

Each trained round leaves one file `<run>-<stage>-<round>-<crc>.kept`, whole and on the disk before its outcome is. A round
reads that of the newest earlier round, never its own: one that is trained again, because the process was killed in between,
starts from the same state and comes to the same bits. Files of other stages and runs are deleted.

A missing, damaged or foreign file is a fresh start and no error: the state helps training along, and nothing depends on it.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_client.job import Job
from edge_client.progress import Say
from edge_client.rows.row_files import file_crc
from lamina.encoding.tensors import Float32
from lamina.files import move_durably, raise_if_full

_SUFFIX = ".kept"
Vectors = Mapping[str, Sequence[Float32]]
"""Flat float32 arrays by name; a name's arrays follow one another in the file."""


class KeptState:
    """The state of one job's run and stage. `keeps`: the job needs any; otherwise all that was kept is deleted."""

    def __init__(self, job: Job, keeps: bool, say: Say) -> None:
        self._folder, self._round, self._say = Path(job.kept_folder), job.round, say
        tensors = [(segment.name, tensor.name, tensor.shape) for segment in job.active for tensor in segment.tensors]
        self._facts = [job.run, job.stage, job.optimizer, tensors]
        self._stem = f"{zlib.crc32(job.run.encode()):08x}-{job.stage}"
        self._earlier: Path | None = None
        if not job.kept_folder or not self._folder.is_dir():
            return
        found: dict[int, Path] = {}
        for path in self._folder.glob(f"{self._stem}-*{_SUFFIX}"):
            number = _round_of(path)
            if keeps and number is not None and number < job.round:
                found[number] = path
        self._earlier = found[max(found)] if found else None
        for path in self._folder.iterdir():
            if path != self._earlier:
                path.unlink()

    def load(self, vectors: Vectors) -> int | None:
        """Fills the vectors with what the newest earlier round left, and gives the number of optimiser steps until then.

        None, with the vectors as they were, if there is nothing to go on with.
        """
        path = self._earlier
        if path is None:
            return None
        if file_crc(path) != _promised_crc(path):
            self._say(f"the state kept from the last round is damaged ({path.name}); starting afresh")
            return None
        with path.open("rb") as file:
            header = json.loads(file.readline())
            if header["key"] != self._key(vectors):
                self._say(f"the state kept from the last round is of another model or setting ({path.name}); starting afresh")
                return None
            for arrays in vectors.values():
                for array in arrays:
                    file.readinto(array.view(np.uint8).data)
        return int(header["steps"])

    def save(self, vectors: Vectors, steps: int) -> None:
        """Writes this round's file; it is on the disk when this returns. Raises DiskFullError if it does not fit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "unfinished.partial"
        header = json.dumps({"key": self._key(vectors), "steps": steps}).encode() + b"\n"
        crc = zlib.crc32(header)
        try:
            with partial.open("wb") as file:
                file.write(header)
                for arrays in vectors.values():
                    for array in arrays:
                        data = array.view(np.uint8).data
                        file.write(data)
                        crc = zlib.crc32(data, crc)
                file.flush()
                os.fsync(file.fileno())
            move_durably(partial, self._folder / f"{self._stem}-{self._round}-{crc:08x}{_SUFFIX}")
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise_if_full(error, partial)
            raise

    def _key(self, vectors: Vectors) -> int:
        """Of what the state belongs to: another run, stage, optimiser, list of tensors or list of vectors gives another."""
        sizes = [(name, sum(array.size for array in arrays)) for name, arrays in vectors.items()]
        return zlib.crc32(json.dumps([*self._facts, sizes], sort_keys=True).encode())


def _round_of(path: Path) -> int | None:
    parts = path.stem.split("-")
    return int(parts[2]) if len(parts) == 4 and parts[2].isdecimal() else None


def _promised_crc(path: Path) -> int | None:
    try:
        return int(path.stem.rpartition("-")[2], 16)
    except ValueError:
        return None
