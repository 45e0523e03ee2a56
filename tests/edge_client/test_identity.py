import json
import stat
import subprocess
import sys

import httpx
import pytest

from edge_client.talk.identity import Identity, exclusive, load_or_enrol, read_enrolment_token
from edge_client.talk.transport import Transport
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, NotEnrolledError, UnreachableError
from lamina.wire import Enrolled
from tests.edge_client.fake_coordinator import DEVICE_TOKEN, ENROLMENT_TOKEN, answer, problem


@pytest.fixture
def enrolments():
    return []


@pytest.fixture
def transport(enrolments):
    def handle(request):
        enrolments.append((request.headers["Authorization"], json.loads(request.content)))
        if request.headers["Authorization"] != f"Bearer {ENROLMENT_TOKEN}":
            return problem("not-enrolled", 401, "the enrolment token is not known")
        return answer(Enrolled(device_id="d1", device_token=DEVICE_TOKEN))

    return Transport("http://coordinator", transport=httpx.MockTransport(handle))


def test_a_device_enrols_once_and_is_the_same_after_a_restart(tmp_path, transport, enrolments):
    first = load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
    again = load_or_enrol(tmp_path, "attic", transport, lambda: pytest.fail("the token is asked for again"))
    assert first == again == Identity(name="attic", device_id="d1", device_token=DEVICE_TOKEN)
    ((shown, message),) = enrolments
    assert shown == f"Bearer {ENROLMENT_TOKEN}"
    assert message["name"] == "attic" and len(message["token_sha256"]) == 64


def test_the_identity_is_readable_by_its_owner_alone_and_not_printed(tmp_path, transport):
    identity = load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert DEVICE_TOKEN not in f"{identity} {identity!r}"


class Coordinator:
    """Keeps names and hashes as the real one does. The first `lost` answers do not arrive."""

    def __init__(self, lost=0):
        self.lost, self.hashes, self.asked = lost, {}, []

    def __call__(self, request):
        message = json.loads(request.content)
        self.asked.append(message)
        if request.headers["Authorization"] != f"Bearer {ENROLMENT_TOKEN}":
            return problem("not-enrolled", 401, "the enrolment token is not known")
        known = self.hashes.setdefault(message["name"], message["token_sha256"])
        if self.lost:
            self.lost -= 1
            raise httpx.ReadError("the answer was lost")
        if known != message["token_sha256"]:
            return problem("config", 422, "a device named 'attic' is here: `lamina device remove attic`")
        return answer(Enrolled(device_id="d1"))

    def transport(self, **options):
        return Transport("http://c", transport=httpx.MockTransport(self), say=print, sleep=lambda seconds: None, **options)


def test_the_token_is_on_the_disk_before_the_coordinator_hears_of_it(tmp_path):
    def handle(request):
        stored = json.loads((tmp_path / "identity.json").read_bytes())
        assert hash_bytes(stored["device_token"].encode()) == json.loads(request.content)["token_sha256"]
        return answer(Enrolled(device_id="d1"))

    transport = Transport("http://c", transport=httpx.MockTransport(handle))
    identity = load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
    assert identity.device_token == json.loads((tmp_path / "identity.json").read_bytes())["device_token"]
    assert len(identity.device_token) > 40


