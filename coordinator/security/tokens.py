"""Tokens: one to enrol devices, one for the admin, one for each device.

The first two are files that only the coordinator's user may read, made at the first start. Of a device's token only the
sha256 is stored. Tokens are 256 random bits, so a plain hash cannot be searched; no token is ever logged or quoted.
"""

import hmac
import secrets
from hashlib import sha256
from pathlib import Path

from sqlalchemy import select

from coordinator.settings import Settings
from coordinator.store.database import Database
from coordinator.store.tables import DeviceRow
from lamina.errors import ConfigError, NotEnrolledError
from lamina.files import PRIVATE, write_durably

ADMIN = "admin"


class Tokens:
    """Says who is asking."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._enrolment = load_or_create(settings.enrolment_token)
        self._admin = load_or_create(settings.admin_token)
        self._settings = settings
        self._database = database

    def require_enrolment(self, header: str | None) -> bool:
        """Whether the newcomer is trusted: it showed the admin token in place of the enrolment token."""
        token = _bearer(header)
        if self._is_admin(token):
            return True
        if not hmac.compare_digest(token.encode(), self._enrolment.encode()):
            raise NotEnrolledError(
                f"this is not the enrolment token; ask whoever runs the coordinator for {self._settings.enrolment_token.name}"
            )
        return False

    def require_admin(self, header: str | None) -> None:
        if not self._is_admin(_bearer(header)):
            raise NotEnrolledError(f"this needs the admin token; it stands in {self._settings.admin_token.name}")

    def require_device(self, header: str | None) -> str:
        """The id of the device whose token this is."""
        digest = hash_token(_bearer(header))
        with self._database.read() as session:
            found = session.execute(
                select(DeviceRow.id, DeviceRow.token_sha256).where(
                    DeviceRow.token_sha256 == digest, DeviceRow.removed_name.is_(None)
                )
            ).one_or_none()
        if found is None or not hmac.compare_digest(found.token_sha256, digest):
            raise NotEnrolledError("no device has this token; join the coordinator again with its enrolment token")
        return str(found.id)

    def require_any(self, header: str | None) -> None:
        """The admin's token or that of any device."""
        if not self._is_admin(_bearer(header)):
            self.require_device(header)

    def _is_admin(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._admin.encode())


def new_token() -> str:
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def load_or_create(path: Path) -> str:
    """The token in a file; a new one with mode 0600 if the file does not exist. Raises ConfigError if it is too short."""
    if not path.exists():
        write_durably(path, f"{new_token()}\n".encode(), PRIVATE)
    token = path.read_text().strip()
    if len(token) < 16:
        raise ConfigError(f"{path} holds no token of at least 16 characters; delete it and a new one is made at the next start")
    return token


def _bearer(header: str | None) -> str:
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NotEnrolledError("the request has no `Authorization: Bearer <token>`; join the coordinator first")
    return token.strip()
