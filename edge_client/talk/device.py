"""The talking half of a device: enrol once, then check in, fetch what the work needs, and send what became of it.

    python -m edge_client.talk.device OPTIONS      as the supervisor runs it: ends with status 75 when a job is ready

Everything that takes long leaves its result on disk under its final name, so the process may be killed at any moment and
started again: it downloads, computes and sends only what was not finished.
"""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import environ, getppid
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from edge_client.engines import load_engine
from edge_client.job import Heartbeat, Job
from edge_client.process.memory import die_with_parent, peak_bytes
from edge_client.process.outcome import FAILURES, JOB, PACKED, UPDATE, read_outcome
from edge_client.process.resident import ResidentTrainer
from edge_client.process.supervisor import OUTCOME, PARENT, WORK_STATUS
from edge_client.progress import Say, say
from edge_client.rows.local_data import DATA_RULES, LocalData
from edge_client.rows.row_files import file_crc
from edge_client.talk.assignment import check_assignment, check_manifest
from edge_client.talk.blobs import BlobCache
from edge_client.talk.identity import IDENTITY_FILE, exclusive, load_or_enrol, read_enrolment_token
from edge_client.talk.prepare import prepare_job
from edge_client.talk.program_files import Fetch
from edge_client.talk.transport import Transport
from edge_client.talk.trust import Verifier
from edge_client.train.heartbeat import Lease
from edge_client.train.trainer import do_job
from lamina.bundles.manifest import Manifest
from lamina.encoding.compression import Compression, available_compressions, compress_file
from lamina.encoding.tensors import ENCODINGS, max_file_bytes
from lamina.errors import (
    ConfigError,
    EngineError,
    HashMismatchError,
    LaminaError,
    NotEnrolledError,
    ProtocolError,
    RoundClosedError,
    TensorFileError,
    TooLargeError,
    UnknownNameError,
    UpdateRejectedError,
    all_errors,
    shown,
)
from lamina.files import disk_errors_named, write_durably
from lamina.names import EngineName
from lamina.record import Record, explain
from lamina.wire import MAX_JSON_BYTES, Assignment, CardWanted, CheckIn, DeviceRole, Evaluation, Refused, TrainReport, Wait

_CHECKED, _BYTES = "checked.json", "bytes.json"
_MOST_FAILURES = 5
_FOR_GOOD = (UpdateRejectedError, TooLargeError, TensorFileError, UnknownNameError, ConfigError, EngineError)
"""Refusals of an outcome that would be the same the next time; an EngineError is this device's own, after too many deaths."""
_FIRST_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """What `lamina join` was told. `has_worked`: a job was done since the command began. `trust`: public keys as text.

    `role` is `calibrator` for `lamina calibrate`: the same client, with data of the server's own, and other work.
    `stall_seconds` is how long training may do nothing at most (`edge_client.process.watchdog`).
    `is_resident` keeps this process and a training process between jobs, instead of one at a time.
    """

    url: str
    data: str
    name: str
    engine: EngineName
    state: str
    token_file: str | None = None
    run: str | None = None
    until_finished: bool = False
    disk_bytes: int | None = None
    is_resident: bool = False
    trust: Sequence[str] = ()
    allow_unsigned: bool = False
    has_worked: bool = False
    role: DeviceRole = "device"
    stall_seconds: float = 1800.0


def join(
    options: Options,
    enrolment_token: Callable[[], str],
    connect: Callable[[str], Transport] = Transport,
    say: Say = say,
) -> None:
    """A device in this one process: for programs that embed it. `lamina join` has the supervisor and two processes."""
    state = Path(options.state)
    with disk_errors_named(state), exclusive(state), connect(options.url) as transport:
        load_engine(options.engine)
        device = Device(options, transport, enrolment_token, say)
        while job := device.next_job():
            do_job(job, say, Lease(job, say, lambda heartbeat: _ask(transport, heartbeat)))


