"""Work that a coordinator cannot mean, uploads that are damaged on their way, and programs that never end."""

import httpx
import pytest

from edge_client.process.outcome import UPDATE
from edge_client.process.watchdog import Watchdog
from edge_client.talk.assignment import check_manifest
from lamina.bundles.manifest import ProgramReference
from lamina.errors import HashMismatchError, LaminaError, NotEnrolledError, ProtocolError
from lamina.wire import Wait
from tests.edge_client.conftest import Stopped
from tests.edge_client.fake_coordinator import FakeCoordinator, problem
from tests.edge_client.test_supervisor import fake_engine, finished, served
from tests.edge_client.test_supervisor import start as start_processes

__all__ = ["served", "start_processes"]


class Altered(FakeCoordinator):
    """Gives an assignment in which `changes` stand."""

    def __init__(self, original, **changes):
        super().__init__(original.manifest, original.blobs)
        self.steps, self.changes = [("train", 0, 0)], changes

    def next_work(self):
        work = super().next_work()
        return work.model_copy(update={name: change(work) for name, change in self.changes.items()})


def without(names, name):
    return {key: value for key, value in names.items() if key != name}


WORK = {
    "stage 99": {"stage": lambda work: 99},
    "a round that the stage has not": {"round": lambda work: 99},
    "an unknown segment": {"weights": lambda work: work.weights | {"motion.layers.99": "0" * 64}},
    "weights of a later stage": {"weights": lambda work: work.weights | {"motion.layers.2": "0" * 64}},
    "no weights of what it trains": {"weights": lambda work: without(work.weights, "head")},
    "no weights at all": {"weights": lambda work: {}},
    "a teacher that is no segment": {"teacher_weights": lambda work: {"sound.stem": "0" * 64}},
    "compressed weights of something else": {"compressed_weights": lambda work: {"motion.norm2": "0" * 64}},
    "a modality that the model lacks": {"modalities": lambda work: ("sound",)},
    "a modality twice": {"modalities": lambda work: ("motion", "motion")},
    "a calibration": {"phase": lambda work: "calibrate"},
    "a frozen prefix in the first stage": {"stage": lambda work: 1},
}


@pytest.mark.parametrize("changes", WORK.values(), ids=WORK)
def test_work_that_cannot_be_meant_is_a_protocol_error(start, coordinator, changes):
    with pytest.raises(ProtocolError) as caught:
        start(Altered(coordinator, **changes))
    assert caught.value.code == "protocol"


def test_weights_that_are_another_blob_of_the_bundle_are_named(start, coordinator):
    program = next(iter(coordinator.manifest.programs))
    with pytest.raises(LaminaError, match="no valid tensor file"):
        start(Altered(coordinator, weights=lambda work: work.weights | {"head": program}))


def test_a_compression_that_this_device_did_not_offer_is_refused_before_training(start, coordinator, monkeypatch):
    monkeypatch.setattr("edge_client.talk.assignment.available_compressions", lambda: ("none",))
    with pytest.raises(ProtocolError, match="asks for zstd, which this device did not offer"):
        start(Altered(coordinator, upload_compression=lambda work: "zstd"))


def test_tensors_that_are_larger_than_their_file_are_refused_before_memory_is_asked_for(coordinator):
    manifest = coordinator.manifest
    check_manifest(manifest)
    segment = manifest.segments[0]
    tensor = segment.tensors[0].model_copy(update={"shape": (2**30, 2**10)})
    huge = segment.model_copy(update={"tensors": (tensor,)})
    with pytest.raises(ProtocolError, match=f"{segment.name} has {2**40} values in a file of"):
        check_manifest(manifest.model_copy(update={"segments": (huge, *manifest.segments[1:])}))


def test_programs_that_the_manifest_does_not_have_are_refused(coordinator):
    manifest = coordinator.manifest
    stage = manifest.stages[0].model_copy(update={"train": {"onnxruntime": manifest.initial_weights["head"]}})
    with pytest.raises(ProtocolError, match="stage 0 has a program for onnxruntime, and has none"):
        check_manifest(manifest.model_copy(update={"stages": (stage, *manifest.stages[1:])}))
    blob, program = next(iter(manifest.programs.items()))
    reference = ProgramReference(kind="start", tensors=(len(program.weights),))
    programs = {**manifest.programs, blob: program.model_copy(update={"references": (reference,)})}
    with pytest.raises(ProtocolError, match="refers to weights that it does not take"):
        check_manifest(manifest.model_copy(update={"programs": programs}))


# Uploads.


class Unlucky(FakeCoordinator):
    """Answers the first uploads of an update as `refuse` says."""

    def __init__(self, original, refuse, times):
        super().__init__(original.manifest, original.blobs)
        self.steps, self.refuse, self.times = [("train", 0, 0)], refuse, times
        self.bodies = []

    def __call__(self, request):
        if request.url.path.endswith("/update"):
            self.bodies.append(request.read())
            if self.times:
                self.times -= 1
                return self.refuse()
        return super().__call__(request)


def damaged():
    return problem("hash-mismatch", 400, "the body has another sha256 than announced; send it again")


def test_an_upload_that_was_damaged_is_sent_again(start, coordinator):
    unlucky = Unlucky(coordinator, damaged, 2)
    said = start(unlucky)
    assert len(unlucky.updates) == 1 and len(set(unlucky.bodies)) == 1 and len(unlucky.bodies) == 3
    assert any("damaged on its way" in line for line in said)


