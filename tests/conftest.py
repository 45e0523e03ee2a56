"""What all rooms share: keys of their own, and folders that the test processes of a run have in common.

What signs or trusts in a test, also in a child process, never touches the user's home. Lowering a program takes seconds, so
what one test lowered is there for the others.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from lamina.bundles.keys import VARIABLE

_made: list[str] = []

# An example that takes long is no fault: machines are shared, and the tests have bounds of their own.
settings.register_profile("lamina", deadline=None)
settings.load_profile("lamina")


def pytest_configure(config: pytest.Config) -> None:
    """One folder for all processes of a run, because they share bundles: workers of pytest-xdist get it by inheritance."""
    # pytest listens to each logger that hands nothing on, and for a listener torch writes down every graph that it traces.
    logging.getLogger("torch.__trace").addHandler = lambda _: None  # type: ignore[method-assign]
    if not hasattr(config, "workerinput"):
        _made.append(tempfile.mkdtemp(prefix="lamina-test-keys-"))
        os.environ[VARIABLE] = _made[-1]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "bundles"


@pytest.fixture(scope="session")
def program_cache(shared_folder: Path) -> Path:
    """`$LAMINA_CACHE` where it is set, so that a repeated run need not lower again."""
    return Path(os.environ.get("LAMINA_CACHE") or shared_folder / "programs")
