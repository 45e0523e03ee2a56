"""HTTP to the coordinator: every request is tried again until it succeeds, is refused for good, or patience ends.

Nothing here knows what a round is. `transport=`, `clock`, `sleep` and `random` are arguments, so that a test runs the same
code against a function or against the coordinator in its own process.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from edge_client.progress import Progress, Say, say
from lamina.bundles.bundle import hash_file
from lamina.bundles.signing import parse_signature
from lamina.digests import CONTENT_DIGEST, content_digest, written
from lamina.encoding.compression import Compression
from lamina.errors import (
    HashMismatchError,
    ProtocolError,
    StoreError,
    UnknownNameError,
    UnreachableError,
)
from lamina.files import raise_if_full
from lamina.net.connection import (
    MAX_ANSWER_BYTES,
    Answer,
    Connection,
    bearer,
    content_length,
    httpx,
    is_cut,
    parsed,
    parsed_one_of,
    path_of,
    refusal,
    refuse_compressed,
)
from lamina.printable import printable
from lamina.wire import (
    CHECK_IN_ANSWER,
    REPORT_HEADER,
    Accepted,
    Assignment,
    CardWanted,
    CheckIn,
    Enrolled,
    Enrolment,
    Evaluation,
    Refused,
    Signature,
    TrainReport,
    Wait,
)

T = TypeVar("T")
_BUSY = (429, 502, 503, 504, 507)
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_PIECE_BYTES = 1 << 18
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 3600.0
"""Of a wait, whatever the coordinator asks for."""
_RATE_SECONDS, _LEAST_RATE_BYTES = 30.0, 15_000
"""A download that brings fewer bytes in so long does not go on: it is begun again where it stopped."""
_PROGRESS_BYTES = 4096
"""So many new bytes of a download are a success, after which patience begins anew."""
_DAMAGED_TRIES = 4
_MALFORMED_TRIES = 5
_UNCLEAR_TRIES = 4


class _BusyError(Exception):
    """The coordinator, or a proxy before it, asks to come back later."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer


class _DamagedError(Exception):
    """The coordinator got other bytes than were sent, as its refusal says."""

    def __init__(self, refusal: HashMismatchError) -> None:
        super().__init__("what arrived there was damaged on its way")
        self.refusal = refusal


