"""Variants: the same weights as smaller blobs, for devices that agreed to them.

The float32 blob stays the master: the mean is added to it, and every variant is made from it, once, when the first device
needs it. Making one again gives the same bytes, so a variant that is lost, or was removed, costs time and nothing else.
A compressed variant is a blob of its own, so that its download resumes by range like any other.
"""

import threading
from collections.abc import Callable, Iterable

from sqlalchemy import delete, select

from coordinator.store.blobs import Blobs
from coordinator.store.database import Database
from coordinator.store.tables import RunRow, SnapshotRow, SupersededRow, TeacherRow, VariantRow, WeightRow
from lamina.bundles.manifest import Manifest
from lamina.encoding.compression import Compression, compress
from lamina.encoding.tensors import Encoding, decode_file, encode
from lamina.errors import TensorFileError
from lamina.plans.segments import TensorSpec
from lamina.wire import Assignment

Known = dict[tuple[str, Compression], str]
"""(master, compression) -> blob, in one encoding."""


class Variants:
    """The variants of a coordinator's blobs. Safe to use from many threads."""

    def __init__(self, blobs: Blobs, database: Database) -> None:
        self._blobs, self._database = blobs, database
        # One maker at a time: a cohort asks all at once for the same variants, and each is to be made once.
        self._making = threading.Lock()

    def fit(self, assignment: Assignment, manifest: Manifest) -> Assignment:
        """The assignment with the blobs that its encoding and compression ask for, in place of the masters.

        `compressed_weights` has the segments that compression makes smaller. Weights with a value that the encoding cannot hold
        travel in fp32: a device may move the model that far, and the run goes on. Raises DiskFullError.
        """
        try:
            return self._fit(assignment, manifest)
        except TensorFileError:
            if assignment.download_encoding == "fp32":
                raise
            return self._fit(assignment.model_copy(update={"download_encoding": "fp32"}), manifest)

    def remove_outdated(self, manifest_of: Callable[[str], Manifest]) -> None:
        """Deletes weights that newer ones have replaced, and the variants of weights that no unfinished run has any more. A
        device that is still fetching one is told that it is gone and checks in again: its round is over.
        """
        with self._making, self._database.write() as session:
            current = set(session.scalars(select(WeightRow.blob).join(RunRow).where(RunRow.is_finished.is_(False))).all())
            rows = session.scalars(select(VariantRow)).all()
            outdated = [row for row in rows if row.master not in current]
            superseded = set(session.scalars(select(SupersededRow.blob)).all())
            for run in session.scalars(select(RunRow).where(RunRow.is_finished, RunRow.rule_state != "")):
                superseded.add(run.rule_state)
                run.rule_state = ""
            if not outdated and not superseded:
                return
            needed = {row.blob for row in rows if row.master in current}
            needed |= set(session.scalars(select(WeightRow.blob)).all()) | set(session.scalars(select(TeacherRow.blob)).all())
            needed |= set(session.scalars(select(SnapshotRow.blob)).all())
            needed |= set(session.scalars(select(RunRow.rule_state)).all())
            for digest in set(session.scalars(select(RunRow.manifest)).all()):
                needed |= set(manifest_of(digest).blobs)
            # The files first: a row whose file is gone is made again, a file without a row would stay for ever.
            for blob in (superseded | {row.blob for row in outdated}) - needed:
                if self._blobs.find(blob) is not None:
                    self._blobs.remove(blob)
            session.execute(delete(VariantRow).where(VariantRow.master.in_({row.master for row in outdated})))
            session.execute(delete(SupersededRow).where(SupersededRow.blob.in_(superseded - needed)))

    def _fit(self, assignment: Assignment, manifest: Manifest) -> Assignment:
        encoding, compression = assignment.download_encoding, assignment.download_compression
        if encoding == "fp32" and compression == "none":
            return assignment
        wanted: tuple[Compression, ...] = ("none",) if compression == "none" else ("none", compression)
        masters = assignment.weights.values()
        known = self._known(masters, encoding)
        if any((master, kind) not in known for master in masters for kind in wanted):
            with self._making:
                known = self._known(masters, encoding)
                for segment, master in assignment.weights.items():
                    for kind in wanted:
                        if (master, kind) not in known:
                            known[master, kind] = self._make(master, encoding, kind, manifest.segment(segment).tensors, known)
        weights = {segment: known[master, "none"] for segment, master in assignment.weights.items()}
        compressed = {segment: known[master, compression] for segment, master in assignment.weights.items()}
        return assignment.model_copy(
            update={
                "weights": weights,
                "compressed_weights": {name: blob for name, blob in compressed.items() if blob != weights[name]},
            }
        )

    def _known(self, masters: Iterable[str], encoding: Encoding) -> Known:
        with self._database.read() as session:
            rows = session.scalars(
                select(VariantRow).where(VariantRow.master.in_(set(masters)), VariantRow.encoding == encoding)
            ).all()
            known: Known = {(row.master, row.compression): row.blob for row in rows if self._blobs.find(row.blob) is not None}
        if encoding == "fp32":
            known |= {(master, "none"): master for master in masters}
        return known

    def _make(
        self, master: str, encoding: Encoding, compression: Compression, specs: Iterable[TensorSpec], known: Known
    ) -> str:
        if compression == "none":
            blob = self._blobs.put(encode(decode_file(str(self._blobs.path(master)), specs), encoding))
        else:
            plain = self._blobs.path(known[master, "none"]).read_bytes()
            data = compress(plain, compression)
            blob = self._blobs.put(data) if len(data) < len(plain) else known[master, "none"]
        with self._database.write() as session:
            session.merge(VariantRow(master=master, encoding=encoding, compression=compression, blob=blob))
        return blob
