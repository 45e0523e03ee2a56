"""What a user's commands say to a coordinator: publish a bundle, read the status. The device's client is `edge_client`.

Every refusal becomes the error of `lamina.errors` whose code stands in the problem document.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import ValidationError

from lamina.bundle import blob_path, manifest_bytes, read_signature
from lamina.errors import ConfigError, HashMismatchError, LaminaError, ProtocolError, UnreachableError, all_errors
from lamina.files import write_durably
from lamina.manifest import Manifest
from lamina.tensors import hash_bytes
from lamina.wire import SIGNATURE_HEADER, Problem, Published, RunList, RunStatus

TOKEN_VARIABLE = "LAMINA_TOKEN"
_PIECE_BYTES = 1 << 20


def read_token(path: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The token in a file, or in the variable LAMINA_TOKEN. Never an argument: those stand in the process list.

    Raises ConfigError if there is neither, or the file is missing or empty.
    """
    if path is None:
        token = environment.get(TOKEN_VARIABLE, "").strip()
        if not token:
            raise ConfigError(f"no token: give --token-file, or set the environment variable {TOKEN_VARIABLE}")
        return token
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from error
    if not token:
        raise ConfigError(f"token file {path} is empty")
    return token


class Client:
    """A connection to one coordinator, as the admin or with a device's token for the status."""

    def __init__(self, url: str, token: str, transport: httpx.BaseTransport | None = None) -> None:
        """`transport` takes the place of the network in tests. Raises ConfigError for a URL that is none."""
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is no URL: {error}") from error
        if base.scheme not in ("http", "https") or not base.host:
            raise ConfigError(f"{url!r} is no address of a coordinator; it looks like http://127.0.0.1:8763")
        self._url = url
        self._http = httpx.Client(
            base_url=base,
            headers={"Authorization": f"Bearer {token}"},
            # Publishing waits for the coordinator's disk, which may be slow; connecting should not be.
            timeout=httpx.Timeout(120.0, connect=10.0),
            transport=transport,
        )

    def publish(self, folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] = lambda count: None) -> Published:
        """Sends the blobs of a verified bundle that the coordinator lacks, then its manifest with the signature, if it has one.

        `on_bytes` is called with the number of bytes that were sent, or that need not be sent.
        """
        return self._publish("/v1/runs", folder, manifest.blobs, on_bytes)

    def has_blob(self, digest: str) -> bool:
        answer = self._ask("HEAD", f"/v1/blobs/{digest}")
        if answer.status_code == 404:
            return False
        if answer.is_error:  # an answer to HEAD has no body that says why; the same question as GET has one
            self._send("GET", f"/v1/blobs/{digest}", headers={"Range": "bytes=0-0"})
        return True

    def put_blob(self, digest: str, path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        headers = {"Content-Length": str(path.stat().st_size)}
        self._send("PUT", f"/v1/blobs/{digest}", content=_pieces(path, on_bytes), headers=headers)

    def runs(self) -> RunList:
        return RunList.from_json(self._send("GET", "/v1/runs").content, "the list of runs")

    def run(self, run: str) -> RunStatus:
        return RunStatus.from_json(self._send("GET", f"/v1/runs/{run}").content, f"the status of {run}")

    def blob(self, digest: str) -> bytes:
        """The bytes of a blob. Raises HashMismatchError if they are not those of its address."""
        data = self._send("GET", f"/v1/blobs/{digest}").content
        if hash_bytes(data) != digest:
            raise HashMismatchError(
                f"blob {digest} came with sha256 {hash_bytes(data)}; try again, or look at the coordinator's disk"
            )
        return data

    def pull_weights(self, status: RunStatus, folder: Path) -> None:
        """Writes the newest weights of a run as `<segment>.safetensors` files."""
        for segment, digest in status.weights.items():
            write_durably(folder / f"{segment}.safetensors", self.blob(digest))

    def close(self) -> None:
        self._http.close()

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
        answer = self._send("POST", path, content=manifest_bytes(folder), headers=headers)
        return Published.from_json(answer.content, "the answer to publishing")

    def _send(
        self,
        method: str,
        path: str,
        content: bytes | Iterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        answer = self._ask(method, path, content, headers)
        if answer.is_error:
            raise error_of(answer)
        return answer

    def _ask(self, method: str, path: str, content: Any = None, headers: dict[str, str] | None = None) -> httpx.Response:
        """The answer, whatever it is."""
        try:
            return self._http.request(method, path, content=content, headers=headers)
        except httpx.TransportError as error:
            raise UnreachableError(
                f"the coordinator at {self._url} does not answer ({type(error).__name__}: {error}); "
                "see that it runs and that the address is right"
            ) from error


def error_of(answer: httpx.Response) -> LaminaError:
    """The error that a refusal stands for; a ProtocolError if it is no problem document, e.g. that of a proxy."""
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:
        return ProtocolError(
            f"{answer.request.method} {answer.request.url} was answered with status {answer.status_code} "
            "and no problem document; is this the address of a lamina coordinator?"
        )
    return all_errors().get(problem.code, ProtocolError)(problem.detail)


def _pieces(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
            on_bytes(len(piece))