class Device:
    """An enrolled device and its data."""

    def __init__(self, options: Options, transport: Transport, enrolment_token: Callable[[], str], say: Say = say) -> None:
        """`enrolment_token` is asked for only if the state folder holds no identity. What can be wrong on this machine is
        found before the coordinator is bothered."""
        self._options, self._transport, self._say = options, transport, say
        self._state = Path(options.state)
        self._work = self._state / "work"
        self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self._state, self._work):
            for unfinished in folder.glob(".*.partial"):  # of a write that was killed
                unfinished.unlink()
        self._verifier = Verifier(self._state, options.trust, options.allow_unsigned, transport.url, say)
        self._data = LocalData(Path(options.data), self._state / "data")
        identity = load_or_enrol(self._state, options.name, transport, enrolment_token)
        transport.token = identity.device_token
        if not options.has_worked:
            counts = f"{self._data.train_examples} training and {self._data.test_examples} test examples"
            self._say(f"{options.role} {options.name}: {counts}, engine {options.engine}")
        self._has_worked = options.has_worked
        self._blobs = BlobCache(self._state / "blobs", transport, say)
        self._manifest: tuple[str, Manifest] | None = None
        self._said = ""
        self._recall_bytes()

    def next_job(self) -> Job | None:
        """Sends the outcome of the last job, then asks until there is a new one; it also lies in the work folder.

        None, with `until_finished`, when no run is open after at least one job was done.
        """
        failed: Assignment | None = None
        while True:
            self._deliver()
            answer = self._check_in()
            if isinstance(answer, Refused):
                raise ProtocolError(f"the coordinator cannot use this device: {answer.detail}")
            if isinstance(answer, Wait):
                if answer.reason == "no_run" and self._options.until_finished and self._has_worked:
                    self._say(f"finished: {answer.detail}")
                    return None
                if answer.reason != self._said:  # the numbers in its detail change all the time
                    self._said = answer.reason
                    self._say(f"waiting: {answer.detail}")
                self._transport.wait(answer)
                continue
            self._said = ""
            try:
                job = self._prepare(answer)
            except UnknownNameError as error:
                # The weights of a round that has closed may be gone. If the same work is offered again, they are lost.
                if answer == failed:
                    raise
                failed = answer
                self._say(f"{error.message}; checking in again")
                continue
            self._has_worked = True
            return job

    def _prepare(self, work: Assignment) -> Job:
        if (work.phase == "calibrate") != (self._options.role == "calibrator"):
            raise ProtocolError(f"the coordinator gave a {self._options.role} work of phase {work.phase!r}; update it")
        manifest = self._load_manifest(work.manifest)
        check_assignment(work, manifest, self._data.modalities)
        self._check_data(manifest, work)
        fetch = self._fetcher(manifest, work)
        job = prepare_job(
            work,
            manifest,
            self._data,
            fetch,
            self._state,
            self._options.name,
            self._options.engine,
            self._facts(),
            self._transport.url,
            self._options.disk_bytes,
        )
        job = replace(job, stall_seconds=self._options.stall_seconds)
        blobs = {
            work.manifest,
            *work.weights.values(),
            *work.teacher_weights.values(),
            *manifest.frozen_tensors.values(),  # the same in every round: fetched once
        }
        self._blobs.keep_only(blobs | _programs_of(manifest, self._options.engine))
        (self._work / OUTCOME).unlink(missing_ok=True)
        write_durably(self._work / JOB, job.to_json())
        self._remember_bytes()
        return job

    def _deliver(self) -> None:
        """Sends what became of the last job, if it was done; the work folder is empty afterwards.

        Where the coordinator is out of reach, its disk is full or its answer is none, the outcome stays, and the same command
        sends it later. What it refuses for good is dropped.
        """
        outcome = read_outcome(self._work)
        job = self._last_job()
        if outcome is None or job is None:
            return
        try:
            self._send(job, outcome)
        except RoundClosedError as error:
            self._say(f"too late: {error.message}; checking in again")
        except _FOR_GOOD:
            self._clear_work()
            raise
        self._clear_work()

    def _last_job(self) -> Job | None:
        """The job in the work folder; None if there is none, or one that this version of lamina cannot read."""
        path = self._work / JOB
        if not path.is_file():
            return None
        try:
            return Job.read(path)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._say(f"{path} is damaged, or of another version of lamina; its work is done again")
            self._clear_work()
            return None

    def _clear_work(self) -> None:
        for name in (OUTCOME, JOB, UPDATE, PACKED):
            (self._work / name).unlink(missing_ok=True)

    def _send(self, job: Job, outcome: dict[str, Any]) -> None:
        kind = outcome.pop("kind")
        if kind == "error":
            self._clear_work()
            raise all_errors().get(outcome["code"], EngineError)(outcome["message"])
        if kind == "again":
            self._say(outcome["reason"])
        elif kind == "died":
            self._note_failure(job, outcome["how"])
        elif kind == "trained" and self._is_update_damaged(outcome.pop("update_crc", None)):
            self._note_failure(job, "its update was damaged on this disk")
        elif kind == "evaluated":
            self._transport.put_evaluation(job.run, job.stage, job.round, _record(Evaluation, **outcome))
            self._say(f"{job.where}: evaluated, {outcome['correct']} of {outcome['num_examples']} correct")
            self._job_is_done()
        else:
            self._send_update(job, outcome)
            self._job_is_done()

    def _is_update_damaged(self, crc: int | None) -> bool:
        """Whether the update is not the one that was trained; without a CRC, it is of a version that wrote none."""
        path = self._work / UPDATE
        return not path.is_file() or (crc is not None and file_crc(path) != crc)

    def _send_update(self, job: Job, outcome: dict[str, Any]) -> None:
        file, compression = self._packed_update(job)
        failures = self._failures(job)
        down, up = self._transport.bytes_down, self._transport.bytes_up + file.stat().st_size
        report = _record(
            TrainReport,
            num_examples=outcome["num_examples"],
            loss=outcome["loss"],
            train_seconds=outcome["train_seconds"],
            peak_bytes=self._device_bytes(outcome["peak_bytes"]),
            bytes_down=down,
            bytes_up=up,
            upload_encoding=job.upload_encoding,
            failed_attempts=failures.get("count", 0),
            failure=failures.get("how", ""),
        )
        self._transport.put_update(job.run, job.stage, job.round, file, report, compression)
        # What was reported is reported; repeated attempts and later messages go into the next report.
        self._transport.bytes_down -= down
        self._transport.bytes_up -= up
        seconds, loss = outcome["train_seconds"], outcome["loss"]
        self._say(f"{job.where}: trained in {seconds:.1f} s, mean loss {loss:.4f}, update accepted")

    def _packed_update(self, job: Job) -> tuple[Path, Compression]:
        """The file that travels: compressed as agreed, if that is shorter."""
        plain, packed = self._work / UPDATE, self._work / PACKED
        if job.upload_compression == "none":
            return plain, "none"
        compress_file(plain, packed, job.upload_compression)
        if packed.stat().st_size < plain.stat().st_size:
            return packed, job.upload_compression
        return plain, "none"

    def _note_failure(self, job: Job, how: str) -> None:
        """Counts how often this work ended the trainer. Raises EngineError when it is not to be tried any more."""
        path = self._work / FAILURES
        count = self._failures(job).get("count", 0) + 1
        write_durably(path, json.dumps({"work": _key(job), "count": count, "how": how[:200]}).encode())
        if count >= _MOST_FAILURES:
            path.unlink()
            raise EngineError(
                f"{job.where}: the training process died {count} times, the last time {how}; engine {job.engine}. If memory "
                "is short here, ask `lamina fit` for settings that need less, or join with another --engine"
            )
        pause = _FIRST_PAUSE_SECONDS * 2 ** (count - 1)
        self._say(f"{job.where}: attempt {count} failed, {how}; nothing is lost, trying again in {pause:.0f} s")
        self._transport.sleep(pause)

    def _failures(self, job: Job) -> dict[str, Any]:
        """How often this very work failed, and how; empty if it never did."""
        path = self._work / FAILURES
        known: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        return known if known.get("work") == _key(job) else {}

    def _job_is_done(self) -> None:
        (self._work / FAILURES).unlink(missing_ok=True)
        self._has_worked = True  # also if it is the work of an earlier command

    def _facts(self) -> CheckIn:
        return _record(
            CheckIn,
            engine=self._options.engine,
            modalities=self._data.modalities,
            train_examples=self._data.train_examples,
            test_examples=self._data.test_examples,
            encodings=ENCODINGS,
            compressions=available_compressions(),
            run=self._options.run,
            role=self._options.role,
            data_card=self._data.card.sha256 if self._data.card is not None else "",
        )

    def _check_in(self) -> Assignment | Wait | Refused:
        facts, card = self._facts(), self._data.card
        try:
            answer = self._transport.check_in(facts)
            if isinstance(answer, CardWanted) and card is not None:
                self._transport.put_card(card.to_json())
                answer = self._transport.check_in(facts)
            if isinstance(answer, CardWanted):
                raise ProtocolError("the coordinator asks for the data card once more, though it was sent")
            return answer
        except NotEnrolledError as error:
            raise NotEnrolledError(
                f"the coordinator does not know this device any more ({error.message}); to enrol it anew, "
                f"delete {self._state / IDENTITY_FILE} and join with an enrolment token"
            ) from error

    def _load_manifest(self, digest: str) -> Manifest:
        """The run's manifest, if it is signed as it must be."""
        if self._manifest is None or self._manifest[0] != digest:
            self._verifier.check(digest, self._transport.signature)
            manifest = Manifest.from_file(self._blobs.get(digest, MAX_JSON_BYTES))
            check_manifest(manifest)
            self._manifest = (digest, manifest)
        return self._manifest[1]

    def _check_data(self, manifest: Manifest, work: Assignment) -> None:
        """Data that was not checked yet against this model, or this part of it, is checked now."""
        note = self._work / _CHECKED
        facts = json.dumps([DATA_RULES, work.manifest, self._data.fingerprint, *work.modalities]).encode()
        if not note.is_file() or note.read_bytes() != facts:
            self._data.check(manifest.plan.model, work.modalities)
            write_durably(note, facts)

    def _fetcher(self, manifest: Manifest, work: Assignment) -> Fetch:
        """Fetches the blobs of an assignment, none of them larger than it can be."""
        most: dict[str, int] = dict(manifest.blobs)
        for name, digest in (*work.weights.items(), *work.teacher_weights.items()):
            most.setdefault(digest, max_file_bytes(manifest.segment(name).tensors))
        packed = {work.weights[name]: digest for name, digest in work.compressed_weights.items()}

        def fetch(digest: str) -> Path:
            if digest not in most:
                raise HashMismatchError(f"blob {digest} is neither in the manifest nor in the assignment")
            return self._blobs.get(digest, most[digest], packed.get(digest), work.download_compression)

        return fetch

    def _device_bytes(self, train_bytes: int) -> int:
        """The peak of all processes at one time: the supervisor and the larger of the other two, or both where both stay."""
        if self._options.is_resident:
            return _supervisor_bytes() + peak_bytes() + train_bytes
        return _supervisor_bytes() + max(peak_bytes(), train_bytes)

    def _remember_bytes(self) -> None:
        """The counters outlive this process: an update reports what its download cost."""
        write_durably(self._work / _BYTES, json.dumps([self._transport.bytes_down, self._transport.bytes_up]).encode())

    def _recall_bytes(self) -> None:
        path = self._work / _BYTES
        if path.is_file():
            down, up = json.loads(path.read_bytes())
            self._transport.bytes_down += down
            self._transport.bytes_up += up
            path.unlink()


