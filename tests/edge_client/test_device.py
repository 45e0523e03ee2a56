"""The whole device against a coordinator that is a function: enrol, train, evaluate, change stages, finish."""

import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from edge_client.talk.device import Options, join
from lamina.bundles.manifest import ENGINES
from lamina.encoding.tensors import decode_file, hash_bytes
from lamina.errors import ConfigError, DataError, NotEnrolledError, ProtocolError, UnknownNameError
from lamina.wire import CheckIn, Enrolled, Refused, Wait
from tests.edge_client.conftest import Stopped
from tests.edge_client.fake_coordinator import FakeCoordinator, answer, problem
from tests.edge_client.tiny import LAYERS, initial_weights


def downloads(coordinator):
    return Counter(path.rpartition("/")[2] for method, path in coordinator.requests if path.startswith("/v1/blobs/"))


def test_a_device_trains_and_evaluates_every_round_of_every_stage(start, coordinator):
    said = start(coordinator)
    assert coordinator.steps == []
    assert len(coordinator.reports) == len(coordinator.evaluations) == 2 * LAYERS
    assert coordinator.evaluations[-1].loss < 0.5 * coordinator.evaluations[0].loss
    assert said[-1] == "finished: all runs are finished"


def test_a_stage_change_moves_weights_alone(start, coordinator):
    """Each program and the manifest come once; of the weights, only the active ones and what was just frozen."""
    start(coordinator)
    count = downloads(coordinator)
    manifest = coordinator.manifest
    assert set(count.values()) == {1}
    used = {p for stage in manifest.stages for p in (*stage.train.values(), *stage.eval.values())}
    used |= {manifest.frozen_programs["onnxruntime"][name] for stage in manifest.plan.stages for name in stage.frozen}
    assert {digest for digest in count if digest in manifest.programs} == used

    paths = [path for _, path in coordinator.requests]
    start_of_last = max(i for i, path in enumerate(paths) if path.endswith("/stages/1/rounds/1/evaluation"))
    first_update = paths.index("/v1/runs/r1/stages/2/rounds/0/update")
    rollout = {path.rpartition("/")[2] for path in paths[start_of_last:first_update] if path.startswith("/v1/blobs/")}
    last = manifest.plan.stages[-1]
    assert len(rollout) == len({"motion.layers.2"})  # all other active segments were here already, the stem is not needed
    assert rollout == {coordinator.manifest.initial_weights["motion.layers.2"]}
    assert last.frozen == ("motion.stem", "motion.layers.0", "motion.layers.1")


def test_a_restarted_device_downloads_and_computes_nothing_again(start, coordinator, tmp_path):
    original = coordinator.steps[:]
    coordinator.steps = original[:6]
    start(coordinator)
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "state" / "features").glob("*.npy")}
    coordinator.requests.clear()
    coordinator.steps = original[6:7]
    start(coordinator)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "state" / "features").glob("*.npy")} == features
    assert not set(downloads(coordinator)) & {*coordinator.manifest.programs, hash_bytes(coordinator.manifest.to_json())}
    assert not any(path == "/v1/devices" for _, path in coordinator.requests)


def test_the_state_folder_does_not_grow_with_the_rounds(start, coordinator, tmp_path):
    start(coordinator)
    state = tmp_path / "state"
    last = coordinator.manifest.plan.stages[-1]
    known = {*coordinator.manifest.programs, hash_bytes(coordinator.manifest.to_json()), *coordinator.weights.values()}
    # The last assignment evaluates weights that the coordinator still holds.
    assert {path.name for path in (state / "blobs").iterdir()} <= known
    assert len(list((state / "features").glob("*.npy"))) == 2  # train and test
    assert len(last.frozen) == LAYERS


