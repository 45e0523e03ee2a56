"""The worker: nothing that became due is left undone, no deadline waits for somebody to ask, and looking changes nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from coordinator_harness import InProcess, make_bundle, problem_of
from sqlalchemy import select

from coordinator.store.tables import RoundRow
from lamina.plans.plan import Cohort

SECONDS = 10


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[InProcess]:
    """On the clock of this machine."""
    running = InProcess(tmp_path / "state", clock=time.time)
    yield running
    running.stop()


def phase(coordinator: InProcess) -> str:
    """Read from the database, so that nobody asks the coordinator."""
    with coordinator.app.state.house.database.read() as session:
        return session.scalars(select(RoundRow.phase).order_by(RoundRow.id)).first() or ""


def poll(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_becomes_due_while_the_worker_looks_is_done_without_another_request(
    coordinator: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update comes in between the worker's look, which found nothing, and the end of its turn."""
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
    device = coordinator.join("a")
    work = device.work()
    worker = coordinator.app.state.worker
    has_looked, may_go_on = threading.Event(), threading.Event()
    real = worker._aggregator.run_due

    def look() -> None:
        real()
        has_looked.set()
        assert may_go_on.wait(SECONDS)

    monkeypatch.setattr(worker._aggregator, "run_due", look)
    coordinator.start_worker()
    assert has_looked.wait(SECONDS)
    assert device.send(work).status_code == 200
    assert phase(coordinator) == "aggregating"
    may_go_on.set()
    poll(lambda: phase(coordinator) == "closed")


def test_a_stop_at_any_moment_ends_the_worker_at_once(coordinator: InProcess) -> None:
    """The moment between two turns too: what raised the flag just before it is lowered is not forgotten."""
    worker = coordinator.app.state.worker

    class Lowered(threading.Event):
        def clear(self) -> None:
            if not worker._is_stopping:
                worker._is_stopping = True
                self.set()
            super().clear()

    worker._awake = Lowered()
    coordinator.start_worker()
    worker._thread.join(SECONDS)
    assert not worker._thread.is_alive()


def test_a_deadline_passes_though_nobody_asks(coordinator: InProcess) -> None:
    coordinator.publish(
        make_bundle(rounds=[1, 0], cohort=Cohort(size=2, min_updates=1, deadline_seconds=0.5, lease_seconds=60))
    )
    one, two = coordinator.join("a"), coordinator.join("b")
    one.check_in()
    began = time.monotonic()
    two.check_in()  # the round begins
    coordinator.start_worker()
    assert one.send(one.work()).status_code == 200
    poll(lambda: phase(coordinator) == "closed")
    assert time.monotonic() - began > 0.5


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/run-1", "/v1/runs/run-1/devices", "/v1/devices", "/v1/history"])
def test_a_look_takes_no_writer_s_lock_and_moves_no_run(coordinator: InProcess, path: str) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, deadline_seconds=0.2, lease_seconds=60)))
    device = coordinator.join("a")
    device.check_in()
    coordinator.transport.has_thread = True  # but it is not started
    with coordinator.app.state.house.database.write(), ThreadPoolExecutor(1) as thread:
        answer = thread.submit(coordinator.http.get, path, headers=coordinator.admin).result(SECONDS)
    assert answer.status_code == 200


def test_looking_at_an_update_s_slot_moves_no_run(tmp_path: Path) -> None:
    """A run whose deadline is over stays where it stands until the worker moves it, whatever is refused meanwhile."""
    coordinator = InProcess(tmp_path / "state")
    coordinator.publish(make_bundle(cohort=Cohort(size=2, min_updates=1, deadline_seconds=10, lease_seconds=60)))
    one, two = coordinator.join("a"), coordinator.join("b")
    one.check_in()
    work = two.work()
    assert one.send(one.work()).status_code == 200
    coordinator.transport.has_thread = True
    coordinator.clock.jump(11)
    problem_of(two.send(work, b"no tensor file"), 422, "tensor-file")
    assert phase(coordinator) == "training"
    coordinator.app.state.worker.work()
    assert phase(coordinator) != "training"
    coordinator.stop()
