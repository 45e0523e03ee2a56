"""Updates: checked, synced to disk, committed, and only then answered. Each counts exactly once.

A device may send the same update as often as it likes, also after the round has closed: the answer is the same. Nothing
that is refused leaves a byte behind, and a refusal never costs a device its place. A calibrator's update goes the same way.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from coordinator.house import House
from coordinator.rounds.devices import get_device
from coordinator.rounds.rounds import advance, get_run
from coordinator.rounds.slots import Address, Expected, find_slot
from coordinator.store.incoming import Incoming
from coordinator.store.tables import CalibrationRow, PlaceRow, UpdateRow
from coordinator.view.last_acts import note_act
from lamina.encoding.compression import Compression, decompress_stream
from lamina.encoding.tensors import Encoding, file_encoding, max_file_bytes
from lamina.errors import HashMismatchError, TensorFileError, UpdateRejectedError
from lamina.federation.content import Content, check_content
from lamina.federation.losses import MAX_EXAMPLES
from lamina.wire import Accepted, TrainReport

log = logging.getLogger("lamina.coordinator")


def expect_update(
    house: House, address: Address, digest: str, report: TrainReport, compression: Compression
) -> Accepted | Expected:
    """Before the body is read: the answer if this update is counted already, else what it must hold.

    Raises UnknownNameError, RoundClosedError, and UpdateRejectedError, also for an encoding or a compression that the
    device was not asked for.
    """
    with house.database.read() as session:
        slot = find_slot(house, session, address, digest)
        if slot is None:
            return _accepted(address, digest)
        if report.num_examples > MAX_EXAMPLES:
            raise UpdateRejectedError(f"{report.num_examples} examples cannot be: at most {MAX_EXAMPLES} are counted")
        if report.upload_encoding not in ("fp32", slot.place.upload_encoding):
            raise UpdateRejectedError(
                f"an update in {report.upload_encoding} was not asked for: send {slot.place.upload_encoding}, or fp32"
            )
        if compression not in ("none", slot.place.compression):
            raise UpdateRejectedError(f"an update compressed with {compression} was not asked for: send it as it is")
        return slot.expected


def accept_update(
    house: House,
    address: Address,
    incoming: Incoming,
    digest: str,
    report: TrainReport,
    expected: Expected,
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
    with _decompressed(house, incoming, compression, max_file_bytes(expected.specs)) as body:
        if (encoding := file_encoding(str(body.path))) != report.upload_encoding:
            raise TensorFileError(f"the file is encoded as {encoding}, but its report says {report.upload_encoding}")
        content = check_content(str(body.path), expected.specs, expected.max_difference)
        body.seal()
        with house.database.write() as session:
            advance(house, session, get_run(session, address.run), house.clock())  # a deadline may have passed meanwhile
            slot = find_slot(house, session, address, digest)
            if slot is not None:
                if slot.expected != expected:
                    raise UpdateRejectedError(
                        f"this device took on other work in {address.text} while the update was on its way; check in again"
                    )
                # The file first: a crash in between leaves a file that no row names, never a row without its file.
                place = slot.place
                if isinstance(place, CalibrationRow):
                    body.keep_as(house.calibration_file(place.round_id))
                    place.body_sha256, place.content_sha256 = digest, content.sha256
                    place.report = report.model_dump_json()
                else:
                    body.keep_as(house.update_file(place.round_id, place.device_id))
                    session.add(_update_row(session, place, digest, content, report, encoding, compression))
                session.flush()
                device = get_device(session, address.device_id)
                note_act(device, f"sent its update of {address.text}", house.clock())
                log.info("%s: update of %s accepted", address.text, device.name)
                advance(house, session, slot.run, house.clock())
    return _accepted(address, digest)


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


def _update_row(
    session: Session,
    place: PlaceRow,
    digest: str,
    content: Content,
    report: TrainReport,
    encoding: Encoding,
    compression: Compression,
) -> UpdateRow:
    device = get_device(session, place.device_id)
    return UpdateRow(
        round_id=place.round_id,
        device_id=device.id,
        body_sha256=digest,
        content_sha256=content.sha256,
        norm=content.norm,
        num_examples=report.num_examples,
        report=report.model_dump_json(),
        engine=device.engine,
        test_examples=device.test_examples,
        download_encoding=place.download_encoding,
        upload_encoding=encoding,
        upload_compression=compression,
        modalities=place.modalities,
    )


def _accepted(address: Address, digest: str) -> Accepted:
    return Accepted(run=address.run, stage=address.stage, round=address.round, sha256=digest)
