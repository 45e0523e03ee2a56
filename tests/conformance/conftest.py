import pytest

from edge_client.engines import load_engine
from lamina.bundles.manifest import ENGINES
from lamina.errors import EngineMissingError


@pytest.fixture(params=ENGINES)
def engine(request):
    try:
        return load_engine(request.param)
    except EngineMissingError as error:
        pytest.skip(error.message)