@pytest.mark.parametrize("engine", ENGINES)
def test_the_update_is_the_difference_by_the_names_of_the_exchange(start, programs, tmp_path, engine):
    coordinator = FakeCoordinator(*programs.bundle(engine, count=1))
    coordinator.steps = coordinator.steps[:1]
    start(coordinator, engine=engine)
    (tmp_path / "update").write_bytes(coordinator.updates[0])
    update = decode_file(str(tmp_path / "update"), coordinator.manifest.exchange_specs(0))
    assert any(np.abs(value).max() > 1e-3 for value in update.values())
    assert all(np.abs(value).max() < 2 for value in update.values())
    reference = FakeCoordinator(*programs.bundle("torch", count=1))
    reference.steps = reference.steps[:1]
    start(reference, engine="torch", state=tmp_path / "reference")
    (tmp_path / "update").write_bytes(reference.updates[0])
    for name, value in decode_file(str(tmp_path / "update"), reference.manifest.exchange_specs(0)).items():
        np.testing.assert_allclose(update[name], value, atol=1e-5)


def test_the_report_says_what_the_round_cost(start, coordinator):
    start(coordinator)
    first, second = coordinator.reports[:2]
    assert first.num_examples == 21
    assert first.bytes_up > len(coordinator.updates[0])
    assert (
        first.bytes_down > sum(len(coordinator.blobs[digest]) for digest in coordinator.manifest.initial_weights.values()) / 2
    )
    assert second.bytes_down < first.bytes_down  # no programs any more
    assert 20 << 20 < first.peak_bytes < 20 << 30
    assert first.train_seconds > 0


def test_training_again_sends_the_same_bytes(start, programs, tmp_path):
    updates = []
    for state in ("one", "two"):
        coordinator = FakeCoordinator(*programs.bundle("onnxruntime"))
        start(coordinator, state=tmp_path / state)
        updates.append(coordinator.updates)
    assert updates[0] == updates[1]


def test_an_update_that_could_not_be_sent_is_sent_by_the_next_command_without_training_again(start, coordinator, monkeypatch):
    coordinator.steps = coordinator.steps[:1]

    class Away(FakeCoordinator):
        def __call__(self, request):
            if request.url.path.endswith("/update"):
                raise httpx.ConnectError("no network")
            return super().__call__(request)

    away = Away(coordinator.manifest, coordinator.blobs)
    with pytest.raises(Stopped, match="no network"):
        start(away)
    monkeypatch.setattr("edge_client.talk.device.do_job", None)
    said = start(coordinator)
    assert len(coordinator.updates) == 1
    assert said[-1] == "finished: all runs are finished"


def test_a_round_that_closed_is_no_error(start, coordinator):
    class Late(FakeCoordinator):
        closed = False

        def __call__(self, request):
            if request.url.path.endswith("/update") and not self.closed:
                self.closed = True
                return problem("round-closed", 409, "round 0 of stage 0 is closed")
            return super().__call__(request)

    late = Late(coordinator.manifest, coordinator.blobs)
    said = start(late)
    assert "too late: round 0 of stage 0 is closed; checking in again" in said
    assert late.steps == []


def test_weights_that_are_gone_are_asked_for_once_more_and_then_reported(start, coordinator):
    lost = coordinator.weights["head"]
    del coordinator.blobs[lost]

    class Forgetful(FakeCoordinator):
        def __call__(self, request):
            if request.url.path.endswith(lost):
                return problem("unknown-name", 404, "no such blob")
            return super().__call__(request)

    forgetful = Forgetful(coordinator.manifest, coordinator.blobs)
    with pytest.raises(UnknownNameError, match="no such blob"):
        start(forgetful)
    assert [path for _, path in forgetful.requests].count("/v1/check-in") == 2


def test_a_long_round_keeps_its_lease(start, coordinator, monkeypatch):
    coordinator.lease_seconds = 0.0
    monkeypatch.setattr("edge_client.train.heartbeat.SHORTEST_PAUSE_SECONDS", 0.0)  # so that it is renewed after every batch
    coordinator.steps = coordinator.steps[:2]
    start(coordinator)
    assert coordinator.steps == []
    assert [path for _, path in coordinator.requests].count("/v1/check-in") > 6


