"""Updates: checked, synced to disk, committed, and only then answered. Each counts exactly once.

A device may send the same update as often as it likes, also after the round has closed: the answer is the same. Nothing
that is refused leaves a byte behind, and a refusal never costs a device its place.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
from sqlalchemy.orm import Session

from coordinator.devices import get_device
from coordinator.house import House
from coordinator.incoming import Incoming
from coordinator.rounds import advance, get_round, get_run
from coordinator.tables import PlaceRow, RoundRow, RunRow, UpdateRow
from lamina.compression import Compression, decompress_stream
from lamina.errors import HashMismatchError, RoundClosedError, TensorFileError, UpdateRejectedError
from lamina.record import Record
from lamina.segments import TensorSpec
from lamina.tensors import decode_one_by_one, file_encoding, max_file_bytes
from lamina.wire import Accepted, TrainReport

log = logging.getLogger("lamina.coordinator")

MAX_DIFFERENCE = 1e30
"""No difference may be larger: sums of legal ones then stay finite in float32 for as many rounds as anyone can run."""


class Address(Record):
    """Which device sends, and for which round."""

    device_id: str
    run: str
    stage: int
    round: int

    @property
    def text(self) -> str:
        return f"round {self.round} of stage {self.stage} of {self.run}"


def expect_update(
    house: House, address: Address, digest: str, report: TrainReport, compression: Compression
) -> Accepted | list[TensorSpec]:
    """Before the body is read: the answer if this update is counted already, else the tensors that it must hold.

    Raises UnknownNameError, RoundClosedError, and UpdateRejectedError, also for an encoding or a compression that the
    device was not asked for.
    """
    with house.database.write() as session:
        run, row, place = _find(house, session, address, digest)
        if place is None:
            return _accepted(address, digest)
        if report.upload_encoding not in ("fp32", place.upload_encoding):
            raise UpdateRejectedError(
                f"an update in {report.upload_encoding} was not asked for: send {place.upload_encoding}, or fp32"
            )
        if compression not in ("none", place.compression):
            raise UpdateRejectedError(f"an update compressed with {compression} was not asked for: send it as it is")
        return house.manifest(run.manifest).exchange_specs(row.stage)


def accept_update(
    house: House,
    address: Address,
    incoming: Incoming,
    digest: str,
    report: TrainReport,
    specs: list[TensorSpec],
    compression: Compression,
) -> Accepted:
    """After the body is read: decompress it, check it and count it. What is kept is the decompressed tensor file.

    Raises HashMismatchError, TensorFileError, TooLargeError, DiskFullError, and what `expect_update` raises for a round
    that has closed while the body was on its way.
    """
    if incoming.sha256 != digest:
        raise HashMismatchError(
            f"the body of {incoming.size_bytes} bytes has sha256 {incoming.sha256}, its header says {digest}; send it again"
        )
    with _decompressed(house, incoming, compression, max_file_bytes(specs)) as body:
        if (encoding := file_encoding(str(body.path))) != report.upload_encoding:
            raise TensorFileError(f"the file is encoded as {encoding}, but its report says {report.upload_encoding}")
        content = check_content(str(body.path), specs)
        body.seal()
        with house.database.write() as session:
            run, row, place = _find(house, session, address, digest)
            if place is not None:
                device = get_device(session, address.device_id)
                # The file first: a crash in between leaves a file that no row names, never a row without its file.
                body.keep_as(house.update_file(row.id, device.id))
                session.add(
                    UpdateRow(
                        round_id=row.id,
                        device_id=device.id,
                        body_sha256=digest,
                        content_sha256=content,
                        num_examples=report.num_examples,
                        report=report.model_dump_json(),
                        engine=device.engine,
                        test_examples=device.test_examples,
                        download_encoding=place.download_encoding,
                        upload_encoding=encoding,
                        upload_compression=compression,
                    )
                )
                session.flush()
                advance(house, session, run, house.clock())
    log.info("%s: update of %s accepted", address.text, address.device_id)
    return _accepted(address, digest)


def check_content(path: str, specs: list[TensorSpec]) -> str:
    """sha256 over the decoded values, the same for every encoding of them; one tensor is resident at a time.

    Raises TensorFileError.
    """
    content = sha256()
    for name, value in decode_one_by_one(path, specs):
        largest = float(np.abs(value).max(initial=0.0))
        if largest > MAX_DIFFERENCE:
            raise TensorFileError(f"tensor {name!r} holds {largest:g}, above {MAX_DIFFERENCE:g}: the training diverged")
        content.update(name.encode() + b"\0")
        content.update(value.tobytes())
    return content.hexdigest()


@contextmanager
def _decompressed(house: House, incoming: Incoming, compression: Compression, limit_bytes: int) -> Iterator[Incoming]:
    """The body as the tensor file that it is, of at most `limit_bytes`."""
    if compression == "none":
        yield incoming
        return
    with Incoming(house.settings.updates, limit_bytes) as body:
        with incoming.path.open("rb") as file:
            decompress_stream(file, body.write, compression, limit_bytes)
        yield body


def _find(house: House, session: Session, address: Address, digest: str) -> tuple[RunRow, RoundRow, PlaceRow | None]:
    """The round and the place that may count this update; no place if the same one is counted already."""
    run = get_run(session, address.run)
    row = get_round(house, session, run, address.stage, address.round)
    counted = session.get(UpdateRow, (row.id, address.device_id))
    if counted is not None:
        if counted.body_sha256 != digest:
            raise UpdateRejectedError(
                f"{address.text} has counted another update of this device, sha256 {counted.body_sha256}; "
                "a round counts one, check in for new work"
            )
        return run, row, None
    advance(house, session, run, house.clock())
    if row.phase != "training":
        raise RoundClosedError(f"{address.text} takes no more updates; check in for new work")
    place = session.get(PlaceRow, (row.id, address.device_id))
    if place is None:
        raise UpdateRejectedError(f"this device has no place in {address.text}; check in to get one")
    if place.is_lost:
        raise RoundClosedError(
            f"the lease of this device in {address.text} was over and another one has its place; check in for new work"
        )
    return run, row, place


def _accepted(address: Address, digest: str) -> Accepted:
    return Accepted(run=address.run, stage=address.stage, round=address.round, sha256=digest)
