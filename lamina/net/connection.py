"""HTTP to one coordinator, which is not believed: the one way in which devices and users' commands speak to it.

An answer is read piece by piece, never beyond a bound of bytes and of time, never decompressed, and never followed to another
place: a request carries a token. What is in it is parsed once (`parsed`, `refusal`) before anything acts on it.
"""

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from lamina.digests import CONTENT_DIGEST, REQUEST_DIGEST, content_digest, request_digest
from lamina.errors import ConfigError, LaminaError, ProtocolError, TlsError, all_errors
from lamina.light_imports import hidden
from lamina.net.address import coordinator_address, proxy_of, tls_context
from lamina.net.deadlines import BoundedBackend, BoundedStream
from lamina.printable import printable
from lamina.record import Record, explain
from lamina.wire import Problem

with hidden("httpx._main"):  # the command line of httpx: rich, pygments and click
    import httpx as httpx

MAX_ANSWER_BYTES = 1 << 19
"""Of every answer but blobs, manifests and the status of a run."""
_ANSWER_SECONDS = 60.0
_DETAIL_CHARACTERS = 1000
_SPEAKS_HTTP = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
_CUT = ("Server disconnected", "peer closed", "peer unexpectedly closed", "the connection was cut")

Body = bytes | Iterable[bytes]
Message = TypeVar("Message", bound=Record)
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A whole answer. `question` is the method and the address that were asked, `way` the proxy between, if there is one."""

    question: str
    way: str
    status: int
    headers: httpx.Headers
    content: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class Connection:
    """`url` is the coordinator's address without a slash at its end."""

    def __init__(
        self,
        url: str,
        *,
        read_seconds: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read_seconds` is the longest silence within an answer. Raises ConfigError for an address or a proxy that is none."""
        self.url = coordinator_address(url)
        proxy = proxy_of(self.url) if transport is None else None
        self._is_proxy_secure = proxy is not None and proxy.url.startswith("https:")
        self.way = f" through the proxy {proxy}" if proxy else ""
        self._clock = clock
        context: ssl.SSLContext | None = None
        if transport is None and (self.url.startswith("https:") or self._is_proxy_secure):
            context = tls_context()
        self._http = httpx.Client(
            base_url=self.url,
            # identity: a blob's length and ranges must be those of the blob, not of a compressed form of it.
            headers={"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(read_seconds, connect=10.0),
            transport=transport or _bounded(context, httpx.Proxy(proxy.url, ssl_context=context) if proxy else None, clock),
            trust_env=False,
            follow_redirects=False,
        )

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def open(self, method: str, path: str, body: Body | None, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The answer with its body unread.

        The request brings digests of its head and, where that is known beforehand, of its body (`lamina.digests`).
        Raises httpx.TransportError for trouble that may pass; TlsError or ProtocolError for what never does.
        """
        sent = dict(headers)
        if isinstance(body, bytes):
            sent.setdefault(CONTENT_DIGEST, content_digest(body))
        sent[REQUEST_DIGEST] = request_digest(method, path, sent)
        try:
            with self._http.stream(method, path, content=body, headers=sent) as response:
                stream = response.extensions.get("network_stream")
                if isinstance(stream, BoundedStream):
                    stream.head_came()
                yield response
        except httpx.InvalidURL as error:  # httpx looks at where a redirection leads, though nobody follows it
            raise ProtocolError(f"{method} {self.url}{printable(path)} is redirected to what is no address") from error
        except httpx.LocalProtocolError as error:  # its text quotes the header, which may hold a token
            raise ProtocolError(
                f"{method} {self.url}{printable(path)} cannot be sent: it has a header that HTTP forbids"
            ) from error
        except httpx.ConnectError as error:
            self._raise_if_lasting(error)
            raise

    def ask(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        most_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        """The whole answer, whatever it says. Raises as `open`, and ProtocolError for one that is too long or compressed."""
        with self.open(method, path, body, headers or {}) as response:
            return self.read(response, most_bytes)

    def read(self, response: httpx.Response, most_bytes: int = MAX_ANSWER_BYTES) -> Answer:
        """The rest of an opened answer. Raises httpx.ReadTimeout for one that drips, ProtocolError for one that was damaged."""
        question = f"{response.request.method} {self.url}{printable(response.request.url.path)}"
        refuse_compressed(response, question)
        too_long = ProtocolError(f"the answer to {question}{self.way} is longer than the {most_bytes} bytes that it may have")
        if (content_length(response, question) or 0) > most_bytes:
            raise too_long
        content, end = bytearray(), self._clock() + _ANSWER_SECONDS
        for piece in response.iter_bytes():
            if len(content) + len(piece) > most_bytes:
                raise too_long
            content += piece
            if self._clock() > end:
                raise httpx.ReadTimeout(f"the answer did not end within {_ANSWER_SECONDS:.0f} s")
        if response.headers.get(CONTENT_DIGEST, digest := content_digest(content)) != digest:
            raise ProtocolError(
                f"the answer to {question}{self.way} was damaged on its way: it has another digest than it says"
            )
        return Answer(question, self.way, response.status_code, response.headers, bytes(content))

    def _raise_if_lasting(self, error: httpx.ConnectError) -> None:
        """Raises what a handshake means that will never succeed."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError):
            return
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise TlsError(
                f"the certificate that {self.url}{self.way} shows does not pass: {cause.verify_message}. Look at the address "
                "and at this machine's clock; where an authority of your own signed the coordinator's certificate, name that "
                "authority's file in the variable SSL_CERT_FILE"
            ) from error
        if cause.reason in _SPEAKS_HTTP and not self._is_proxy_secure:
            address = self.url.replace("https:", "http:", 1)
            raise TlsError(f"the coordinator at {self.url}{self.way} speaks http, not https: use {address}") from error
        raise TlsError(f"no secure connection to {self.url}{self.way} comes about: {printable(str(cause))}") from error


def _bounded(context: ssl.SSLContext | None, proxy: httpx.Proxy | None, clock: Callable[[], float]) -> httpx.HTTPTransport:
    """The network, with streams that end whatever the peer does."""
    transport = httpx.HTTPTransport(verify=context or False, trust_env=False, proxy=proxy)
    transport._pool._network_backend = BoundedBackend(clock)  # httpx has no option for it
    return transport


def path_of(*parts: str | int) -> str:
    """A path in which no part can reach out of its place: `/v1/runs/run-1`."""
    if any(str(part) in ("", ".", "..") for part in parts):
        raise ProtocolError(f"{printable(repr(parts))} cannot stand in an address")
    return "/" + "/".join(quote(str(part), safe="") for part in parts)


def is_cut(error: httpx.TransportError) -> bool:
    """Whether the peer went away, rather than say something that is no HTTP."""
    return not isinstance(error, httpx.RemoteProtocolError) or str(error).startswith(_CUT)


def refuse_compressed(response: httpx.Response, question: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ProtocolError(f"the answer to {question} is compressed ({printable(encoding, 40)}), which nobody asked for")


def content_length(response: httpx.Response, question: str) -> int | None:
    """Bytes of the body as the header says; None if it does not say."""
    text = response.headers.get("Content-Length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ProtocolError(f"the answer to {question} has a Content-Length of {printable(text, 40)}, which is no length")
    return int(text)


def parsed(kind: type[Message], answer: Answer) -> Message:
    """The message in an answer. Raises ProtocolError for one that is not understood."""
    return _understood(kind.model_validate_json, answer)


def parsed_one_of(kinds: TypeAdapter[T], answer: Answer) -> T:
    return _understood(kinds.validate_json, answer)


def _understood(parse: Callable[[bytes], T], answer: Answer) -> T:
    try:
        return parse(answer.content)
    except ValidationError as error:
        why = printable(explain(error), _DETAIL_CHARACTERS)
    except (ValueError, RecursionError) as error:
        why = printable(str(error))
    raise ProtocolError(f"the answer to {answer.question}{answer.way} is not understood: {why}")


def refusal(answer: Answer) -> LaminaError:
    """The error that a problem document names; ProtocolError for an answer that is none, such as that of a proxy."""
    if 300 <= answer.status < 400:
        target = printable(answer.headers.get("Location", "nowhere"))
        return ProtocolError(
            f"{answer.question}{answer.way} is redirected to {target}, and a request with a token follows nobody; if that is "
            "the coordinator, use its address"
        )
    try:
        problem = Problem.model_validate_json(answer.content)
    except (ValueError, RecursionError):
        text = printable(answer.content[:200].decode(errors="replace"))
        return ProtocolError(
            f"{answer.question}{answer.way} was answered with status {answer.status}: {text} (which is no problem document; "
            "is this the address of a lamina coordinator?)"
        )
    detail = printable(problem.detail or problem.title, _DETAIL_CHARACTERS, keeps_lines=True)
    return all_errors().get(problem.code, ProtocolError)(detail)


def is_token(text: str) -> bool:
    """Whether this can be a token: it travels in a header, where a line break or a letter beyond ASCII has no place."""
    return 0 < len(text) <= 1000 and text.isascii() and text.isprintable() and " " not in text


def bearer(token: str) -> dict[str, str]:
    """The header that shows a token. Raises ConfigError, which does not quote it, for text that can be none."""
    if not is_token(token):
        raise ConfigError(
            "the token is none: it holds a space, a line break, a letter beyond ASCII, or more than 1000 characters. It should "
            "be the single line that the coordinator's operator gave out"
        )
    return {"Authorization": f"Bearer {token}"}
