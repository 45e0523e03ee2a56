"""`lamina calibrate`: the same client as `lamina join`, in another role."""

from functools import partial

import httpx
import pytest
import typer
from typer.testing import CliRunner

from edge_client.talk.device import Device, Options
from edge_client.talk.transport import Transport
from lamina.cli.calibrate import calibrate
from lamina.cli.join import join
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ProtocolError
from lamina.wire import Assignment, CheckIn
from tests.edge_client.fake_coordinator import ENROLMENT_TOKEN, FakeCoordinator, answer
from tests.edge_client.fake_manifest import ENGINE, fake_manifest
from tests.edge_client.test_prepare_methods import PARTIAL, make_plan


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What a verb tells the client to do."""
    calls = []
    monkeypatch.setattr("edge_client.process.start.start", calls.append)

    def run(verb, *more):
        app = typer.Typer()
        app.command()(verb)
        given = ["--data", tmp_path / "d.npz", "--name", "server", "--engine", "onnxruntime", "--state", tmp_path / "s", *more]
        done = CliRunner().invoke(app, ["http://c", *map(str, given)])
        assert done.exit_code == 0, done.output
        return calls.pop()

    return run


def test_a_calibrator_is_a_device_of_another_role(told):
    calibrator, device = told(calibrate, "--run", "r1", "--resident"), told(join, "--run", "r1", "--resident")
    assert calibrator.pop("role") == "calibrator"
    assert device.pop("disk_bytes") is None
    assert calibrator == device
    assert Options(**told(calibrate)).role == "calibrator"
    assert Options(**told(join)).role == "device"


class Given:
    """A coordinator that gives one answer, and notes the check-ins."""

    def __init__(self, manifest, work):
        self._fake, self._work, self.facts = (
            FakeCoordinator(manifest, {hash_bytes(manifest.to_json()): manifest.to_json()}),
            work,
            [],
        )

    def __call__(self, request):
        if request.url.path == "/v1/check-in":
            self.facts.append(CheckIn.from_json(request.read()))
            return answer(self._work)
        return self._fake(request)


class Fetched(Exception):
    """The device went on to download the work."""


def check_in(monkeypatch, tmp_path, data, role, phase="train", plan=None, **more):
    manifest = fake_manifest(plan or make_plan())
    stage = manifest.plan.stages[0]
    work = Assignment(
        phase=phase,
        run="r",
        manifest=hash_bytes(manifest.to_json()),
        stage=0,
        round=0,
        weights={name: manifest.initial_weights[name] for name in (*stage.active, *stage.frozen)},
        lease_seconds=60,
        upload_encoding="fp32",
        **more,
    )
    coordinator = Given(manifest, work)

    def stop(*_):
        raise Fetched

    monkeypatch.setattr("edge_client.talk.device.prepare_job", stop)
    connect = partial(Transport, transport=httpx.MockTransport(coordinator), say=print)
    with connect("http://c") as transport:
        options = Options("http://c", str(data), "attic", ENGINE, str(tmp_path / role), role=role)
        with pytest.raises((Fetched, ProtocolError)) as caught:
            Device(options, transport, lambda: ENROLMENT_TOKEN, print).next_job()
    return caught.value, coordinator.facts[0]


@pytest.mark.parametrize(
    ("role", "phase", "is_fine"),
    [
        ("device", "train", True),
        ("device", "evaluate", True),
        ("device", "calibrate", False),
        ("calibrator", "calibrate", True),
        ("calibrator", "train", False),
    ],
)
def test_a_client_does_the_work_of_its_role_alone(monkeypatch, tmp_path, data_file, role, phase, is_fine):
    """The memory of a device does not fit a calibration, and the server's data is not for a cohort."""
    outcome, facts = check_in(monkeypatch, tmp_path, data_file, role, phase)
    assert facts.role == role
    assert isinstance(outcome, Fetched) == is_fine
    if not is_fine:
        assert f"gave a {role} work of phase '{phase}'" in outcome.message


def test_data_without_a_modality_of_the_plan_is_the_coordinators_to_accept(monkeypatch, tmp_path, data_file):
    outcome, facts = check_in(monkeypatch, tmp_path, data_file, "device", plan=make_plan(**PARTIAL), modalities=("motion",))
    assert isinstance(outcome, Fetched)
    assert facts.modalities == ("motion",)


def test_the_check_in_of_a_device_is_what_it_was_before_there_were_roles():
    facts = CheckIn(engine="torch", modalities=("motion",), train_examples=1, test_examples=0)
    assert b"role" not in facts.to_json()
