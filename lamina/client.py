"""What a user's commands say to a coordinator: publish a bundle, read the status. The device's client is `edge_client`.

Every refusal becomes the error of `lamina.errors` whose code stands in the problem document.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from lamina.bundles.bundle import blob_path, manifest_bytes, read_signature
from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import join_files
from lamina.errors import ConfigError, HashMismatchError, ProtocolError, UnknownNameError, UnreachableError
from lamina.files import move_durably, raise_if_full, write_durably
from lamina.net.connection import (
    MAX_ANSWER_BYTES,
    Answer,
    Body,
    Connection,
    bearer,
    content_length,
    httpx,
    is_token,
    parsed,
    path_of,
    refusal,
    refuse_compressed,
)
from lamina.printable import printable
from lamina.record import Record, explain
from lamina.wire import (
    SIGNATURE_HEADER,
    DeviceList,
    Enrolments,
    History,
    HistoryEntry,
    NewName,
    Published,
    RunCommand,
    RunList,
    RunStatus,
)

TOKEN_VARIABLE = "LAMINA_TOKEN"
_PIECE_BYTES = 1 << 20
MOST_STATUS_BYTES = 64 << 20
"""A run of thousands of rounds with hundreds of devices."""
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


def read_token(path: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The token in a file, or in the variable LAMINA_TOKEN. Never an argument: those stand in the process list.

    Raises ConfigError if there is neither, or what is there can be no token; it is not quoted.
    """
    if path is None:
        token, source = environment.get(TOKEN_VARIABLE, "").strip(), f"the environment variable {TOKEN_VARIABLE}"
        if not token:
            raise ConfigError(f"no token: give --token-file, or set the environment variable {TOKEN_VARIABLE}")
    else:
        source = f"token file {path}"
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{source} is no text") from None
        if not token:
            raise ConfigError(f"{source} is empty")
    if not is_token(token):
        raise ConfigError(f"{source} holds no token: it has a space, a line break or a letter beyond ASCII, or is too long")
    return token


class RunView(Record):
    """What a user sees of a run."""

    status: RunStatus
    devices: DeviceList | None = None


