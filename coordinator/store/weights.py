"""The newest weights of a run as tensors, and tensors as blobs."""

from collections.abc import Iterable, Mapping

from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import RunRow, SupersededRow, WeightRow
from lamina.bundles.bundle import hash_file
from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import Float32, decode_file, encode
from lamina.errors import HashMismatchError


def read_weights(house: House, session: Session, run: RunRow, segments: Iterable[str]) -> dict[str, Float32]:
    """The tensors of these segments, named `segment/tensor`. Raises HashMismatchError for a damaged file, UnknownNameError."""
    manifest = house.manifest(run.manifest)
    vector: dict[str, Float32] = {}
    for name in segments:
        blob = session.get_one(WeightRow, (run.number, name)).blob
        path = house.blobs.path(blob)
        if hash_file(path) != blob:
            raise HashMismatchError(f"the weights of segment {name}, blob {blob}, are damaged on the coordinator's disk")
        tensors = decode_file(str(path), manifest.segment(name).tensors)
        vector |= {f"{name}/{tensor}": value for tensor, value in tensors.items()}
    return vector


def put_segments(house: House, manifest: Manifest, segments: Iterable[str], vector: Mapping[str, Float32]) -> dict[str, str]:
    """Stores these segments as blobs in fp32; segment -> sha256. Raises DiskFullError."""
    return {
        name: house.blobs.put(encode({spec.name: vector[f"{name}/{spec.name}"] for spec in manifest.segment(name).tensors}))
        for name in segments
    }


def name_weights(session: Session, run: RunRow, blobs: Mapping[str, str]) -> None:
    """From the end of this transaction on, these blobs are the run's newest weights; what they replace can be deleted."""
    for segment, blob in blobs.items():
        row = session.get_one(WeightRow, (run.number, segment))
        if row.blob != blob:
            session.merge(SupersededRow(blob=row.blob))
        row.blob = blob
