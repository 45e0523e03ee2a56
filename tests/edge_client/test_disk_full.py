"""A device whose disk is full, at each of its writes: an error with a name, and the same command goes on afterwards."""

import errno
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.rows.row_files import RowWriter
from lamina.errors import DiskFullError, StoreError
from lamina.files import disk_errors_named
from tests.edge_client.fake_coordinator import FakeCoordinator
from tests.edge_client.test_supervisor import fake_engine, finished, served
from tests.edge_client.test_supervisor import start as start_processes

__all__ = ["served", "start_processes"]


class FullDisk:
    """Counts the files below a folder that are opened to be written, and refuses one of them as a full disk does."""

    def __init__(self):
        self.folder, self.refused, self.opened, self.error = None, None, [], errno.ENOSPC

    def __call__(self, event, arguments):
        if self.folder is None or event != "open":
            return
        path, _, flags = arguments
        if str(path).startswith(self.folder) and isinstance(flags, int) and flags & 3:
            self.opened.append(Path(path).name)
            if len(self.opened) == self.refused:
                raise OSError(self.error, "No space left on device", str(path))


FULL_DISK = FullDisk()
sys.addaudithook(FULL_DISK)


@pytest.fixture
def disk(tmp_path):
    yield FULL_DISK
    FULL_DISK.folder = FULL_DISK.refused = None
    FULL_DISK.error = errno.ENOSPC


@pytest.fixture
def bundle(programs):
    manifest, blobs = programs.bundle("onnxruntime")
    return manifest, blobs


def one_round(bundle):
    """The first round of the second stage: it makes features, trains, and packs its update."""
    coordinator = FakeCoordinator(*bundle)
    coordinator.steps = [("train", 1, 0)]
    coordinator.aggregate = lambda body, stage: None
    return coordinator


def test_a_disk_that_is_full_at_any_write_is_named_and_the_same_command_goes_on(start, bundle, tmp_path, disk, monkeypatch):
    from edge_client.talk import device

    prepared = device.prepare_job
    monkeypatch.setattr(device, "prepare_job", lambda *given: replace(prepared(*given), upload_compression="zstd"))
    undisturbed = one_round(bundle)
    disk.folder, disk.opened = str(tmp_path / "undisturbed"), []
    start(undisturbed, state=tmp_path / "undisturbed")
    disk.folder, names = None, list(disk.opened)
    kinds = "identity|lock|partial|checked|job|update|outcome|signature|trusted|fingerprint|verified|bytes"
    assert all(any(kind in name for name in names) for kind in kinds.split("|")), names
    first_of_its_kind = {re.sub(r"[0-9a-f]{8,}", "", name): number for number, name in reversed([*enumerate(names, 1)])}
    assert len(first_of_its_kind) >= 10

    for name, number in first_of_its_kind.items():
        coordinator, state = one_round(bundle), tmp_path / f"state {number}"
        disk.folder, disk.opened, disk.refused = str(state), [], number
        with pytest.raises(DiskFullError) as caught:
            start(coordinator, state=state)
        assert "no space left on the disk of" in caught.value.message, name
        disk.folder = None
        assert not list(state.glob("**/*.npy.partial"))
        start(coordinator, state=state)
        assert coordinator.updates == undisturbed.updates, name
        assert coordinator.reports[0].failed_attempts == 0


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EFBIG, errno.EDQUOT])
def test_other_errors_of_the_disk_have_names_as_well(start, bundle, tmp_path, disk, code):
    disk.error = code
    for number in (3, 9):
        state = tmp_path / f"state {number}"
        disk.folder, disk.opened, disk.refused = str(state), [], number
        with pytest.raises(StoreError):
            start(one_round(bundle), state=state)


def test_a_bug_is_not_taken_for_an_error_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors_named(tmp_path):
        (tmp_path / "none").read_bytes()


def test_rows_that_are_abandoned_on_a_full_disk_leave_nothing_behind(tmp_path):
    writer = RowWriter(tmp_path / "rows.partial", 2)
    file = writer._file

    class Full:
        def close(self):
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    writer._file = Full()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


FULL_IN_THE_TRAINER = """
import sys
from pathlib import Path
counter = Path({counter!r})
count = int(counter.read_text()) if counter.exists() else 0
counter.write_text(str(count + 1))
if count == 1:  # 0 is the check at the start
    def hook(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & 3:
            if any(name in str(arguments[0]) for name in {names!r}):
                raise OSError(28, "No space left on device", str(arguments[0]))
    sys.addaudithook(hook)
sys.path.remove({path!r})
del sys.modules["onnxruntime"]
import onnxruntime
sys.modules[__name__] = onnxruntime
"""


@pytest.mark.parametrize(("names", "resident"), [(["update."], False), (["update.", "outcome"], False), (["outcome"], True)])
def test_a_trainer_on_a_full_disk_did_not_die(start_processes, served, tmp_path, names, resident):
    """Its update does not fit, or not even its outcome: one error with a name, no traceback, no failed attempt."""
    path = tmp_path / "path"
    fake_engine(path, FULL_IN_THE_TRAINER.format(counter=str(tmp_path / "count"), names=names, path=str(path)))
    said, status = finished(start_processes(extra_path=path, is_resident=resident))
    assert status == 1
    assert said.count("error [disk-full]: no space left on the disk of") == 1
    assert "Traceback" not in said and "attempt" not in said
    said, status = finished(start_processes(extra_path=path, is_resident=resident))
    assert status == 0, said
    assert [report.failed_attempts for report in served[0].reports] == [0, 0]


def test_a_supervisor_that_cannot_make_its_folder_says_so(start_processes, tmp_path):
    (tmp_path / "file").write_text("no folder")
    said, status = finished(start_processes(state=str(tmp_path / "file" / "state")))
    assert status == 1
    assert "error [store]: Not a directory" in said and "Traceback" not in said


def test_what_a_device_keeps_is_nobody_elses_business(start_processes, served, tmp_path):
    said, status = finished(start_processes())
    assert status == 0, said
    assert json.loads((tmp_path / "state" / "identity.json").read_bytes())["name"] == "attic"
    for path in (tmp_path / "state", *(tmp_path / "state").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