class Client:
    """A connection to one coordinator, as the admin or with a device's token for the status."""

    def __init__(self, url: str, token: str, transport: httpx.BaseTransport | None = None) -> None:
        """`transport` takes the place of the network in tests. Raises ConfigError for a URL or a token that is none."""
        self._token = bearer(token)
        # Publishing waits for the coordinator's disk, which may be slow; connecting should not be.
        self._connection = Connection(url, read_seconds=120.0, transport=transport)

    def publish(self, folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] = lambda count: None) -> Published:
        """Sends the blobs of a verified bundle that the coordinator lacks, then its manifest with the signature, if it has one.

        `on_bytes` is called with the number of bytes that were sent, or that need not be sent.
        """
        return self._publish("/v1/runs", folder, manifest.blobs, on_bytes)

    def has_blob(self, digest: str) -> bool:
        answer = self._ask("HEAD", path_of("v1", "blobs", digest))
        if answer.status == 404:
            return False
        if not answer.is_success:  # an answer to HEAD has no body that says why; the same question as GET has one
            self._send("GET", path_of("v1", "blobs", digest), headers={"Range": "bytes=0-0"})
        return True

    def put_blob(self, digest: str, path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        headers = {"Content-Length": str(path.stat().st_size)}
        self._send("PUT", path_of("v1", "blobs", digest), _pieces(path, on_bytes), headers)

    def runs(self) -> RunList:
        return parsed(RunList, self._send("GET", "/v1/runs"))

    def run(self, run: str) -> RunStatus:
        return parsed(RunStatus, self._send("GET", path_of("v1", "runs", run), most_bytes=MOST_STATUS_BYTES))

    def view(self, run: str) -> RunView:
        """A run with its devices; without them where the coordinator is older than this command."""
        status = self.run(run)
        try:
            return RunView(status=status, devices=parsed(DeviceList, self._send("GET", path_of("v1", "runs", run, "devices"))))
        except UnknownNameError:
            return RunView(status=status)

    def command(self, run: str, command: RunCommand) -> HistoryEntry:
        """Says what is to become of a run (`coordinator.rounds.operating`)."""
        return parsed(HistoryEntry, self._send("POST", path_of("v1", "runs", run, "commands"), command.to_json()))

    def history(self, run: str | None = None) -> History:
        """The newest rows, of one run or of everything."""
        path = path_of("v1", "history") if run is None else path_of("v1", "runs", run, "history")
        return parsed(History, self._send("GET", path, most_bytes=MOST_STATUS_BYTES))

    def devices(self) -> Enrolments:
        return parsed(Enrolments, self._send("GET", path_of("v1", "devices"), most_bytes=MOST_STATUS_BYTES))

    def remove_device(self, name: str) -> HistoryEntry:
        return parsed(HistoryEntry, self._send("POST", path_of("v1", "devices", name, "removal")))

    def rename_device(self, name: str, new_name: str) -> HistoryEntry:
        try:
            new = NewName(name=new_name)
        except ValidationError as error:
            raise ConfigError(f"{printable(new_name)!r} is no device name: {explain(error)}") from error
        return parsed(HistoryEntry, self._send("POST", path_of("v1", "devices", name, "name"), new.to_json()))

    def save_blob(self, digest: str, path: Path) -> None:
        """Writes the bytes of a blob to a file, which is there whole or not at all.

        Raises HashMismatchError if they are not those of its address, DiskFullError.
        """
        partial, actual = path.with_name(path.name + ".partial"), sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for piece in self._blob(digest):
                    actual.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if actual.hexdigest() != digest:
                raise HashMismatchError(
                    f"blob {digest} came with sha256 {actual.hexdigest()}; try again, or look at the coordinator's disk"
                )
            move_durably(partial, path)
        except OSError as error:
            raise_if_full(error, path)
            raise
        finally:
            partial.unlink(missing_ok=True)

    def pull_weights(self, status: RunStatus, folder: Path) -> None:
        """Writes the newest weights of a run as `<segment>.safetensors` files: what was trained, and what never is.

        Raises ProtocolError for a segment whose name can be no file's.
        """
        for segment in status.weights:
            if not _SEGMENT.fullmatch(segment):
                raise ProtocolError(f"the coordinator names a segment {printable(segment)!r}, which can be none")
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".pull-", dir=folder) as scratch:
            described = Path(scratch) / "manifest.json"
            self.save_blob(status.manifest, described)
            frozen = Manifest.from_file(described).frozen_tensors
            for segment, digest in status.weights.items():
                path = folder / f"{segment}.safetensors"
                if segment not in frozen:
                    self.save_blob(digest, path)
                    continue
                parts = [Path(scratch) / "trained", Path(scratch) / "frozen"]
                for part, each in zip(parts, (digest, frozen[segment]), strict=True):
                    self.save_blob(each, part)
                write_durably(path, join_files(part.read_bytes() for part in parts))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _publish(self, path: str, folder: Path, blobs: Mapping[str, int], on_bytes: Callable[[int], None]) -> Published:
        """Blobs (address -> size in bytes), then the manifest, to the runs of one kind."""
        for digest, size in blobs.items():
            if self.has_blob(digest):
                on_bytes(size)
            else:
                self.put_blob(digest, blob_path(folder, digest), on_bytes)
        # The file's own bytes, not the record's: they are what was signed.
        signature = read_signature(folder)
        headers = {SIGNATURE_HEADER: signature.model_dump_json()} if signature else None
        return parsed(Published, self._send("POST", path, manifest_bytes(folder), headers))

    def _send(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        most_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        answer = self._ask(method, path, body, headers, most_bytes)
        if not answer.is_success:
            raise refusal(answer)
        return answer

    def _ask(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        most_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        """The answer, whatever it is."""
        try:
            return self._connection.ask(method, path, body, self._token | dict(headers or {}), most_bytes)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _blob(self, digest: str) -> Iterator[bytes]:
        """The bytes of a blob as they come."""
        path = path_of("v1", "blobs", digest)
        try:
            with self._connection.open("GET", path, None, self._token) as response:
                if response.status_code != 200:
                    raise refusal(self._connection.read(response))
                refuse_compressed(response, f"GET {path}")
                content_length(response, f"GET {path}")
                yield from response.iter_raw()
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        why = printable(f"{type(error).__name__}: {error}")
        way_out = "see that the proxy reaches it" if self._connection.way else "see that it runs and that the address is right"
        return UnreachableError(
            f"the coordinator at {self._connection.url} does not answer{self._connection.way} ({why}); {way_out}"
        )


def _pieces(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
            on_bytes(len(piece))
