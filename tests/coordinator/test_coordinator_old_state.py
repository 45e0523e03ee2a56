"""A folder that an earlier version left in the midst of a run: today's coordinator opens it, and the run ends as it would have.

`tests/vectors/2026-11-30` was made once, by the version of that day: schema 4, a round closed, two of three updates in for the
next.
"""

import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from coordinator_harness import Device, InProcess, schema_version, work_until_finished

from coordinator.store.tables import SCHEMA_VERSION
from lamina.wire import Enrolled

VECTORS = Path(__file__).parents[1] / "vectors" / "2026-11-30"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    with tarfile.open(VECTORS / "coordinator-state.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert schema_version(tmp_path / "state") == 4
    return tmp_path / "state"


def devices_of(coordinator: InProcess, known: dict[str, Any]) -> list[Device]:
    return [Device(coordinator, name, Enrolled(**row), {"test_examples": 4}) for name, row in known.items()]


def test_a_run_that_an_old_version_began_ends_with_the_weights_that_it_would_have_had(state: Path) -> None:
    known = json.loads((VECTORS / "coordinator.json").read_text())
    coordinator = InProcess(state)
    assert schema_version(state) == SCHEMA_VERSION
    assert [(row.stage, row.round, row.state, len(row.updates)) for row in coordinator.status().rounds] == [
        (0, 0, "closed", 3),
        (0, 1, "training", 2),
    ]
    status = work_until_finished(coordinator, devices_of(coordinator, known["devices"]))
    assert [len(row.updates) for row in status.rounds] == [3, 3, 3]
    assert {name: sha256(data).hexdigest() for name, data in coordinator.weights().items()} == known["final_weights"]
    coordinator.stop()


def test_an_update_that_an_old_version_accepted_is_known_when_it_is_sent_again(state: Path) -> None:
    known = json.loads((VECTORS / "coordinator.json").read_text())
    coordinator = InProcess(state)
    _, b, _ = devices_of(coordinator, known["devices"])
    work = b.work()
    for device in devices_of(coordinator, known["devices"]):
        answer = device.send(work)
        assert answer.status_code == 200, answer.text
    assert [len(row.updates) for row in coordinator.status().rounds] == [3, 3]
    coordinator.stop()
