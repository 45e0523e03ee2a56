"""A device's life: enrol once, then check in, do what is assigned, send the result, and ask again.

Everything that takes long leaves its result on disk under its final name, so the process may be killed at any moment and
started again with the same command: it downloads and computes only what was not finished.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from edge_client.blobs import BlobCache
from edge_client.data import LocalData
from edge_client.engines import load_engine
from edge_client.engines.base import Engine
from edge_client.identity import IDENTITY_FILE, exclusive, load_or_enrol
from edge_client.lease import Lease
from edge_client.memory import peak_bytes
from edge_client.progress import Say, say
from edge_client.stage_session import StageSession
from edge_client.train import evaluate, train_round
from edge_client.transport import Transport
from lamina.errors import HashMismatchError, NotEnrolledError, ProtocolError, RoundClosedError, UnknownNameError
from lamina.manifest import EngineName, Manifest
from lamina.tensors import encode, max_file_bytes
from lamina.wire import MAX_JSON_BYTES, Assignment, CheckIn, Refused, TrainReport, Wait


def join(
    url: str,
    data: Path,
    name: str,
    engine: EngineName,
    state: Path,
    enrolment_token: Callable[[], str],
    *,
    run: str | None = None,
    until_finished: bool = False,
    connect: Callable[[str], Transport] = Transport,
    say: Say = say,
) -> None:
    """Takes part in the coordinator's runs until it is stopped, or until there is nothing left to do.

    `enrolment_token` is asked for only if the state folder holds no identity. What can be wrong on this machine is found
    before the coordinator is bothered.
    """
    with exclusive(state), connect(url) as transport:
        local = LocalData(data, state / "data")
        chosen = load_engine(engine)
        identity = load_or_enrol(state, name, transport, enrolment_token)
        transport.token = identity.device_token
        say(f"device {name}: {local.train_examples} training and {local.test_examples} test examples, engine {engine}")
        Device(name, state, local, chosen, transport, run=run, say=say).run(until_finished)


class Device:
    """An enrolled device with its data and its engine."""

    def __init__(
        self,
        name: str,
        state: Path,
        data: LocalData,
        engine: Engine,
        transport: Transport,
        *,
        run: str | None = None,
        say: Say = say,
    ) -> None:
        self._name, self._state, self._data, self._engine, self._transport = name, state, data, engine, transport
        self._run, self._say = run, say
        self._blobs = BlobCache(state / "blobs", transport, say)
        self._manifest: tuple[str, Manifest] | None = None
        self._session: tuple[object, StageSession] | None = None

    def run(self, until_finished: bool = False) -> None:
        """The loop. Returns only with `until_finished`: when no run is open, after at least one assignment was done."""
        is_any_done = False
        failed: Assignment | None = None
        said = ""
        while True:
            answer = self._check_in()
            if isinstance(answer, Refused):
                raise ProtocolError(f"the coordinator cannot use this device: {answer.detail}")
            if isinstance(answer, Wait):
                if answer.reason == "no_run":
                    self._close_session()
                    if until_finished and is_any_done:
                        self._say(f"finished: {answer.detail}")
                        return
                if answer.detail != said:
                    said = answer.detail
                    self._say(f"waiting: {said}")
                self._transport.sleep(self._transport.uniform(answer.wait_seconds_min, answer.wait_seconds_max))
                continue
            said = ""
            try:
                self._work(answer)
                is_any_done = True
            except RoundClosedError as error:
                self._say(f"too late: {error.message}; checking in again")
            except UnknownNameError as error:
                # The weights of a round that has closed may be gone. If the same work is offered again, they are lost.
                if answer == failed:
                    raise
                failed = answer
                self._say(f"{error.message}; checking in again")

    def _work(self, work: Assignment) -> None:
        """One assignment, from its weights to the accepted result."""
        lease = Lease(work, self._check_in, self._transport.clock)
        manifest = self._load_manifest(work.manifest)
        plan = manifest.plan
        fetch = self._fetcher(manifest, work)
        session = self._stage_session(manifest, work, fetch, lease.keep)
        model = session.model
        model.load_weights(fetch, work.weights)
        where = f"stage {work.stage}, round {work.round}"

        if work.phase == "evaluate":
            evaluation = evaluate(model, session.inputs("test"), plan, self._say, lease.keep)
            self._transport.put_evaluation(work.run, work.stage, work.round, evaluation)
            self._say(f"{where}: evaluated, {evaluation.correct} of {evaluation.num_examples} correct")
        else:
            inputs = session.inputs("train")
            trained = train_round(model, inputs, plan, work.stage, work.round, self._name, self._say, lease.keep)
            model.subtract_weights(fetch, work.weights)
            body = encode(model.tensors(), work.upload_encoding)
            down, up = self._transport.bytes_down, self._transport.bytes_up + len(body)
            report = TrainReport(
                num_examples=trained.num_examples,
                loss=trained.loss,
                train_seconds=trained.train_seconds,
                peak_bytes=peak_bytes(),
                bytes_down=down,
                bytes_up=up,
            )
            self._transport.put_update(work.run, work.stage, work.round, body, report)
            # What was reported is reported; repeated attempts and later messages go into the next report.
            self._transport.bytes_down -= down
            self._transport.bytes_up -= up
            self._say(f"{where}: trained in {trained.train_seconds:.1f} s, mean loss {trained.loss:.4f}, update accepted")
        self._blobs.keep_only({work.manifest, *work.weights.values(), *_programs_of(manifest, self._engine.name)})

    def _check_in(self) -> Assignment | Wait | Refused:
        message = CheckIn(
            engine=self._engine.name,
            modalities=self._data.modalities,
            train_examples=self._data.train_examples,
            test_examples=self._data.test_examples,
            run=self._run,
        )
        try:
            return self._transport.check_in(message)
        except NotEnrolledError as error:
            raise NotEnrolledError(
                f"the coordinator does not know this device any more ({error.message}); to enrol it anew, "
                f"delete {self._state / IDENTITY_FILE} and join with an enrolment token"
            ) from error

    def _load_manifest(self, digest: str) -> Manifest:
        """The run's manifest; with a new one, the data is checked against its model."""
        if self._manifest is None or self._manifest[0] != digest:
            manifest = Manifest.from_file(self._blobs.get(digest, MAX_JSON_BYTES))
            self._data.check(manifest.plan.model)
            self._manifest = (digest, manifest)
        return self._manifest[1]

    def _fetcher(self, manifest: Manifest, work: Assignment) -> Callable[[str], Path]:
        """Fetches the blobs of an assignment, none of them larger than it can be."""
        most: dict[str, int] = dict(manifest.blobs)
        for name, digest in work.weights.items():
            most.setdefault(digest, max_file_bytes(manifest.segment(name).tensors))

        def fetch(digest: str) -> Path:
            if digest not in most:
                raise HashMismatchError(f"blob {digest} is neither in the manifest nor in the assignment")
            return self._blobs.get(digest, most[digest])

        return fetch

    def _stage_session(
        self, manifest: Manifest, work: Assignment, fetch: Callable[[str], Path], on_chunk: Callable[[], None]
    ) -> StageSession:
        frozen = {name: work.weights[name] for name in manifest.plan.stages[work.stage].frozen}
        key = (work.manifest, work.stage, frozen)
        if self._session is None or self._session[0] != key:
            self._close_session()
            folder = self._state / "features"
            session = StageSession(
                manifest, work.stage, work.weights, self._data, self._engine, folder, fetch, self._say, on_chunk
            )
            self._session = (key, session)
        return self._session[1]

    def _close_session(self) -> None:
        if self._session is not None:
            self._session[1].close()
            self._session = None


def _programs_of(manifest: Manifest, engine: EngineName) -> set[str]:
    return {digest for digest, program in manifest.programs.items() if program.engine == engine}


@contextmanager
def stopped_by_signals(say: Say = say) -> Iterator[None]:
    """SIGTERM and SIGINT end the block quietly, wherever it is: nothing on disk is ever half written."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; run the same command to go on where this device was")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