REFUSALS = {
    "damaged for good": (damaged, HashMismatchError),
    "no JSON": (lambda: httpx.Response(200, content=b"5"), ProtocolError),
    "a hotel": (lambda: httpx.Response(200, content=b"<html>"), ProtocolError),
    "a redirect": (lambda: httpx.Response(302, headers={"Location": "http://hotel"}), ProtocolError),
    "not enrolled": (lambda: problem("not-enrolled", 401, "who are you?"), NotEnrolledError),
    "an error of a proxy": (lambda: httpx.Response(407, content=b"log in"), ProtocolError),
}


@pytest.mark.parametrize(("refuse", "error"), REFUSALS.values(), ids=REFUSALS)
def test_an_update_that_did_not_get_there_is_kept_for_the_next_command(start, coordinator, monkeypatch, refuse, error):
    unlucky = Unlucky(coordinator, refuse, 4)
    with pytest.raises(error):
        start(unlucky)
    unlucky.times = 0
    monkeypatch.setattr("edge_client.talk.device.do_job", None)  # nothing is trained again
    start(unlucky)
    assert len(unlucky.updates) == 1 and len(set(unlucky.bodies)) == 1


def test_an_update_that_is_refused_for_good_is_dropped(start, coordinator, tmp_path):
    unlucky = Unlucky(coordinator, lambda: problem("update-rejected", 409, "another one was counted"), 1)
    with pytest.raises(LaminaError, match="another one was counted"):
        start(unlucky)
    assert not (tmp_path / "state" / "work" / UPDATE).exists()


def test_an_update_damaged_on_this_disk_is_trained_again_and_told_apart(start, coordinator, tmp_path):
    unlucky = Unlucky(coordinator, lambda: httpx.Response(200, content=b"5"), 1)
    with pytest.raises(ProtocolError):
        start(unlucky)
    path = tmp_path / "state" / "work" / UPDATE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = start(unlucky)
    assert unlucky.updates == [content]
    assert any("its update was damaged on this disk" in line for line in said)


@pytest.mark.parametrize("content", [b"", b"5", b"{}", b"[]"])
def test_a_job_of_another_version_is_done_again(start, coordinator, tmp_path, content):
    unlucky = Unlucky(coordinator, lambda: httpx.Response(200, content=b"5"), 1)
    with pytest.raises(ProtocolError):
        start(unlucky)
    (tmp_path / "state" / "work" / "job.json").write_bytes(content)
    said = start(unlucky)
    assert len(unlucky.updates) == 1
    assert any("of another version of lamina" in line for line in said)


def test_a_full_disk_during_training_is_not_remembered_as_the_outcome_for_ever(start, coordinator, tmp_path, monkeypatch):
    unlucky = Unlucky(coordinator, damaged, 0)
    with monkeypatch.context() as patch:
        patch.setattr("edge_client.train.trainer.write_durably", full)
        with pytest.raises(LaminaError, match="no space left"):
            start(unlucky)
    start(unlucky)
    assert len(unlucky.updates) == 1


def full(*arguments):
    raise OSError(28, "No space left on device")


# Waiting, and programs that never end.


def test_a_waiting_device_says_one_line_for_each_change_of_state(start, coordinator):
    class Slow(FakeCoordinator):
        waits = 0

        def next_work(self):
            self.waits += 1
            reason = "cohort" if self.waits < 3 else "round"
            return Wait(reason=reason, detail=f"{self.waits} of 9", wait_seconds_min=1, wait_seconds_max=2)

    said = []
    slow = Slow(coordinator.manifest, coordinator.blobs)
    with pytest.raises(Stopped):
        start(slow, say=said)
    assert [line for line in said if line.startswith("waiting")] == ["waiting: 1 of 9", "waiting: 3 of 9"]
    assert slow.waits == 4


@pytest.mark.parametrize("resident", [False, True])
def test_a_program_that_never_ends_is_one_failed_attempt(start_processes, served, tmp_path, resident):
    """Native code that even holds Python's lock, so that nothing written in Python could end it."""
    path = tmp_path / "path"
    body = f"""
import sys
from pathlib import Path
counter = Path({str(tmp_path / "count")!r})
count = int(counter.read_text()) if counter.exists() else 0
counter.write_text(str(count + 1))
if count == 1:  # 0 is the check at the start
    import ctypes
    ctypes.PyDLL(None).sleep(1000)
sys.path.remove({str(path)!r})
del sys.modules["onnxruntime"]
import onnxruntime
sys.modules[__name__] = onnxruntime
"""
    fake_engine(path, body)
    said, status = finished(start_processes(extra_path=path, is_resident=resident, stall_seconds=15.0))
    assert status == 0, said
    assert "attempt 1 failed, it was ended by SIGALRM (it did no batch and no feature rows for too long)" in said
    assert served[0].reports[0].failed_attempts == 1
    assert "SIGALRM" in served[0].reports[0].failure


def test_the_watchdog_waits_50_times_as_long_as_the_longest_step_but_never_less_than_ten_minutes(monkeypatch):
    now, timers = [0.0], []
    monkeypatch.setattr("edge_client.process.watchdog.signal.setitimer", lambda which, seconds: timers.append(seconds))
    watchdog = Watchdog(3600, lambda: now[0])
    for seconds in (1, 20, 1, 500):
        now[0] += seconds
        watchdog.fed()
    watchdog.stop()
    assert timers == [3600, 600, 1000, 1000, 3600, 0]
