"""SQLite as the coordinator uses it: WAL, every commit synced, writers take the lock when they begin.

    with database.write() as session: ...     one transaction; committed at the end, or nothing happened
    with database.read() as session: ...      a consistent view that blocks nobody

Raises DiskFullError and StoreError in place of the driver's exceptions.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from coordinator.store.tables import SCHEMA_VERSION, UPGRADES, Base
from lamina.errors import DiskFullError, StoreError

BUSY_TIMEOUT_MILLISECONDS = 30_000
_FULL_BELOW_BYTES = 64 << 10  # SQLite also reports a full disk as a plain I/O error when it cannot grow its WAL index


class Database:
    """One SQLite file. Safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises StoreError if a newer version of lamina made it."""
        self._path = path
        # SQLite lets one writer in and makes the others poll; a queue in front of it is fair and wastes no time.
        self._writer = threading.Lock()
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False}, max_overflow=-1)
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._readers = self._engine.execution_options(lamina_read=True)
        with self._translated(), self._engine.begin() as connection:
            self._create_or_check(connection)

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._translated(), self._writer, Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._translated(), Session(self._readers) as session:
            yield session

    def close(self) -> None:
        self._engine.dispose()

    def _create_or_check(self, connection: Connection) -> None:
        found = connection.execute(text("PRAGMA user_version")).scalar_one()
        if found == 0:
            Base.metadata.create_all(connection)
        elif found in range(min(UPGRADES), SCHEMA_VERSION):
            for version in range(found, SCHEMA_VERSION):
                for statement in UPGRADES[version]:
                    connection.execute(text(statement))
            Base.metadata.create_all(connection)
        elif found != SCHEMA_VERSION:
            raise StoreError(
                f"{self._path} has schema version {found}, this lamina knows {SCHEMA_VERSION}; "
                "install the lamina that made it, or give another --state folder"
            )
        connection.execute(text(f"PRAGMA user_version = {SCHEMA_VERSION}"))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            if self._is_full(error):
                raise DiskFullError(
                    f"no space left on the disk of {self._path.parent}: free some and try again; nothing was lost"
                ) from error
            raise StoreError(f"the database {self._path} failed: {error.orig}; try again, and see the log") from error

    def _is_full(self, error: DatabaseError) -> bool:
        if getattr(error.orig, "sqlite_errorname", "").startswith("SQLITE_FULL"):
            return True
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize < _FULL_BELOW_BYTES


def _configure(connection: Any, _record: object) -> None:
    # The driver's own habit of beginning transactions late would make two writers deadlock; _begin does it instead.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MILLISECONDS}")


def _begin(connection: Connection) -> None:
    is_read = connection.get_execution_options().get("lamina_read", False)
    connection.exec_driver_sql("BEGIN" if is_read else "BEGIN IMMEDIATE")
