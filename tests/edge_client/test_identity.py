import json
import stat
import subprocess
import sys

import httpx
import pytest

from edge_client.identity import Identity, exclusive, load_or_enrol, read_enrolment_token
from edge_client.transport import Transport
from lamina.errors import ConfigError, NotEnrolledError
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
    assert enrolments == [(f"Bearer {ENROLMENT_TOKEN}", {"name": "attic"})]


def test_the_identity_is_readable_by_its_owner_alone_and_not_printed(tmp_path, transport):
    identity = load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert DEVICE_TOKEN not in f"{identity} {identity!r}"


def test_a_wrong_enrolment_token_leaves_nothing_behind(tmp_path, transport):
    with pytest.raises(NotEnrolledError, match="the enrolment token is not known"):
        load_or_enrol(tmp_path, "attic", transport, lambda: "wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_state_folder_belongs_to_one_name(tmp_path, transport):
    load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)
    with pytest.raises(ConfigError, match="belongs to device 'attic', not to 'cellar'"):
        load_or_enrol(tmp_path, "cellar", transport, lambda: ENROLMENT_TOKEN)


def test_a_name_that_the_wire_does_not_allow_is_refused_here(tmp_path, transport, enrolments):
    with pytest.raises(ConfigError, match="'under the roof' is no device name"):
        load_or_enrol(tmp_path, "under the roof", transport, lambda: ENROLMENT_TOKEN)
    assert enrolments == []


def test_a_damaged_identity_is_named(tmp_path, transport):
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(ConfigError, match=r"identity\.json is not a valid Identity"):
        load_or_enrol(tmp_path, "attic", transport, lambda: ENROLMENT_TOKEN)


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
from edge_client.identity import exclusive
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
