import pytest

from tests.edge_client.tiny import TinyPrograms, make_data


@pytest.fixture(scope="session")
def programs(shared_folder):
    return TinyPrograms(shared_folder / "tiny-programs")


@pytest.fixture
def data_file(tmp_path):
    return make_data(tmp_path / "data.npz")
