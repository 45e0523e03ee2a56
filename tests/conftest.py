"""Keys of their own for the tests: what signs or trusts in one, also in a child process, never touches the user's home."""

import os
import shutil
import tempfile

import pytest

from lamina.keys import VARIABLE

_made: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """One folder for all processes of a run, because they share bundles: workers of pytest-xdist get it by inheritance."""
    if not hasattr(config, "workerinput"):
        _made.append(tempfile.mkdtemp(prefix="lamina-test-keys-"))
        os.environ[VARIABLE] = _made[-1]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