def test_waiting_says_the_reason_once_and_asks_again(start, coordinator):
    class Patient(FakeCoordinator):
        waits = 2

        def __call__(self, request):
            if request.url.path == "/v1/check-in" and self.waits:
                self.waits -= 1
                self.requests.append(CheckIn.from_json(request.content))
                return answer(Wait(reason="cohort", detail="1 more device is needed", wait_seconds_min=3, wait_seconds_max=5))
            return super().__call__(request)

    patient = Patient(coordinator.manifest, coordinator.blobs)
    patient.steps = patient.steps[:1]
    said = start(patient, run="r1")
    assert said.count("waiting: 1 more device is needed") == 1
    (first, second) = (message for message in patient.requests if isinstance(message, CheckIn))
    assert first == second
    assert (first.run, first.modalities, first.train_examples, first.test_examples) == ("r1", ("motion",), 21, 10)


def test_without_work_done_a_device_waits_for_the_first_run(start, coordinator):
    coordinator.steps = []
    with pytest.raises(Stopped, match="waiting: all runs are finished"):
        start(coordinator)


def test_a_refused_device_says_why(start):
    def refuse(request):
        if request.url.path == "/v1/devices":
            return answer(Enrolled(device_id="d", device_token="t"))
        return answer(Refused(detail="run r1 needs the modality sound"))

    with pytest.raises(ProtocolError, match="cannot use this device: run r1 needs the modality sound"):
        start(refuse)


def test_a_revoked_device_says_how_to_enrol_anew(start, coordinator, monkeypatch):
    start(coordinator)
    monkeypatch.setattr("tests.edge_client.fake_coordinator.DEVICE_TOKEN", "another")
    with pytest.raises(NotEnrolledError, match=r"does not know this device any more .*delete .*identity\.json"):
        start(coordinator)


def test_data_that_does_not_fit_the_model_is_refused_before_training(start, coordinator, tmp_path):
    arrays = {"train_motion": np.zeros((4, 2, 9), np.float32), "train_label": np.zeros(4, np.int64)}
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(DataError, match=r"'train_motion' has rows of shape \(2, 9\)"):
        start(coordinator, data=tmp_path / "other.npz")
    assert coordinator.updates == []


def test_what_is_wrong_on_this_machine_is_found_before_the_coordinator_is_asked(start, coordinator, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        start(coordinator, data=tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="is no coordinator address"):
        join(Options("nowhere", str(tmp_path / "none.npz"), "attic", "torch", str(tmp_path / "s")), lambda: "")
    assert coordinator.requests == []


KILLED = """
import os, pickle, signal, sys
from functools import partial
from pathlib import Path
import httpx
from edge_client.train import heartbeat
from edge_client.talk.device import Options, join
from edge_client.talk.transport import Transport
from tests.edge_client.fake_coordinator import ENROLMENT_TOKEN, FakeCoordinator

coordinator = FakeCoordinator(*pickle.loads(Path(sys.argv[1]).read_bytes()))
coordinator.steps = [("train", 1, 0)]
coordinator.lease_seconds = heartbeat.SHORTEST_PAUSE_SECONDS = 0.0
check_ins = 0
def handle(request):
    global check_ins
    check_ins += request.url.path == "/v1/check-in"
    if check_ins == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return coordinator(request)
connect = partial(Transport, transport=httpx.MockTransport(handle))
options = Options("http://c", sys.argv[2], "attic", "onnxruntime", sys.argv[3], until_finished=True)
join(options, lambda: ENROLMENT_TOKEN, connect)
"""


@pytest.mark.parametrize("check_in", [3, 9, 12])  # while features are made, and in two places of the training
def test_a_device_killed_in_a_round_trains_it_again_to_the_same_bits(start, programs, data_file, tmp_path, check_in):
    bundle = programs.bundle("onnxruntime")
    (tmp_path / "bundle").write_bytes(pickle.dumps(bundle))
    state = tmp_path / "state"
    script = [sys.executable, "-c", KILLED, str(tmp_path / "bundle"), str(data_file), str(state), str(check_in)]
    assert subprocess.run(script, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL).returncode == -9
    assert (state / "identity.json").exists()

    updates = []
    for folder in (state, tmp_path / "undisturbed"):
        coordinator = FakeCoordinator(*bundle)
        coordinator.steps = [("train", 1, 0)]
        start(coordinator, state=folder)
        updates += coordinator.updates
    assert len(updates) == 2
    assert updates[0] == updates[1]
    assert set(initial_weights()) == set(coordinator.weights)