_Trouble = httpx.TransportError | _BusyError | _DamagedError | ProtocolError


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
        self._connection = Connection(url, transport=transport, clock=clock)
        self.url = self._connection.url
        self.token = token
        self.bytes_down = 0
        self.bytes_up = 0
        self._patience_seconds = patience_seconds
        self._say, self.clock, self.sleep, self.uniform = say, clock, sleep, uniform

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    def enrol(self, enrolment: Enrolment, enrolment_token: str) -> Enrolled:
        answer = self._send("enrolment", "POST", "/v1/devices", enrolment.to_json(), token=enrolment_token)
        return parsed(Enrolled, answer)

    def check_in(self, message: CheckIn) -> Assignment | Wait | Refused | CardWanted:
        return parsed_one_of(CHECK_IN_ANSWER, self._send("check-in", "POST", "/v1/check-in", message.to_json()))

    def put_card(self, card: bytes) -> None:
        """The data card that a check-in named by its hash, as JSON."""
        self._send("data card", "PUT", "/v1/data-card", card)

    def wait(self, answer: Wait) -> None:
        """Sleeps as the coordinator asks, at random between its two bounds, but neither in a hot loop nor for hours."""
        # Equal bounds would bring a fleet back all at once.
        shortest = min(max(answer.wait_seconds_min, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS / 1.1)
        longest = min(max(answer.wait_seconds_max, 1.1 * shortest), _LONGEST_PAUSE_SECONDS)
        self.sleep(self.uniform(shortest, longest))

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
        path = path_of("v1", "runs", run, "stages", stage, "rounds", round, "update")
        return parsed(Accepted, self._send("upload of the update", "PUT", path, body, headers))

    def put_evaluation(self, run: str, stage: int, round: int, evaluation: Evaluation) -> Accepted:
        path = path_of("v1", "runs", run, "stages", stage, "rounds", round, "evaluation")
        return parsed(Accepted, self._send("upload of the evaluation", "PUT", path, evaluation.to_json()))

    def signature(self, digest: str) -> Signature | None:
        """The signature of a manifest, not verified; None if the coordinator has none, or is older than signatures.

        Raises SignatureError for an answer that is no signature.
        """
        try:
            answer = self._send("signature", "GET", path_of("v1", "manifests", digest, "signature"), b"")
        except UnknownNameError:
            return None
        return parse_signature(answer.content, f"the signature from {self.url}")

    def download(self, digest: str, target: Path, max_bytes: int | None = None) -> None:
        """Appends to `target` what is still missing of a blob; a cut connection resumes where it was cut.

        The content is not verified here. Raises HashMismatchError as soon as a blob exceeds `max_bytes`, ProtocolError for an
        answer that is none to this question.
        """
        self._retry(f"blob {digest[:12]}", lambda patience: self._download_once(digest, target, max_bytes, patience))

    def _download_once(self, digest: str, target: Path, max_bytes: int | None, patience: "_Patience") -> None:
        have = target.stat().st_size if target.exists() else 0
        headers = bearer(self.token)
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": f'"{digest}"'}
        with self._connection.open("GET", path_of("v1", "blobs", digest), None, headers) as response:
            status, question = response.status_code, f"blob {digest}"
            is_complete = status == 416 and response.headers.get("Content-Range") == f"bytes */{have}"
            if status in (200, 206):
                start = self._first_byte(response, have, question)
                length = content_length(response, question)
                total = None if length is None else start + length
                if max_bytes is not None and (total or 0) > max_bytes:
                    raise _too_long(digest, max_bytes)
                refuse_compressed(response, question)
                try:
                    with target.open("ab" if start else "wb") as file:
                        for piece in self._flowing(response, start, total, digest, patience):
                            if max_bytes is not None and file.tell() + len(piece) > max_bytes:
                                raise _too_long(digest, max_bytes)
                            file.write(piece)
                            file.flush()
                except OSError as error:
                    raise_if_full(error, target)
                    raise
                return
            answer = self._connection.read(response)
        self._count_down(len(answer.content))
        if not (status == 416 and have):
            self._check(answer)
            raise ProtocolError(f"{question} was answered with status {status}, which has no blob")
        if not is_complete:  # the file is longer than the blob
            target.unlink()
            self._download_once(digest, target, max_bytes, patience)

    def _first_byte(self, response: httpx.Response, have: int, question: str) -> int:
        """Where in the blob the body of an answer begins."""
        if response.status_code == 200:
            return 0
        there = response.headers.get("Content-Range", "")
        if not have or not there.startswith(f"bytes {have}-"):
            raise ProtocolError(f"{question}: asked for the bytes from {have}, the coordinator sent {printable(there)!r}")
        return have

    def _flowing(
        self, response: httpx.Response, start: int, total: int | None, digest: str, patience: "_Patience"
    ) -> Iterator[bytes]:
        """The pieces of a body as they come. Raises httpx.TransportError for one that drips, or that ends too soon."""
        progress = Progress(self._say, f"blob {digest[:12]}, bytes", total or 0, self.clock)
        have = since_success = window_bytes = 0
        window_ends = self.clock() + _RATE_SECONDS
        for piece in response.iter_raw():  # as they come: a fixed size would hold back, and lose, the last
            self._count_down(len(piece))
            have, since_success, window_bytes = have + len(piece), since_success + len(piece), window_bytes + len(piece)
            yield piece
            progress.at(start + have)
            if since_success >= _PROGRESS_BYTES:
                patience.reset()
                since_success = 0
            if self.clock() >= window_ends:
                if window_bytes < _LEAST_RATE_BYTES and start + have != total:
                    raise httpx.ReadTimeout(f"only {window_bytes} bytes came in {_RATE_SECONDS:.0f} s")
                window_bytes, window_ends = 0, self.clock() + _RATE_SECONDS
        if total is not None and start + have < total:
            raise httpx.RemoteProtocolError(f"the connection was cut at byte {start + have} of {total}")

    def _send(
        self,
        what: str,
        method: str,
        path: str,
        body: bytes | Path,
        headers: dict[str, str] | None = None,
        token: str | None = None,
        most_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        if isinstance(body, Path):
            digest, length = written(hash_file(body)), body.stat().st_size
        else:
            digest, length = content_digest(body), len(body)
        everything = {
            **bearer(self.token if token is None else token),
            "Content-Type": "application/json",
            "Content-Length": str(length),
            CONTENT_DIGEST: digest,
            **(headers or {}),
        }

        def attempt(patience: "_Patience") -> Answer:
            self.bytes_up += length
            # A file is opened anew for each attempt.
            content = _pieces(body) if isinstance(body, Path) else body
            answer = self._connection.ask(method, path, content, everything, most_bytes)
            self._count_down(len(answer.content))
            self._check(answer)
            return answer

        return self._retry(what, attempt)

    def _retry(self, what: str, attempt: Callable[["_Patience"], T]) -> T:
        """Tries until it succeeds. Trouble that would be the same the next time ends it earlier than patience does."""
        where = self.url + self._connection.way
        patience = _Patience(what, where, self._patience_seconds, self._say, self.clock, self.sleep, self.uniform)
        damaged = malformed = unclear = 0
        while True:
            try:
                return attempt(patience)
            except _DamagedError as error:
                damaged += 1
                if damaged == _DAMAGED_TRIES:
                    raise HashMismatchError(
                        f"{what}: it was damaged on its way to {where} {damaged} times ({error.refusal.message}); something "
                        "between alters it. Run the same command again: what was to be sent is kept"
                    ) from error
                patience.wait(error)
            except ProtocolError as error:
                # What one side does not understand may be what a bad network made of it; a refusal that has a code is clear.
                unclear += 1
                if type(error) is not ProtocolError or unclear == _UNCLEAR_TRIES:
                    raise
                patience.wait(error)
            except (httpx.TransportError, _BusyError) as error:
                if isinstance(error, httpx.TransportError) and not is_cut(error):
                    malformed += 1
                    if malformed == _MALFORMED_TRIES:
                        raise ProtocolError(
                            f"{what}: what {where} answers is no HTTP ({printable(str(error))}); is this the address of a "
                            f"lamina coordinator, and does it speak {self.url.partition(':')[0]}?"
                        ) from error
                patience.wait(error)

    def _check(self, answer: Answer) -> None:
        """Raises what a refusal means; does nothing for a success."""
        if answer.is_success:
            return
        if answer.status in _BUSY:
            raise _BusyError(answer)
        error = refusal(answer)
        if isinstance(error, HashMismatchError):
            raise _DamagedError(error)
        raise error

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

    def wait(self, error: _Trouble) -> None:
        """Returns when it is time for the next attempt. Raises what the last attempt means when there is no time left."""
        reason = printable(f"{error}" or type(error).__name__)
        longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**self._failures)
        self._failures += 1
        pause = self._uniform(0, longest)
        if isinstance(error, _BusyError):
            pause = max(pause, _retry_after_seconds(error.answer))
        left = self._deadline - self._clock()
        if pause >= left:
            if isinstance(error, _BusyError) and isinstance(meant := refusal(error.answer), StoreError):
                raise meant
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


def _retry_after_seconds(answer: Answer) -> float:
    value = answer.headers.get("Retry-After", "")
    return min(float(value), 10 * _LONGEST_WAIT_SECONDS) if value.isascii() and value.isdecimal() else 0.0


def _too_long(digest: str, max_bytes: int) -> HashMismatchError:
    return HashMismatchError(f"blob {digest} is longer than the {max_bytes} bytes it may have")