Message = TypeVar("Message", bound=Record)


def _record(kind: type[Message], **values: Any) -> Message:
    """A message of this device. Raises ConfigError for a value that no message may hold."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(f"this device cannot say so to a coordinator: {explain(error, kind)}") from error


def _key(job: Job) -> list[Any]:
    return [job.run, job.stage, job.round, job.phase]


def _supervisor_bytes() -> int:
    """What the supervisor holds at most; 0 where this process has none, because a program embeds the device."""
    return peak_bytes(Path(f"/proc/{getppid()}/status")) if PARENT in environ else 0


def _programs_of(manifest: Manifest, engine: EngineName) -> set[str]:
    return {digest for digest, program in manifest.programs.items() if program.engine == engine}


def _ask(transport: Transport, heartbeat: Heartbeat) -> dict[str, Any]:
    """Raises OSError if no answer comes: training goes on."""
    try:
        return transport.check_in(CheckIn.from_json(heartbeat.body)).model_dump()
    except LaminaError as error:
        raise OSError(error.message) from error


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = Options(**json.loads(sys.argv[1]))
    token_file = Path(options.token_file) if options.token_file else None
    try:
        with disk_errors_named(Path(options.state)), Transport(options.url) as transport:
            return _run(options, transport, token_file)
    except LaminaError as error:
        sys.stderr.write(shown(error))
        return 1


def _run(options: Options, transport: Transport, token_file: Path | None) -> int:
    device = Device(options, transport, lambda: read_enrolment_token(token_file))
    if not options.is_resident:
        return WORK_STATUS if device.next_job() else 0
    trainer = ResidentTrainer()
    while device.next_job():
        if not trainer.do_job(Path(options.state) / "work"):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
