"""Fixtures for the coordinator: one in this process, and bundles; see coordinator_harness."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinator_harness import FakeClock, InProcess


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def coordinator(tmp_path: Path, clock: FakeClock) -> Iterator[InProcess]:
    """A fresh coordinator whose clock stands still."""
    running = InProcess(tmp_path / "state", clock)
    yield running
    running.stop()


@pytest.fixture
def make_coordinator(tmp_path: Path) -> Iterator[Callable[..., InProcess]]:
    """Makes coordinators on folders of their own; they are stopped at the end."""
    running: list[InProcess] = []

    def make(name: str, **settings: Any) -> InProcess:
        running.append(InProcess(tmp_path / name, **settings))
        return running[-1]

    yield make
    for one in running:
        one.stop()