def test_a_lost_answer_costs_nothing(tmp_path):
    coordinator = Coordinator(lost=2)
    identity = load_or_enrol(tmp_path, "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN)
    assert coordinator.hashes == {"attic": hash_bytes(identity.device_token.encode())}
    assert len(coordinator.asked) == 3


def test_a_device_killed_before_it_stored_the_answer_asks_again_with_the_same_token(tmp_path):
    coordinator = Coordinator(lost=1)
    with pytest.raises(UnreachableError):
        load_or_enrol(tmp_path, "attic", coordinator.transport(patience_seconds=0), lambda: ENROLMENT_TOKEN)
    identity = load_or_enrol(tmp_path, "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN)
    assert identity.device_id == "d1"
    assert coordinator.asked[0] == coordinator.asked[1]


def test_a_device_that_lost_its_state_is_told_how_to_get_its_name_back(tmp_path):
    coordinator = Coordinator()
    load_or_enrol(tmp_path / "one", "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN)
    with pytest.raises(ConfigError, match="lamina device remove attic"):
        load_or_enrol(tmp_path / "two", "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN)
    del coordinator.hashes["attic"]
    assert load_or_enrol(tmp_path / "two", "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN).device_id == "d1"


def test_a_name_that_is_taken_can_be_changed_in_the_same_folder(tmp_path):
    coordinator = Coordinator()
    load_or_enrol(tmp_path / "one", "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN)
    with pytest.raises(ConfigError):
        load_or_enrol(tmp_path / "two", "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN)
    assert load_or_enrol(tmp_path / "two", "cellar", coordinator.transport(), lambda: ENROLMENT_TOKEN).name == "cellar"


def test_a_coordinator_from_before_devices_made_their_tokens_gives_one(tmp_path):
    def handle(request):
        if "token_sha256" in json.loads(request.content):
            return problem("config", 422, "the enrolment is not a valid Enrolment: token_sha256: unknown key")
        return answer(Enrolled(device_id="d1", device_token=DEVICE_TOKEN))

    transport = Transport("http://c", transport=httpx.MockTransport(handle))
    assert load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN).device_token == DEVICE_TOKEN


def test_a_wrong_enrolment_token_can_be_followed_by_the_right_one(tmp_path):
    coordinator = Coordinator()
    with pytest.raises(NotEnrolledError, match="the enrolment token is not known"):
        load_or_enrol(tmp_path, "attic", coordinator.transport(), lambda: "wrong")
    assert load_or_enrol(tmp_path, "attic", coordinator.transport(), lambda: ENROLMENT_TOKEN).device_id == "d1"


def test_a_state_folder_belongs_to_one_name(tmp_path, transport):
    load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
    with pytest.raises(ConfigError, match="belongs to device 'attic', not to 'cellar'"):
        load_or_enrol(tmp_path, "cellar", transport, lambda: ENROLMENT_TOKEN)


def test_a_name_that_the_wire_does_not_allow_is_refused_here(tmp_path, transport, enrolments):
    with pytest.raises(ConfigError, match="'under the roof' is no device name"):
        load_or_enrol(tmp_path, "under the roof", transport, lambda: ENROLMENT_TOKEN)
    assert enrolments == []


def test_a_damaged_identity_is_named(tmp_path, transport):
    for content in ("{", '{"device_id": "d", "device_token": "a-secret"}', '{"name": "attic", "device_token": "a-secret\\n"}'):
        (tmp_path / "identity.json").write_text(content)
        with pytest.raises(ConfigError, match=r"identity\.json is not a valid Identity") as caught:
            load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
        assert "a-secret" not in caught.value.message


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("LAMINA_TOKEN", "from-environment")
    assert read_enrolment_token(tmp_path / "token") == "from-file"
    assert read_enrolment_token(None) == "from-environment"


@pytest.mark.parametrize("text", ["", " \n", "two\nlines", "schlüssel"])
def test_a_token_that_cannot_be_one_is_refused_without_printing_it(tmp_path, monkeypatch, text):
    (tmp_path / "token").write_text(text)
    with pytest.raises(NotEnrolledError) as caught:
        read_enrolment_token(tmp_path / "token")
    assert not text.strip() or text.strip() not in caught.value.message


def test_a_missing_token_says_where_to_put_one(tmp_path, monkeypatch):
    monkeypatch.delenv("LAMINA_TOKEN", raising=False)
    with pytest.raises(NotEnrolledError, match="give --token-file FILE or set LAMINA_TOKEN"):
        read_enrolment_token(None)
    with pytest.raises(NotEnrolledError, match="cannot be read: No such file"):
        read_enrolment_token(tmp_path / "none")


def test_two_processes_cannot_share_a_state_folder(tmp_path):
    other = f"""
from pathlib import Path
from edge_client.talk.identity import exclusive
from lamina.errors import ConfigError
try:
    with exclusive(Path({str(tmp_path)!r})):
        print("entered")
except ConfigError as error:
    print(error.message)
"""
    with exclusive(tmp_path):
        refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout
    entered = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout
    assert "another process uses" in refused
    assert entered == "entered\n"
