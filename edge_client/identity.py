"""Who this device is: its name, id and token, kept in the state folder, so that a restarted device is the same device."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from edge_client.transport import Transport
from lamina.errors import ConfigError, NotEnrolledError
from lamina.files import PRIVATE, write_durably
from lamina.record import Record, explain
from lamina.wire import DeviceName, Enrolment

IDENTITY_FILE = "identity.json"
TOKEN_VARIABLE = "LAMINA_TOKEN"


class Identity(Record):
    name: DeviceName
    device_id: str
    device_token: str

    def __repr__(self) -> str:
        return f"Identity(name={self.name!r}, device_id={self.device_id!r}, device_token=***)"

    __str__ = __repr__


def load_or_enrol(folder: Path, name: str, transport: Transport, enrolment_token: Callable[[], str]) -> Identity:
    """The identity in the folder; the first time, one that the coordinator gives for the enrolment token.

    Raises ConfigError if the folder belongs to a device of another name, NotEnrolledError for a missing or wrong token.
    """
    path = folder / IDENTITY_FILE
    if path.exists():
        identity = Identity.from_file(path)
        if identity.name != name:
            raise ConfigError(
                f"{folder} belongs to device {identity.name!r}, not to {name!r}; "
                f"give each device its own --state folder, or run with --name {identity.name}"
            )
        return identity
    try:
        enrolment = Enrolment(name=name)
    except ValidationError as error:
        raise ConfigError(f"{name!r} is no device name: {explain(error)}") from error
    enrolled = transport.enrol(enrolment, enrolment_token())
    identity = Identity(name=name, device_id=enrolled.device_id, device_token=enrolled.device_token)
    write_durably(path, identity.to_json(), PRIVATE)
    return identity


def read_enrolment_token(token_file: Path | None) -> str:
    """The token from the file, or from LAMINA_TOKEN; never from an argument, which every user of the machine could read."""
    if token_file is not None:
        try:
            token, source = token_file.read_text().strip(), str(token_file)
        except OSError as error:
            raise NotEnrolledError(f"the token file {token_file} cannot be read: {error.strerror}") from error
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
    if not token:
        raise NotEnrolledError(
            f"this device is not enrolled yet and {source} holds no enrolment token; "
            f"give --token-file FILE or set {TOKEN_VARIABLE} (only needed the first time)"
        )
    if not (token.isascii() and token.isprintable()):
        raise NotEnrolledError(f"{source} holds something that is no token: characters beyond printable ASCII")
    return token


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the state folder. The lock ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process uses {folder}; give each device its own --state folder") from error
        yield
