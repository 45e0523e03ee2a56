"""The loop of a user: check in, fetch, train or evaluate, send, again.

One process does it all; the frozen part of every example is computed at the first work of a run (`edge_client.split.prefix`).
A user that is stopped begins its turn again when it comes back.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.engines import load_engine
from edge_client.process.memory import peak_bytes
from edge_client.progress import Say, say
from edge_client.rows.local_data import LocalData
from edge_client.rows.row_files import Indices
from edge_client.split.parts import Parts, Programs
from edge_client.split.prefix import PrefixStore
from edge_client.split.steps import LocalSteps, Metrics, RemoteSteps, Steps
from edge_client.split.transport import SplitTransport
from edge_client.talk.blobs import BlobCache
from edge_client.talk.identity import exclusive, load_or_enrol
from edge_client.talk.trust import Verifier
from lamina.encoding.compression import available_compressions
from lamina.encoding.tensors import hash_bytes, max_file_bytes
from lamina.errors import HashMismatchError, ProtocolError, RoundClosedError, UnknownNameError
from lamina.files import disk_errors_named
from lamina.names import EngineName
from lamina.split.bodies import pack
from lamina.split.manifest import SplitManifest
from lamina.split.plan import SplitPlan
from lamina.split.wire import SplitCheckIn, SplitEvaluation, SplitReport, SplitWork
from lamina.wire import MAX_JSON_BYTES, Refused, Wait


@dataclass(frozen=True)
class SplitOptions:
    """What `lamina split join` was told."""

    url: str
    data: str
    name: str
    engine: EngineName
    state: str
    run: str | None = None
    until_finished: bool = False
    trust: tuple[str, ...] = ()
    allow_unsigned: bool = False


def join_split(
    options: SplitOptions,
    enrolment_token: Callable[[], str],
    connect: Callable[[str], SplitTransport] = SplitTransport,
    say: Say = say,
) -> None:
    """Takes part until stopped, or with `until_finished` until no split run is open after some work was done."""
    state = Path(options.state)
    with disk_errors_named(state), exclusive(state), connect(options.url) as transport:
        user = SplitUser(options, transport, enrolment_token, say)
        while user.work_once():
            pass


class SplitUser:
    """An enrolled user and its data."""

    def __init__(
        self, options: SplitOptions, transport: SplitTransport, enrolment_token: Callable[[], str], say: Say = say
    ) -> None:
        self._options, self._transport, self._say = options, transport, say
        self._engine = load_engine(options.engine)
        self._state = Path(options.state)
        self._state.mkdir(parents=True, exist_ok=True)
        self._verifier = Verifier(self._state, options.trust, options.allow_unsigned, transport.url, say)
        self._data = LocalData(Path(options.data), self._state / "data")
        identity = load_or_enrol(self._state, options.name, transport, enrolment_token)
        transport.token = identity.device_token
        self._blobs = BlobCache(self._state / "blobs", transport, say)
        self._opened: tuple[str, SplitManifest, Programs, PrefixStore] | None = None
        self._has_worked, self._said = False, ""
        self._failed: SplitWork | None = None  # work whose weights were not there

    def work_once(self) -> bool:
        """One check-in and what it asks for; False when there is nothing more to do. Raises ProtocolError if refused."""
        answer = self._transport.split_check_in(
            SplitCheckIn(
                engine=self._options.engine,
                modalities=self._data.modalities,
                train_examples=self._data.train_examples,
                test_examples=self._data.test_examples,
                run=self._options.run,
                compressions=available_compressions(),
            )
        )
        if isinstance(answer, Refused):
            raise ProtocolError(f"the coordinator cannot use this user: {answer.detail}")
        if isinstance(answer, Wait):
            if answer.reason == "no_run" and self._options.until_finished and self._has_worked:
                self._say(f"finished: {answer.detail}")
                return False
            if answer.reason != self._said:
                self._said = answer.reason
                self._say(f"waiting: {answer.detail}")
            self._transport.wait(answer)
            return True
        self._said = ""
        try:
            self._do(answer)
        except RoundClosedError as error:
            self._say(f"too late: {error.message}; checking in again")
        except UnknownNameError as error:
            # The weights of a round that has ended may be gone. If the same work is offered again, they are lost.
            if answer == self._failed:
                raise
            self._failed = answer
            self._say(f"{error.message}; checking in again")
        self._has_worked = True
        return True

    def _do(self, work: SplitWork) -> None:
        manifest, programs, store = self._open(work.manifest)
        if work.modalities != self._modalities(manifest.plan):
            raise ProtocolError(f"the work is for {list(work.modalities)}, and this user has {list(self._data.modalities)}")
        held = manifest.plan.held(work.modalities)
        if set(work.weights) != set(held):
            raise ProtocolError(f"the work names weights of {sorted(work.weights)}, the plan needs {held}")
        blob = self._fetcher(manifest, work)
        parts = Parts(manifest, work.weights, blob)
        steps: Steps
        if manifest.plan.party == "device":
            steps = LocalSteps(manifest.plan, work.fused, programs, parts, store)
        else:
            steps = RemoteSteps(manifest.plan, work, programs, parts, store, self._transport)
        if work.phase == "train":
            self._train(work, manifest, parts, steps)
        else:
            self._evaluate(work, manifest, steps)
        self._blobs.keep_only({work.manifest, *work.weights.values(), *self._constant(manifest)})

    def _train(self, work: SplitWork, manifest: SplitManifest, parts: Parts, steps: Steps) -> None:
        plan, started = manifest.plan, time.monotonic()
        sums, count, step = _Sums(), 0, 0
        for epoch in range(plan.training.local_epochs):
            for indices in self._batches(plan.training.batch_size, f"{plan.seed}/{work.round}/{epoch}/{self._options.name}"):
                sums.add(steps.train(step, indices), len(indices))
                count, step = count + len(indices), step + 1
        traffic = plan.traffic
        body = pack(parts.differences(plan.sent(work.fused, work.modalities)), traffic.updates, traffic.compression)
        down, up = self._transport.bytes_down, self._transport.bytes_up
        report = SplitReport(
            num_examples=self._data.train_examples,
            loss=sums.mean_loss(),
            fused_loss=None if work.modalities else sums.fused_loss / count,
            train_seconds=time.monotonic() - started,
            peak_bytes=peak_bytes(),
            bytes_down=down,
            bytes_up=up,
        )
        self._transport.put_split_update(work.run, work.round, body, report)
        self._transport.bytes_down -= down
        self._transport.bytes_up -= up
        self._say(f"{work.run}, round {work.round}: {step} steps in {report.train_seconds:.1f} s, update accepted")

    def _evaluate(self, work: SplitWork, manifest: SplitManifest, steps: Steps) -> None:
        size, sums = manifest.plan.training.batch_size, _Sums()
        for first in range(0, self._data.test_examples, size):
            indices = range(first, min(first + size, self._data.test_examples))
            sums.add(steps.evaluate(indices), len(indices))
        evaluation = SplitEvaluation(
            num_examples=sums.count,
            correct=sums.correct or dict.fromkeys(manifest.plan.modalities, 0),
            loss=sums.mean_loss(),
            fused_correct=sums.fused_correct,
            fused_loss=sums.fused_loss / sums.count if sums.count else 0.0,
        )
        self._transport.put_split_evaluation(work.run, work.round, evaluation)
        self._say(f"{work.run}, round {work.round}: evaluated on {sums.count} examples")

    def _batches(self, size: int, key: str) -> Iterator[Indices]:
        """All examples once, in an order that depends on `key` alone; the same rows for every modality."""
        random = np.random.Generator(np.random.Philox(key=int(hash_bytes(key.encode())[:32], 16)))
        order = random.permutation(self._data.train_examples)
        return (order[first : first + size] for first in range(0, len(order), size))

    def _open(self, digest: str) -> tuple[SplitManifest, Programs, PrefixStore]:
        """The run's manifest, verified; its programs; and the frozen part of the data, computed if it is not there yet."""
        if self._opened is None or self._opened[0] != digest:
            if self._opened is not None:
                self._opened[2].close_all()
            self._verifier.check(digest, self._transport.signature)
            manifest = SplitManifest.from_file(self._blobs.get(digest, MAX_JSON_BYTES))
            modalities = self._modalities(manifest.plan)
            self._data.check(manifest.plan.model, modalities)
            programs = Programs(manifest, self._engine, lambda blob: self._blobs.get(blob, manifest.blobs[blob]))
            store = PrefixStore(self._state / "prefix", digest, manifest.plan, modalities, self._data, programs, self._say)
            self._opened = (digest, manifest, programs, store)
        return self._opened[1:]

    def _modalities(self, plan: SplitPlan) -> tuple[str, ...]:
        """Those that this user takes part with; none: all. Raises ProtocolError if the plan has no work for it."""
        found = plan.some_of(self._data.modalities)
        if found is None:
            raise ProtocolError(f"plan {plan.name!r} has no work for data of {', '.join(self._data.modalities)} alone")
        return found

    def _fetcher(self, manifest: SplitManifest, work: SplitWork) -> Callable[[str], Path]:
        """Fetches the weights of a round, none of them larger than it can be."""
        most = {digest: max_file_bytes(manifest.part(name).tensors) for name, digest in work.weights.items()}

        def fetch(digest: str) -> Path:
            if digest not in most:
                raise HashMismatchError(f"blob {digest} is not among the weights of this round")
            return self._blobs.get(digest, most[digest])

        return fetch

    def _constant(self, manifest: SplitManifest) -> set[str]:
        """The blobs that every round needs: programs and frozen parts."""
        programs = manifest.programs[self._engine.name].values()
        frozen = {manifest.initial_weights[name] for name in manifest.plan.frozen}  # more than a user holds; that does no harm
        return {program.blob for program in programs} | frozen


class _Sums:
    """Metrics of batches, added up by examples."""

    def __init__(self) -> None:
        self.count, self.fused_correct, self.fused_loss = 0, 0, 0.0
        self.correct: dict[str, int] = {}
        self._loss: dict[str, float] = {}

    def add(self, metrics: Metrics, examples: int) -> None:
        self.count += examples
        self.fused_correct += metrics.fused_correct
        self.fused_loss += metrics.fused_loss * examples
        for m, loss in metrics.loss.items():
            self._loss[m] = self._loss.get(m, 0.0) + loss * examples
            self.correct[m] = self.correct.get(m, 0) + metrics.correct[m]

    def mean_loss(self) -> dict[str, float]:
        return {m: loss / self.count for m, loss in self._loss.items()}
