import pytest

from tests.edge_client.tiny import TinyPrograms, make_data


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return TinyPrograms(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def data_file(tmp_path):
    return make_data(tmp_path / "data.npz")
