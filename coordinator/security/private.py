"""The state folder is for the coordinator's user alone: it holds tokens, what devices sent, and the weights."""

import os
from pathlib import Path

_FOLDERS = ("blobs", "updates", "signatures")
_FILES = ("coordinator.sqlite", "coordinator.sqlite-wal", "coordinator.sqlite-shm", "admin.token", "enrolment.token")
_OTHERS = ("trusted.json", "lock", "address")


def make_private(state: Path) -> None:
    """Whatever this process makes from now on is private, and so is what it made in `state` before.

    A folder that holds other things too keeps its own mode; what is the coordinator's in it is private all the same.
    """
    os.umask(0o077)
    state.mkdir(parents=True, exist_ok=True)
    if {path.name for path in state.iterdir()} <= {*_FOLDERS, *_FILES, *_OTHERS}:
        _narrow(state)
    for name in (*_FILES, *_OTHERS):
        _narrow(state / name)
    for name in _FOLDERS:
        for folder, _, files in os.walk(state / name):
            _narrow(Path(folder))
            for file in files:
                _narrow(Path(folder) / file)


def _narrow(path: Path) -> None:
    """Takes away what others may do; never follows a link, never gives anything."""
    if path.exists() and not path.is_symlink() and path.stat().st_mode & 0o077:
        path.chmod(path.stat().st_mode & 0o700)
