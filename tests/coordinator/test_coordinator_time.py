"""Clocks that are set, at any moment and by any amount, with restarts: no lease and no deadline is worth more or less for it.

`clock` is the wall clock, which everybody may set; `steady` is one that nobody can. Where there is none, steps are told from
time that passed by what is possible.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from coordinator_harness import Device, FakeClock, InProcess, Process, downgrade, make_bundle, poll, problem_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.plans.plan import Cohort
from lamina.wire import Assignment, Wait

YEARS = 365 * 86400
STEPS = [sign * seconds for seconds in (1, 3600, 2 * 86400, 10 * YEARS) for sign in (1, -1)]
LARGE = [seconds for seconds in STEPS if abs(seconds) >= 3600]
ONE = Cohort(size=1, min_updates=1, deadline_seconds=20, lease_seconds=5)
TWO = Cohort(size=2, min_updates=2, deadline_seconds=20, lease_seconds=5)


@pytest.fixture
def steady() -> FakeClock:
    return FakeClock()


@pytest.fixture
def timed(tmp_path: Path, clock: FakeClock, steady: FakeClock) -> Iterator[InProcess]:
    running = InProcess(tmp_path / "timed", clock, steady)
    yield running
    running.stop()


@pytest.mark.parametrize("with_restart", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_clock_ends_no_lease_early_and_none_late(timed: InProcess, step: int, with_restart: bool) -> None:
    timed.publish(make_bundle(cohort=ONE))
    away, other = timed.join("away"), timed.join("other")
    work = away.work()
    timed.clock.jump(step)
    if with_restart:
        timed.restart()
    assert "the next lease ends in 5 s, it closes in 20 s" in other.wait().detail
    timed.steady.jump(4)
    assert "the next lease ends in 1 s" in other.wait().detail
    timed.steady.jump(2)
    assert other.send(other.work()).status_code == 200
    problem_of(away.send(work), 409, "round-closed")


@pytest.mark.parametrize("with_restart", [False, True])
@pytest.mark.parametrize("step", LARGE)
def test_without_a_steady_clock_a_step_is_told_from_time_that_passed(make_coordinator, step: int, with_restart: bool) -> None:
    coordinator: InProcess = make_coordinator("wall")
    coordinator.publish(make_bundle(cohort=ONE))
    away, other = coordinator.join("away"), coordinator.join("other")
    away.work()
    coordinator.clock.jump(step)
    if with_restart:
        coordinator.restart()
    assert "the next lease ends in 5 s, it closes in 20 s" in other.wait().detail
    coordinator.clock.jump(6)
    assert other.send(other.work()).status_code == 200


@pytest.mark.parametrize("step", STEPS)
def test_a_step_forward_does_not_close_a_round_under_devices_that_work(timed: InProcess, step: int) -> None:
    timed.publish(make_bundle(cohort=Cohort(size=2, min_updates=1, deadline_seconds=20, lease_seconds=5)))
    a, b = timed.join("a"), timed.join("b")
    a.check_in()
    first, second = b.work(), a.work()
    assert a.send(second).status_code == 200
    timed.clock.jump(step)
    timed.restart()
    assert timed.status().rounds[0].state == "training"
    assert b.work() == first
    assert b.send(first).status_code == 200
    assert len(timed.status().rounds[0].updates) == 2


@pytest.mark.parametrize("step", LARGE)
def test_who_was_seen_in_a_future_that_never_came_is_not_here(make_coordinator, step: int) -> None:
    coordinator: InProcess = make_coordinator("wall")
    coordinator.clock.jump(step)
    coordinator.publish(make_bundle(cohort=TWO))
    gone, here = coordinator.join("gone"), coordinator.join("here")
    gone.wait()
    coordinator.clock.jump(-step)
    assert "1 of 2 devices are here" in here.wait().detail
    gone.check_in()
    assert isinstance(here.check_in(), Assignment)


def test_presence_ends_by_time_that_passed(timed: InProcess) -> None:
    timed.publish(make_bundle(cohort=TWO))
    gone, here = timed.join("gone"), timed.join("here")
    gone.wait()
    timed.clock.jump(10 * YEARS)
    timed.steady.jump(59)
    assert isinstance(here.check_in(), Assignment)
    timed.publish(make_bundle(cohort=TWO))
    gone.wait(run="run-2")
    timed.steady.jump(61)
    assert "1 of 2 devices are here" in here.wait(run="run-2").detail


def test_rows_that_a_wrong_clock_wrote_before_there_was_a_time_line_are_mended(make_coordinator) -> None:
    coordinator: InProcess = make_coordinator("old")
    coordinator.clock.jump(2 * 86400)
    coordinator.publish(make_bundle(cohort=ONE))
    away, other = coordinator.join("away"), coordinator.join("other")
    away.work()
    coordinator.stop()
    downgrade(coordinator.state, 4)
    coordinator.clock.jump(-2 * 86400)
    coordinator.start()
    assert "the next lease ends in 5 s, it closes in 20 s" in other.wait().detail
    coordinator.clock.jump(6)
    assert other.send(other.work()).status_code == 200


SET_CLOCK = """
import os, time
_real, _file = time.time, {file!r}
time.time = lambda: _real() + float(open(_file).read())
"""


def test_a_real_coordinator_whose_clock_is_set(tmp_path: Path) -> None:
    """Its own clocks, and kill -9 in between."""
    offset = tmp_path / "offset"
    offset.write_text("172800")
    before = SET_CLOCK.format(file=str(offset))
    coordinator = Process(tmp_path / "state", before)
    cohort = Cohort(size=1, min_updates=1, deadline_seconds=20, lease_seconds=3)
    coordinator.publish(make_bundle(cohort=cohort))
    away, other = coordinator.join("away"), coordinator.join("other")
    away.work()
    offset.write_text("0")
    assert " closes in 20 s" in other.wait().detail or " closes in 19 s" in other.wait().detail
    coordinator.kill()
    offset.write_text(str(10 * YEARS))
    coordinator = Process(tmp_path / "state", before)
    other = Device(coordinator, other.name, other.enrolled)
    try:
        poll(lambda: isinstance(other.check_in(), Assignment), seconds=10)
    finally:
        coordinator.kill()


def test_a_device_that_never_sends_gives_its_place_up_at_the_deadline(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=ONE))
    mute, other = coordinator.join("mute"), coordinator.join("other")
    for _ in range(9):
        mute.work()
        other.wait()
        clock.jump(2)
    clock.jump(2)
    mute.check_in()
    taken = other.work()
    assert mute.wait().reason == "round"
    clock.jump(6)  # other's lease is over, but mute has had its time
    assert mute.wait().reason == "round"
    assert other.send(taken).status_code == 200


def test_a_round_that_only_mute_devices_have_fails_with_the_reason_and_frees_them(
    coordinator: InProcess, clock: FakeClock
) -> None:
    coordinator.publish(make_bundle(cohort=TWO))
    mute, good = coordinator.join("mute"), coordinator.join("good")
    mute.check_in()
    good.send(good.work())
    for _ in range(29):
        mute.work()
        assert good.wait().reason == "round"
        clock.jump(2)
    clock.jump(3)
    coordinator.publish(make_bundle(cohort=ONE))
    assert mute.work().run == "run-2"
    status = coordinator.status("run-1")
    assert status.state == "failed"
    assert "has 1 of the 2 updates that it needs after 3 times its deadline of 20 s: mute asked for work" in status.detail
    assert "run-1 has failed" in mute.wait(run="run-1").detail and mute.wait(run="run-1").reason == "no_run"


def test_a_round_whose_devices_went_away_waits_for_others(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=ONE))
    coordinator.join("away").work()
    for _ in range(10):
        clock.jump(20)
        assert coordinator.status().state == "running"
    other = coordinator.join("other")
    assert other.send(other.work()).status_code == 200


def test_a_device_that_works_is_not_failed_by_the_time_that_others_wasted(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=ONE))
    mute, late = coordinator.join("mute"), coordinator.join("late")
    for _ in range(29):
        mute.work()
        clock.jump(2)
    work = late.work()
    clock.jump(4)
    assert late.work() == work
    assert coordinator.status().state == "running"
    assert late.send(work).status_code == 200


class Clocks(RuleBasedStateMachine):
    """Devices ask, work, send or fall silent; clocks are set and coordinators restarted at any moment in between."""

    cohort = Cohort(size=2, min_updates=2, deadline_seconds=40, lease_seconds=10)
    names = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lamina-clocks-"))
        self.coordinator = InProcess(self.folder / "state", FakeClock(), FakeClock())
        self.work: dict[str, tuple[Assignment, float, float]] = {}
        """What a device was given, when it asked last, and when it asked first for this round."""
        self.opened: dict[tuple[int, int], float] = {}

    @property
    def now(self) -> float:
        return self.coordinator.steady.now

    @initialize()
    def publish(self) -> None:
        self.coordinator.publish(make_bundle(rounds=[2, 1], cohort=self.cohort))
        self.devices = {name: self.coordinator.join(name) for name in self.names}

    @rule(name=st.sampled_from(names))
    def check_in(self, name: str) -> None:
        answer = self.devices[name].check_in()
        if isinstance(answer, Assignment):
            key = (answer.stage, answer.round)
            before = self.work.get(name)
            is_same = before is not None and (before[0].stage, before[0].round) == key
            self.work[name] = (answer, self.now, before[2] if before is not None and is_same else self.now)
        else:
            assert isinstance(answer, Wait)

    @rule(name=st.sampled_from(names))
    def send(self, name: str) -> None:
        """Whoever asked within its lease, and has had its place no longer than a deadline, can send what it made."""
        if name not in self.work:
            return
        work, asked, first = self.work.pop(name)
        answer: httpx.Response = self.devices[name].send(work)
        within = self.now < asked + self.cohort.lease_seconds and self.now < first + self.cohort.deadline_seconds
        assert answer.status_code == 200 or (answer.status_code == 409 and not within), answer.text

    @rule(seconds=st.sampled_from([1, 3, 9, 11, 25, 41]))
    def pass_time(self, seconds: int) -> None:
        self.coordinator.clock.jump(seconds)
        self.coordinator.steady.jump(seconds)

    @rule(seconds=st.sampled_from(STEPS))
    def set_clock(self, seconds: int) -> None:
        self.coordinator.clock.jump(seconds)

    @rule()
    def restart(self) -> None:
        self.coordinator.restart()

    @rule()
    def all_work(self) -> None:
        for act in (self.check_in, self.check_in, self.send):
            for name in self.names:
                act(name)

    @rule()
    def all_are_mute(self) -> None:
        """For longer than any plan allows: the run does not go on for ever."""
        status = self.coordinator.status()
        held = [name for name in self.names if isinstance(self.devices[name].check_in(), Assignment)]
        if not held or status.state != "running":
            return
        for _ in range(40):
            self.pass_time(9)
            self.set_clock(-3600)
            answers = [self.devices[name].check_in() for name in self.names]
            if self.coordinator.status().state == "failed":
                assert all(isinstance(answer, Wait) for answer in answers[-1:])
                self.work.clear()
                return
        raise AssertionError(self.coordinator.status().detail)

    @invariant()
    def the_status_can_be_told(self) -> None:
        for row in self.coordinator.status().rounds if hasattr(self, "devices") else ():
            assert len(row.updates) <= self.cohort.size

    def teardown(self) -> None:
        self.coordinator.stop()
        shutil.rmtree(self.folder)


TestClocks = Clocks.TestCase
TestClocks.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
