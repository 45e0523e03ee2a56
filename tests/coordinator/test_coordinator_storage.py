"""A disk that fills up: every refusal is honest, nothing that was accepted is lost, and the same message works later.

The first tests fill a real file system (a tmpfs of a few hundred KiB, where this process may mount one); the others make
the operating system's own calls say ENOSPC, so that each place is hit exactly.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_harness import Device, InProcess, make_bundle, problem_of, work_until_finished

from coordinator.store.incoming import Incoming
from lamina.errors import StoreError
from lamina.plans.plan import Cohort
from lamina.wire import Assignment

SERVE_COMMAND = "from lamina.cli.main import main; main()"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Takes all space but about `leave_bytes`."""
    disk = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * max(disk.f_bavail * disk.f_frsize - leave_bytes, 0))
    return filler


@pytest.mark.parametrize("leave_bytes", [0, 4096, 8192, 16384, 32768])
def test_on_a_full_disk_updates_are_refused_and_can_be_sent_again(small_disk: Path, leave_bytes: int) -> None:
    coordinator = InProcess(small_disk / "state")
    try:
        coordinator.publish(make_bundle(rounds=[1, 0]))
        a, b = coordinator.join("a"), coordinator.join("b")
        a.check_in()
        to_b = b.work()
        to_a = a.work()
        filler = fill(small_disk, leave_bytes)
        answers = [a.send(to_a), b.send(to_b)]
        assert [answer.status_code for answer in answers] != [200, 200] or leave_bytes >= 16384
        for answer in answers:
            if answer.status_code != 200:
                assert "nothing was lost" in problem_of(answer, 507, "disk-full")
        filler.unlink()
        assert {a.send(to_a).status_code, b.send(to_b).status_code} == {200}
        status = work_until_finished(coordinator, [a, b])
        assert [update.device for update in status.rounds[0].updates] == ["a", "b"]
    finally:
        coordinator.stop()


def test_a_start_on_a_full_disk_says_so_in_one_line_and_works_when_there_is_room(small_disk: Path) -> None:
    coordinator = InProcess(small_disk / "state")
    coordinator.publish(make_bundle(rounds=[1, 0]))
    coordinator.join("a").check_in()
    coordinator.stop()
    filler = fill(small_disk, 0)
    command = [sys.executable, "-c", SERVE_COMMAND, "serve", "--state", str(small_disk / "state"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "error [disk-full]: no space left" in done.stderr and "Traceback" not in done.stderr
    filler.unlink()
    coordinator.start()
    assert coordinator.status().state == "running"
    coordinator.stop()


def test_a_blob_that_does_not_fit_is_refused(small_disk: Path) -> None:
    coordinator = InProcess(small_disk / "state")
    try:
        answer = coordinator.http.put(f"/v1/blobs/{'0' * 64}", content=b"x" * (2 << 20), headers=coordinator.admin)
        problem_of(answer, 507, "disk-full")
        assert list((small_disk / "state" / "blobs").iterdir()) == []
    finally:
        coordinator.stop()


@pytest.fixture
def working(coordinator: InProcess) -> tuple[Device, Assignment]:
    """A device with the only place of the round."""
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
    device = coordinator.join("a")
    return device, device.work()


def no_space(*_args: object, **_kwargs: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fills_within_an_update(working, monkeypatch, call: str) -> None:
    device, assignment = working
    with monkeypatch.context() as patch:
        patch.setattr(f"coordinator.store.incoming.os.{call}", no_space)
        problem_of(device.send(assignment), 507, "disk-full")
    assert list((device.coordinator.state / "updates").iterdir()) == []
    assert device.send(assignment).status_code == 200
    assert device.coordinator.status().state == "finished"


def test_a_disk_that_has_no_room_for_the_file_itself(working, monkeypatch) -> None:
    device, assignment = working
    body = device.body(assignment)
    with monkeypatch.context() as patch:
        patch.setattr("coordinator.store.incoming.Path.open", no_space)
        problem_of(device.send(assignment, body), 507, "disk-full")
    assert device.send(assignment).status_code == 200


def test_a_disk_that_fills_within_the_aggregation(working, monkeypatch) -> None:
    """The update stays accepted, the status says what is wrong, and the next to ask makes it go on."""
    device, assignment = working
    with monkeypatch.context() as patch:
        patch.setattr("lamina.files.os.fsync", _only_blobs_fail())
        assert device.send(assignment).status_code == 200
        status = device.coordinator.status()
        assert status.rounds[0].state == "training"
        assert "the last attempt failed and is repeated: no space left" in status.detail
        assert "no space left" in device.wait().detail
    device.coordinator.restart()
    status = device.coordinator.status()
    assert (status.state, len(status.rounds[0].updates)) == ("finished", 1)


def _only_blobs_fail():
    """An fsync that fails for the blobs of the aggregation and works for the folder of updates."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if "/blobs/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            no_space()
        real(descriptor)

    return fsync


def test_a_database_that_stays_locked_is_told_as_such(working, monkeypatch) -> None:
    import sqlite3

    device, assignment = working
    monkeypatch.setattr("coordinator.store.database.BUSY_TIMEOUT_MILLISECONDS", 10)
    device.coordinator.restart()
    other = sqlite3.connect(device.coordinator.state / "coordinator.sqlite")
    other.execute("BEGIN IMMEDIATE")
    try:
        assert "locked" in problem_of(device.send(assignment), 503, "store")
    finally:
        other.rollback()
        other.close()
    assert device.send(assignment).status_code == 200


def test_an_incoming_file_that_is_not_kept_disappears(tmp_path: Path) -> None:
    with Incoming(tmp_path) as incoming:
        incoming.write(b"abc")
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError), Incoming(tmp_path) as incoming:
        raise StoreError("anything")
    assert list(tmp_path.iterdir()) == []
