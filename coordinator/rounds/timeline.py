"""What a lease or a deadline is worth now: the one place that knows, and the only clock that decides anything.

Times in the database lie on the coordinator's own time line. It starts with the wall clock, and then moves by what has passed,
as a steady clock counts it, whatever becomes of the wall clock: setting that by an hour or by ten years ends no lease early
and none late. A restart goes on where the last process was, plus what has passed since, which the steady clock of the same
boot knows exactly. After a reboot, and where there is no steady clock, the wall clock has to do, as far as it can be believed:
back is a step, and so is more than twice of what any open round could have waited. How much time passed with a step nobody
knows, so it counts as none, and devices count as here again once they have asked.

    lease      a device keeps its place for `lease_seconds` after it asked last, and without an update for at most
               `deadline_seconds` in all: then another device that asks gets it
    deadline   of a phase of a round, from its beginning; a paused run has no time
"""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from coordinator.store.tables import CalibrationRow, ClockRow, DeviceRow, EvaluationRow, PlaceRow, RoundRow, RunRow
from lamina.plans.plan import Cohort

log = logging.getLogger("lamina.coordinator")

Clock = Callable[[], float]
"""Seconds since 1970, as the machine believes, or seconds of a clock that nobody can set."""

DEADLINES_UNTIL_FAILURE = 3
"""So many deadlines long may devices that are here leave a round without the updates that it needs; then its run fails."""
_STORE_EVERY_SECONDS = 5.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Timeline:
    """`Timeline()` is now. `steady` is None where the wall clock is all there is. Safe to use from many threads.

    `longest_wait` says how many seconds a device could have been silent for; it is asked only if the wall clock says that
    so much has passed.
    """

    def __init__(self, wall: Clock, steady: Clock | None, longest_wait: Callable[[], float], last: ClockRow | None) -> None:
        self.wall = wall
        self._steady, self._longest_wait = steady, longest_wait
        self._lock = threading.Lock()
        self._boot = boot_id() if steady else ""
        self.had_step = False
        """A step was seen whose length is not known, since `forget_presence` last looked."""
        self._wall_seconds, self._steady_seconds = wall(), steady() if steady else 0.0
        self._now = self._wall_seconds if last is None else last.now_unix_seconds + self._since(last)
        self._stored = float("-inf")

    def __call__(self) -> float:
        """Seconds on the coordinator's time line; never less than before."""
        with self._lock:
            wall, steady = self.wall(), self._steady() if self._steady else 0.0
            self._now += max(steady - self._steady_seconds, 0.0) if self._steady else self._passed(wall - self._wall_seconds)
            self._wall_seconds, self._steady_seconds = wall, steady
            return self._now

    def store(self, session: Session, now: float, is_urgent: bool = False) -> None:
        """Notes where the time line is, for the next process; without urgency only now and then, to spare the disk."""
        if is_urgent or now - self._stored >= _STORE_EVERY_SECONDS:
            session.merge(
                ClockRow(
                    id=1,
                    now_unix_seconds=now,
                    wall_unix_seconds=self._wall_seconds,
                    steady_seconds=self._steady_seconds,
                    boot=self._boot,
                )
            )
            self._stored = now

    def forget_presence(self, session: Session) -> None:
        """After a step of unknown length nobody counts as here until he has asked, which takes seconds."""
        with self._lock:
            had_step, self.had_step = self.had_step, False
        if had_step:
            session.execute(update(DeviceRow).values(seen_unix_seconds=None))

    def _since(self, last: ClockRow) -> float:
        is_same_boot = self._boot != "" and last.boot == self._boot
        if is_same_boot and self._steady_seconds >= last.steady_seconds:
            return self._steady_seconds - last.steady_seconds
        return self._passed(self._wall_seconds - last.wall_unix_seconds)

    def _passed(self, seconds: float) -> float:
        """How much of a difference of the wall clock is time that has passed; 0 if it was set."""
        if seconds >= 0 and (seconds <= 60 or seconds <= 2 * self._longest_wait()):
            return seconds
        log.warning("the clock was set by %+.0f s; leases and deadlines go on as if no time had passed", seconds)
        self.had_step = True
        return 0.0


def boot_id() -> str:
    """What tells one start of this machine from another; empty where the system has no such thing."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def deadline_of(row: RoundRow, cohort: Cohort) -> float:
    """When the present phase of a round ends, whoever is still missing."""
    return row.since_unix_seconds + cohort.deadline_seconds


def lease_of(place: PlaceRow, cohort: Cohort, now: float) -> float:
    """When the lease of a device ends that has just asked for its work."""
    return min(now + cohort.lease_seconds, tenure_of(place, cohort))


def tenure_of(place: PlaceRow, cohort: Cohort) -> float:
    """Until when a device may keep a place without an update, however often it asks."""
    return place.taken_unix_seconds + cohort.deadline_seconds


def mend(session: Session, run: RunRow, cohort: Cohort, now: float) -> None:
    """What ends later than now + lease, or began later than now, was granted by a wrong clock: it ends, or began, then.

    For rows of a coordinator that had no time line yet, or of a state folder that was put back from a copy.
    """
    run.since_unix_seconds = min(run.since_unix_seconds, now)
    if run.halted_unix_seconds is not None:
        run.halted_unix_seconds = min(run.halted_unix_seconds, now)
    for row in session.scalars(select(RoundRow).where(RoundRow.run_number == run.number, RoundRow.phase != "closed")):
        row.since_unix_seconds = min(row.since_unix_seconds, now)
        for place in session.scalars(select(PlaceRow).where(PlaceRow.round_id == row.id)):
            # 0 in rows of a schema that had no such column
            place.taken_unix_seconds = min(place.taken_unix_seconds or row.since_unix_seconds, now)
        for leased in _leased(session, row):
            leased.lease_ends_unix_seconds = min(leased.lease_ends_unix_seconds, now + cohort.lease_seconds)
    session.execute(update(DeviceRow).where(DeviceRow.seen_unix_seconds > now).values(seen_unix_seconds=None))


def make_up_for(session: Session, run: RunRow, cohort: Cohort, pause_seconds: float, now: float) -> None:
    """After a pause that ends now: whatever a run had of leases and deadlines before it, it has again."""
    run.since_unix_seconds += pause_seconds
    for row in session.scalars(select(RoundRow).where(RoundRow.run_number == run.number, RoundRow.phase != "closed")):
        row.since_unix_seconds += pause_seconds
        for place in session.scalars(select(PlaceRow).where(PlaceRow.round_id == row.id)):
            place.taken_unix_seconds += pause_seconds
        for leased in _leased(session, row):
            leased.lease_ends_unix_seconds += pause_seconds
    session.flush()
    mend(session, run, cohort, now)  # what began within the pause


def _leased(session: Session, row: RoundRow) -> Iterator[PlaceRow | EvaluationRow | CalibrationRow]:
    yield from session.scalars(select(PlaceRow).where(PlaceRow.round_id == row.id))
    yield from session.scalars(select(EvaluationRow).where(EvaluationRow.round_id == row.id))
    yield from session.scalars(select(CalibrationRow).where(CalibrationRow.round_id == row.id))
