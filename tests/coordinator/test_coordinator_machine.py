"""Any sequence of check-ins, uploads, repeats, clock jumps and restarts: no update counts twice, no accepted one is lost.

The machine keeps its own book of what was answered with success and compares it with what the coordinator tells, and with
the weights it makes.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from coordinator_harness import Device, InProcess, difference_of, make_bundle, tensors_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.plans.plan import Cohort
from lamina.wire import Accepted, Assignment, RunStatus, TrainReport

COHORT = Cohort(size=2, min_updates=1, deadline_seconds=300, lease_seconds=50)
NAMES = ("a", "b", "c")
device_names = st.sampled_from(NAMES)


class Run(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lamina-machine-"))
        self.coordinator = InProcess(self.folder / "state")
        self.bundle = make_bundle(rounds=[2, 1], cohort=COHORT)
        self.devices: dict[str, Device] = {}
        self.work: dict[str, Assignment] = {}
        self.accepted: dict[tuple[int, int, str], tuple[Assignment, bytes]] = {}
        self.evaluated: dict[tuple[int, int, str], Assignment] = {}
        self.checked_rounds: set[tuple[int, int]] = set()
        self.weights: dict[str, bytes] = {}

    @initialize()
    def publish(self) -> None:
        self.coordinator.publish(self.bundle)
        self.devices = {name: self.coordinator.join(name, test_examples=index) for index, name in enumerate(NAMES)}
        self._remember(self.coordinator.status())

    @rule(name=device_names)
    def check_in(self, name: str) -> None:
        answer = self.devices[name].check_in()
        if isinstance(answer, Assignment):
            assert self.devices[name].check_in() == answer
            self.work[name] = answer
            sent = (answer.stage, answer.round, name)
            assert sent not in (self.accepted if answer.phase == "train" else self.evaluated), "work that was done already"

    @rule(name=device_names)
    def send(self, name: str) -> None:
        """Sends what the device last worked on, however old that is."""
        work = self.work.get(name)
        if work is None or work.phase != "train":
            return
        answer = self.devices[name].send(work, report=_report(name))
        key = (work.stage, work.round, name)
        if answer.status_code == 200:
            self.accepted.setdefault(key, (work, answer.content))
            assert answer.content == self.accepted[key][1]
        else:
            assert answer.status_code == 409, answer.text
            assert key not in self.accepted

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Sends any update again that was ever accepted."""
        if self.accepted:
            key = data.draw(st.sampled_from(sorted(self.accepted)))
            work, first = self.accepted[key]
            answer = self.devices[key[2]].send(work, report=_report(key[2]))
            assert (answer.status_code, answer.content) == (200, first)
            Accepted.model_validate_json(answer.content)

    @rule(name=device_names)
    def evaluate(self, name: str) -> None:
        work = self.work.get(name)
        if work is not None and work.phase == "evaluate":
            answer = self.devices[name].evaluate(work)
            key = (work.stage, work.round, name)
            assert answer.status_code == 200 or (answer.status_code == 409 and key not in self.evaluated)
            if answer.status_code == 200:
                self.evaluated[key] = work

    @rule(seconds=st.sampled_from([-400, -60, 1, 20, 51, 61, 301]))
    def jump(self, seconds: int) -> None:
        self.coordinator.clock.jump(seconds)

    @rule()
    def restart(self) -> None:
        self.coordinator.restart()

    @rule()
    def all_work(self) -> None:
        """A turn of everybody, so that runs get far."""
        for name in NAMES:
            self.check_in(name)
        for name in NAMES:
            self.send(name)
            self.evaluate(name)

    @invariant()
    def every_accepted_message_counts_exactly_once(self) -> None:
        if not self.devices:
            return
        status = self.coordinator.status()
        told = [(row.stage, row.round, update.device) for row in status.rounds for update in row.updates]
        assert sorted(told) == sorted(self.accepted)
        assert sum(row.test_examples for row in status.rounds) == 4 * len(self.evaluated)
        assert all(len(row.updates) <= COHORT.size for row in status.rounds)
        self._compare_weights(status)

    def _compare_weights(self, status: RunStatus) -> None:
        """The newest aggregated round has the mean of exactly what was accepted in it."""
        done = [row for row in status.rounds if row.state != "training"]
        if not done or (done[-1].stage, done[-1].round) in self.checked_rounds:
            return
        row = done[-1]
        self.checked_rounds.add((row.stage, row.round))
        assert len(self.checked_rounds) == len(done), "a round was passed unseen"
        manifest = self.bundle.manifest
        specs = manifest.exchange_specs(row.stage)
        senders = [name for stage, number, name in self.accepted if (stage, number) == (row.stage, row.round)]
        total = sum(_report(name).num_examples for name in senders)
        for segment_name in manifest.plan.stages[row.stage].active:
            segment = manifest.segment(segment_name)
            old = tensors_of(self.weights[segment_name], segment.tensors, self.folder)
            new = tensors_of(self.coordinator.blob(status.weights[segment_name]), segment.tensors, self.folder)
            for tensor, value in new.items():
                expected = old[tensor].astype(np.float64)
                for name in senders:
                    learned = difference_of(name, specs, row.stage, row.round)[f"{segment_name}/{tensor}"]
                    expected = expected + learned * (_report(name).num_examples / total)
                np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
        self._remember(status)

    def _remember(self, status: RunStatus) -> None:
        """The bytes of the newest weights: the coordinator deletes them when newer ones come."""
        self.weights = {name: self.coordinator.blob(digest) for name, digest in status.weights.items()}

    def teardown(self) -> None:
        self.coordinator.stop()
        shutil.rmtree(self.folder)


def _report(name: str) -> TrainReport:
    """Devices have different numbers of examples."""
    return TrainReport(num_examples=1 + NAMES.index(name), loss=1.0, train_seconds=0, peak_bytes=0, bytes_down=0, bytes_up=0)


TestRun = Run.TestCase
# Long runs find more than many: a run has to get through rounds and stages before most rules mean anything.
TestRun.settings = settings(max_examples=12, stateful_step_count=30)
