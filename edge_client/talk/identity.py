"""Who this device is: its name, id and token, kept in the state folder, so that a restarted device is the same device."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_urlsafe

from pydantic import ValidationError

from edge_client.talk.transport import Transport
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, NotEnrolledError, ProtocolError
from lamina.files import PRIVATE, write_durably
from lamina.net.connection import is_token
from lamina.record import Record, explain
from lamina.wire import DeviceName, Enrolled, Enrolment

IDENTITY_FILE = "identity.json"
TOKEN_VARIABLE = "LAMINA_TOKEN"


class Identity(Record):
    """`device_id` is empty while nobody knows whether the coordinator has enrolled this device."""

    name: DeviceName
    device_id: str = ""
    device_token: str

    def __repr__(self) -> str:
        return f"Identity(name={self.name!r}, device_id={self.device_id!r}, device_token=***)"

    __str__ = __repr__


def load_or_enrol(folder: Path, name: str, transport: Transport, enrolment_token: Callable[[], str]) -> Identity:
    """The identity in the folder; the first time, one that the coordinator takes for the enrolment token.

    The device's own token is on the disk before the coordinator hears of it. So a lost answer, or a kill at any moment, costs
    nothing: the same command asks again with the same token, and is answered as before.
    Raises ConfigError if the folder belongs to a device of another name, NotEnrolledError for a missing or wrong token.
    """
    path = folder / IDENTITY_FILE
    identity = _read(path) if path.exists() else None
    if identity is not None and identity.device_id:
        if identity.name != name:
            raise ConfigError(
                f"{folder} belongs to device {identity.name!r}, not to {name!r}; "
                f"give each device its own --state folder, or run with --name {identity.name}"
            )
        return identity
    shown = enrolment_token()
    if identity is None or identity.name != name:
        try:
            identity = Identity(name=name, device_token=token_urlsafe(32))
        except ValidationError as error:
            raise ConfigError(f"{name!r} is no device name: {explain(error)}") from error
        write_durably(path, identity.to_json(), PRIVATE)
    enrolled = _enrol(identity, transport, shown)
    token = enrolled.device_token or identity.device_token
    identity = Identity(name=name, device_id=enrolled.device_id, device_token=token)
    write_durably(path, identity.to_json(), PRIVATE)
    return identity


def _enrol(identity: Identity, transport: Transport, enrolment_token: str) -> Enrolled:
    digest = hash_bytes(identity.device_token.encode())
    try:
        return transport.enrol(Enrolment(name=identity.name, token_sha256=digest), enrolment_token)
    except ConfigError as error:
        if "token_sha256" not in error.message:
            raise
    # A coordinator from before devices made their tokens; it makes one, and says it once.
    enrolled = transport.enrol(Enrolment(name=identity.name), enrolment_token)
    if not enrolled.device_token:
        raise ProtocolError(f"{transport.url} enrolled {identity.name!r} without giving it a token; update the coordinator")
    return enrolled


def _read(path: Path) -> Identity:
    """Raises ConfigError, which quotes nothing of the file."""
    try:
        identity = Identity.model_validate_json(path.read_bytes())
        if is_token(identity.device_token):
            return identity
    except ValueError:
        pass
    raise ConfigError(
        f"{path} is not a valid Identity: it was altered. Put back the file as it was; where it is lost, have the operator run "
        "`lamina device remove` with this device's name, delete the file, and join again with an enrolment token"
    )


def read_enrolment_token(token_file: Path | None) -> str:
    """The token from the file, or from LAMINA_TOKEN; never from an argument, which every user of the machine could read."""
    if token_file is not None:
        try:
            token, source = token_file.read_text().strip(), str(token_file)
        except OSError as error:
            raise NotEnrolledError(f"the token file {token_file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise NotEnrolledError(f"{token_file} holds something that is no token: it is no text") from None
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
    if not token:
        raise NotEnrolledError(
            f"this device is not enrolled yet and {source} holds no enrolment token; "
            f"give --token-file FILE or set {TOKEN_VARIABLE} (only needed the first time)"
        )
    if not is_token(token):
        raise NotEnrolledError(
            f"{source} holds something that is no token: a space, a line break, a letter beyond ASCII, or far too much"
        )
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
