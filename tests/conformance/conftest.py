import os
from pathlib import Path

import pytest

from edge_client.engines import load_engine
from lamina.errors import EngineMissingError
from lamina.manifest import ENGINES


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "bundles"


@pytest.fixture(scope="session")
def program_cache(shared_folder: Path) -> Path:
    """`$LAMINA_CACHE` where it is set, so that a repeated run need not lower again."""
    return Path(os.environ.get("LAMINA_CACHE") or shared_folder / "programs")


@pytest.fixture(params=ENGINES)
def engine(request):
    try:
        return load_engine(request.param)
    except EngineMissingError as error:
        pytest.skip(error.message)
