"""HTTP to the coordinator: every request is tried again until it succeeds, is refused for good, or patience ends.

Nothing here knows what a round is. `transport=`, `clock`, `sleep` and `random` are arguments, so that a test runs the same
code against a function or against the coordinator in its own process.
"""

import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import ValidationError

from edge_client.light_imports import hidden
from edge_client.progress import Progress, Say, say
from lamina.bundle import hash_file
from lamina.compression import Compression
from lamina.errors import (
    ConfigError,
    HashMismatchError,
    LaminaError,
    ProtocolError,
    StoreError,
    UnknownNameError,
    UnreachableError,
    all_errors,
)
from lamina.files import raise_if_full
from lamina.record import Record
from lamina.signing import parse_signature
from lamina.wire import (
    CHECK_IN_ANSWER,
    DIGEST_HEADER,
    REPORT_HEADER,
    Accepted,
    Assignment,
    CheckIn,
    Enrolled,
    Enrolment,
    Evaluation,
    Problem,
    Refused,
    Signature,
    TrainReport,
    Wait,
)

with hidden("httpx._main"):  # the command line of httpx: rich, pygments and click
    import httpx

T = TypeVar("T")
_BUSY = (429, 502, 503, 504, 507)
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_PIECE_BYTES = 1 << 18


class _BusyError(Exception):
    """The coordinator, or a proxy before it, asks to come back later."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


class Transport:
    """A connection to one coordinator. `token` goes with every request that does not bring its own.

    `patience_seconds` is how long a request is tried again without any success before UnreachableError.
    `bytes_down` and `bytes_up` count message bodies, repeated ones included.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        patience_seconds: float = 900.0,
        transport: httpx.BaseTransport | None = None,
        say: Say = say,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is no coordinator address: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is no coordinator address; it looks like https://host:8000")
        self.url = url.rstrip("/")
        self.token = token
        self.bytes_down = 0
        self.bytes_up = 0
        self._patience_seconds = patience_seconds
        self._say, self.clock, self.sleep, self.uniform = say, clock, sleep, uniform
        # identity: a blob's length and ranges must be those of the blob, not of a compressed form of it.
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(60.0, connect=10.0),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def enrol(self, enrolment: Enrolment, enrolment_token: str) -> Enrolled:
        response = self._send("enrolment", "POST", "/v1/devices", enrolment.to_json(), token=enrolment_token)
        return _parse(Enrolled, response)

    def check_in(self, message: CheckIn) -> Assignment | Wait | Refused:
        response = self._send("check-in", "POST", "/v1/check-in", message.to_json())
        try:
            return CHECK_IN_ANSWER.validate_json(response.content)
        except ValidationError as error:
            raise ProtocolError(f"the coordinator's answer to a check-in is not understood: {error}") from error

    def put_update(
        self,
        run: str,
        stage: int,
        round: int,
        body: bytes | Path,
        report: TrainReport,
        compression: Compression = "none",
    ) -> Accepted:
        """Sends an update: `body` is what travels, already compressed as `compression` says. A file is read in pieces."""
        headers = {REPORT_HEADER: report.model_dump_json(), "Content-Type": "application/octet-stream"}
        if compression != "none":
            headers["Content-Encoding"] = compression
        path = f"/v1/runs/{run}/stages/{stage}/rounds/{round}/update"
        return _parse(Accepted, self._send("upload of the update", "PUT", path, body, headers))

    def put_evaluation(self, run: str, stage: int, round: int, evaluation: Evaluation) -> Accepted:
        path = f"/v1/runs/{run}/stages/{stage}/rounds/{round}/evaluation"
        return _parse(Accepted, self._send("upload of the evaluation", "PUT", path, evaluation.to_json()))

    def signature(self, digest: str) -> Signature | None:
        """The signature of a manifest, not verified; None if the coordinator has none, or is older than signatures.

        Raises SignatureError for an answer that is no signature.
        """
        try:
            response = self._send("signature", "GET", f"/v1/manifests/{digest}/signature", b"")
        except UnknownNameError:
            return None
        return parse_signature(response.content, f"the signature from {self.url}")

    def download(self, digest: str, target: Path, max_bytes: int | None = None) -> None:
        """Appends to `target` what is still missing of a blob; a cut connection resumes where it was cut.

        The content is not verified here. Raises HashMismatchError as soon as a blob exceeds `max_bytes`.
        """

        def attempt(patience: "_Patience") -> None:
            have = target.stat().st_size if target.exists() else 0
            headers = {"Authorization": f"Bearer {self.token}"}
            if have:
                headers |= {"Range": f"bytes={have}-", "If-Range": f'"{digest}"'}
            with self._http.stream("GET", f"/v1/blobs/{digest}", headers=headers) as response:
                if response.status_code == 416:  # the file is complete, or longer than the blob
                    self._count_down(len(response.read()))
                    if response.headers.get("Content-Range") != f"bytes */{have}":
                        target.unlink()
                        return attempt(patience)
                    return None
                if response.status_code not in (200, 206):
                    response.read()
                    self._check(response)
                if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    raise ProtocolError(
                        f"blob {digest}: asked for the bytes from {have}, the coordinator sent "
                        f"{response.headers.get('Content-Range')!r}"
                    )
                start = have if response.status_code == 206 else 0
                total = start + int(response.headers.get("Content-Length", 0))
                progress = Progress(self._say, f"blob {digest[:12]}, bytes", total, self.clock)
                try:
                    with target.open("ab" if start else "wb") as file:
                        for piece in response.iter_raw():  # as they come: a fixed size would hold back, and lose, the last
                            self._count_down(len(piece))
                            start += len(piece)
                            if max_bytes is not None and start > max_bytes:
                                raise HashMismatchError(f"blob {digest} is longer than the {max_bytes} bytes it may have")
                            file.write(piece)
                            file.flush()
                            patience.reset()
                            progress.at(start)
                    if start < total:
                        raise httpx.RemoteProtocolError(f"the connection was cut at byte {start} of {total}")
                except OSError as error:
                    raise_if_full(error, target)
                    raise
            return None

        self._retry(f"blob {digest[:12]}", attempt)

    def _send(
        self,
        what: str,
        method: str,
        path: str,
        body: bytes | Path,
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> httpx.Response:
        if isinstance(body, Path):
            digest, length = bytes.fromhex(hash_file(body)), body.stat().st_size
        else:
            digest, length = sha256(body).digest(), len(body)
        everything = {
            "Authorization": f"Bearer {self.token if token is None else token}",
            "Content-Type": "application/json",
            "Content-Length": str(length),
            DIGEST_HEADER: f"sha-256=:{b64encode(digest).decode()}:",
            **(headers or {}),
        }

        def attempt(patience: "_Patience") -> httpx.Response:
            self.bytes_up += length
            # A file is opened anew for each attempt.
            content = _pieces(body) if isinstance(body, Path) else body
            response = self._http.request(method, path, content=content, headers=everything)
            self._check(response)
            self._count_down(len(response.content))
            return response

        return self._retry(what, attempt)

    def _retry(self, what: str, attempt: Callable[["_Patience"], T]) -> T:
        patience = _Patience(what, self.url, self._patience_seconds, self._say, self.clock, self.sleep, self.uniform)
        while True:
            try:
                return attempt(patience)
            except (httpx.TransportError, _BusyError) as error:
                patience.wait(error)

    def _check(self, response: httpx.Response) -> None:
        """Raises what a refusal means; does nothing for a success."""
        if response.is_success:
            return
        self._count_down(len(response.content))
        if response.status_code in _BUSY:
            raise _BusyError(response)
        raise _refusal(response)

    def _count_down(self, count: int) -> None:
        self.bytes_down += count


class _Patience:
    """Waits between attempts: exponential with full jitter, so that a fleet does not come back all at once."""

    def __init__(
        self,
        what: str,
        url: str,
        seconds: float,
        say: Say,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        uniform: Callable[[float, float], float],
    ) -> None:
        self._what, self._url, self._seconds, self._say = what, url, seconds, say
        self._clock, self._sleep, self._uniform = clock, sleep, uniform
        self.reset()

    def reset(self) -> None:
        """Something got through: begin anew with short waits and the whole deadline."""
        self._failures = 0
        self._deadline = self._clock() + self._seconds

    def wait(self, error: httpx.TransportError | _BusyError) -> None:
        """Returns when it is time for the next attempt. Raises what the last attempt means when there is no time left."""
        reason = f"{error}" or type(error).__name__
        longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**self._failures)
        self._failures += 1
        pause = self._uniform(0, longest)
        if isinstance(error, _BusyError):
            pause = max(pause, _retry_after_seconds(error.response))
        left = self._deadline - self._clock()
        if pause >= left:
            if isinstance(error, _BusyError) and isinstance(refusal := _refusal(error.response), StoreError):
                raise refusal
            raise UnreachableError(
                f"{self._what}: {self._url} did not answer for {self._seconds:.0f} s ({reason}); "
                f"check the address and the network, then run the same command again: nothing is lost"
            ) from error
        self._say(f"{self._what}: {self._url} does not answer ({reason}); next try in {pause:.1f} s, giving up in {left:.0f} s")
        self._sleep(pause)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _retry_after_seconds(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), 10 * _LONGEST_WAIT_SECONDS) if value.isdecimal() else 0.0


def _refusal(response: httpx.Response) -> LaminaError:
    """The error that a problem document names; ProtocolError for an answer that is none."""
    request = response.request
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        text = response.content[:200].decode(errors="replace")
        return ProtocolError(f"{request.method} {request.url} was answered with status {response.status_code}: {text}")
    return all_errors().get(problem.code, ProtocolError)(problem.detail or problem.title)


Message = TypeVar("Message", bound=Record)


def _parse(kind: type[Message], response: httpx.Response) -> Message:
    try:
        return kind.from_json(response.content, f"the answer to {response.request.method} {response.request.url}")
    except ConfigError as error:
        raise ProtocolError(error.message) from error
