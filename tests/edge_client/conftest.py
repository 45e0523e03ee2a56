from functools import partial

import httpx
import pytest

from edge_client.talk.device import Options, join
from edge_client.talk.transport import Transport
from tests.edge_client.fake_coordinator import ENROLMENT_TOKEN, FakeCoordinator
from tests.edge_client.tiny import TinyPrograms, make_data


@pytest.fixture(scope="session")
def programs(shared_folder):
    return TinyPrograms(shared_folder / "tiny-programs")


@pytest.fixture
def data_file(tmp_path):
    return make_data(tmp_path / "data.npz")


class Stopped(Exception):
    """Ends a device that would wait for ever."""


@pytest.fixture
def start(tmp_path, data_file):
    """start(coordinator) runs a device to the end of all runs; gives what it said."""

    def run(coordinator, name="attic", engine="onnxruntime", say=None, **options):
        said, pauses = [] if say is None else say, []

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) > 3:
                raise Stopped(said[-1])

        connect = partial(Transport, transport=httpx.MockTransport(coordinator), say=said.append, sleep=sleep)
        options = {"until_finished": True, "state": tmp_path / "state", "data": data_file} | options
        options |= {key: str(options[key]) for key in ("state", "data")}
        chosen = Options("http://coordinator", name=name, engine=engine, **options)
        join(chosen, lambda: ENROLMENT_TOKEN, connect, said.append)
        return said

    return run


@pytest.fixture
def coordinator(programs):
    return FakeCoordinator(*programs.bundle("onnxruntime", rounds=2))
