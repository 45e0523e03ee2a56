"""The newest weights of a run as tensors, and tensors as blobs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.store.tables import RunRow, SupersededRow, WeightRow
from lamina.bundles.bundle import hash_file
from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import Float32, decode_any, decode_file, encode
from lamina.errors import HashMismatchError


def read_weights(house: House, session: Session, run: RunRow, segments: Iterable[str]) -> dict[str, Float32]:
    """The tensors of these segments, named `segment/tensor`. Raises HashMismatchError for a damaged file, UnknownNameError."""
    manifest = house.manifest(run.manifest)
    vector: dict[str, Float32] = {}
    for name in segments:
        blob = session.get_one(WeightRow, (run.number, name)).blob
        path = _whole(house, blob, f"the weights of segment {name}")
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


def read_rule_state(house: House, run: RunRow) -> dict[str, Float32]:
    """What the run's aggregation rule kept from the round before. Raises HashMismatchError for a damaged file."""
    if not run.rule_state:
        return {}
    return decode_any(str(_whole(house, run.rule_state, f"what the aggregation rule of {run.id} keeps")))


def put_rule_state(house: House, state: Mapping[str, Float32]) -> str:
    """The blob of a rule's state; empty if it has none. Raises DiskFullError."""
    return house.blobs.put(encode(state)) if state else ""


def name_rule_state(session: Session, run: RunRow, blob: str) -> None:
    """From the end of this transaction on, this is the run's state; what it replaces can be deleted."""
    if run.rule_state not in ("", blob):
        session.merge(SupersededRow(blob=run.rule_state))
    run.rule_state = blob


def _whole(house: House, blob: str, what: str) -> Path:
    path = house.blobs.path(blob)
    if hash_file(path) != blob:
        raise HashMismatchError(f"{what}, blob {blob}, are damaged on the coordinator's disk")
    return path
