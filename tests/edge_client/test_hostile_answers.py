"""What a coordinator, or whoever stands in its place, may answer: every wrong answer ends in an error with a name, within
bounds of memory and time, and no token goes anywhere else. Real sockets on loopback."""

import gzip
import json
import ssl
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import httpx
import pytest

import lamina.net.deadlines
from edge_client.job import Heartbeat
from edge_client.talk.blobs import BlobCache
from edge_client.talk.transport import Transport
from edge_client.train.heartbeat import check_in
from lamina.client import Client, read_token
from lamina.digests import CONTENT_DIGEST, REQUEST_DIGEST, content_digest, request_digest
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, HashMismatchError, ProtocolError, TlsError, UnreachableError
from lamina.net.address import coordinator_address, proxy_of
from lamina.wire import CheckIn, Enrolment, Wait
from tests.edge_client.hostile import hostile, http

CHECK_IN = CheckIn(engine="onnxruntime", modalities=("motion",), train_examples=1, test_examples=0)
WORK = {
    "kind": "assignment",
    "phase": "train",
    "run": "run-1",
    "manifest": "0" * 64,
    "stage": 0,
    "round": 0,
    "weights": {},
    "lease_seconds": 60,
    "upload_encoding": "fp32",
}
WAIT = {"kind": "wait", "reason": "round", "detail": "", "wait_seconds_min": 1, "wait_seconds_max": 2}
BLOB = bytes(range(256)) * 400
DIGEST = hash_bytes(BLOB)


def device(server, **options):
    options = {"patience_seconds": 2.0, "say": lambda line: None, "uniform": lambda low, high: 0.0} | options
    return Transport(server.url, "secret-token", **options)


BODIES = {
    "a number": b"5",
    "a list": b"[1]",
    "null": b"null",
    "nothing": b"",
    "no JSON": b"<html>welcome to the hotel</html>",
    "deep": b"[" * 100_000,
    "a digit too many": b'{"kind": "wait", "wait_seconds_min": ' + b"9" * 5000 + b"}",
    "NaN": json.dumps(WAIT | {"wait_seconds_max": float("nan")}).encode(),
    "an endless wait": json.dumps(WAIT | {"wait_seconds_max": 1e18}).encode(),
    "a negative wait": json.dumps(WAIT | {"wait_seconds_min": -1}).encode(),
    "another kind": b'{"kind": "party"}',
    "a stage of 30 digits": json.dumps(WORK | {"stage": 10**30}).encode(),
    "a run that is a path": json.dumps(WORK | {"run": "../../../v1/devices?x="}).encode(),
    "a run of dots": json.dumps(WORK | {"run": ".."}).encode(),
    "a run with an escape": json.dumps(WORK | {"run": "\u001b[2J"}).encode(),
    "not UTF-8": b'{"kind": "\xff\xfe"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_check_in_answered_with_something_else_is_a_protocol_error(body):
    with hostile(lambda path: [http(body)]) as server, device(server) as transport:
        with pytest.raises(ProtocolError) as caught:
            transport.check_in(CHECK_IN)
        assert caught.value.code == "protocol"
        assert len(server.heads) == 1
        assert caught.value.message.isprintable() and len(caught.value.message) < 3000


HEADS = {
    "compressed": http(gzip.compress(b" " * 1000), Content_Encoding="gzip"),
    "a length that is none": http(b"{}", Content_Length="-5"),
    "two lengths": http(b"{}", Content_Length="2\r\nContent-Length: 3"),
    "a length beyond all bounds": http(b"{}", Content_Length="300000000"),
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "a TLS alert": b"\x15\x03\x03\x00\x02\x02\x46\r\n",
    "a status that is none": b"HTTP/1.1 9999 Nothing\r\n\r\n",
}


@pytest.mark.parametrize("reply", HEADS.values(), ids=HEADS)
def test_an_answer_with_a_head_that_lies_is_a_protocol_error_soon(reply):
    with hostile(lambda path: [reply]) as server, device(server) as transport, pytest.raises(ProtocolError):
        transport.check_in(CHECK_IN)
    expected = pytest.raises((ProtocolError, HashMismatchError))
    with hostile(lambda path: [reply]) as server, device(server) as transport, expected:
        transport.download(DIGEST, Path("/dev/null"), 10**6)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_named_and_no_token_follows_it(tmp_path, status):
    with hostile(lambda path: [http(b"{}")]) as other:

        def reply(path):
            return [http(b"", status, Location=f"{other.url}/v1/check-in")]

        with hostile(reply) as server:
            with device(server) as transport, pytest.raises(ProtocolError, match="is redirected to"):
                transport.check_in(CHECK_IN)
            with device(server) as transport, pytest.raises(ProtocolError, match="is redirected to"):
                transport.download(DIGEST, tmp_path / "blob")
            with Client(server.url, "secret-token") as client, pytest.raises(ProtocolError, match="is redirected to"):
                client.runs()
            with pytest.raises(OSError, match=f"status {status[:3]}"):
                check_in(heartbeat_to(server, tmp_path))
            assert len(server.heads) == 4 + 4 + 1 + 1  # a device asks again before it believes that
        assert other.heads == []


def heartbeat_to(server, folder):
    (folder / "identity.json").write_text(json.dumps({"device_token": "secret-token"}))
    return Heartbeat(f"{server.url}/v1/check-in", "{}", str(folder / "identity.json"), 60.0)


BLOB_REPLIES = {
    "416 for a blob of which nothing is here": http(b"", "416 Range", Content_Range="bytes */0"),
    "204": http(b"", "204 No Content"),
    "201": http(BLOB, "201 Created"),
    "206 that nobody asked for": http(BLOB, "206 Partial", Content_Range=f"bytes 0-{len(BLOB) - 1}/{len(BLOB)}"),
    "compressed": http(gzip.compress(BLOB), Content_Encoding="gzip"),
    "an endless refusal": http(b"x" * 10**6, "404 Not Found"),
}


@pytest.mark.parametrize("reply", BLOB_REPLIES.values(), ids=BLOB_REPLIES)
def test_a_blob_answered_with_something_else_is_a_protocol_error(tmp_path, reply):
    with hostile(lambda path: [reply]) as server, device(server) as transport:
        with pytest.raises(ProtocolError):
            transport.download(DIGEST, tmp_path / "blob")
        assert len(server.heads) <= 4


def test_a_blob_that_says_it_is_longer_than_it_can_be_is_refused_before_a_byte_is_kept(tmp_path):
    with hostile(lambda path: [http(BLOB, Content_Length="99999999999")]) as server, device(server) as transport:
        with pytest.raises(HashMismatchError, match="longer than the 1000 bytes"):
            BlobCache(tmp_path / "blobs", transport, print).get(DIGEST, 1000)
        assert list((tmp_path / "blobs").iterdir()) == []


def test_a_blob_without_a_length_is_taken_until_its_end(tmp_path):
    with hostile(lambda path: [http(BLOB, Content_Length="", Connection="close")]) as server, device(server) as transport:
        assert BlobCache(tmp_path / "blobs", transport, print).get(DIGEST, len(BLOB)).read_bytes() == BLOB


class Clock:
    """Time that passes by itself with each look at it, so that nothing waits."""

    def __init__(self, step):
        self.now, self.step, self.pauses = 0.0, step, []

    def __call__(self):
        self.now += self.step
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


class Drip(httpx.SyncByteStream):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i : i + 1] for i in range(len(self.data)))


def test_a_blob_that_drips_is_given_up_within_patience(tmp_path):
    """A byte at a time, half a second each: on such a line the 102,400 bytes would take 14 hours."""
    clock = Clock(0.25)

    def drip(request):
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        headers = {"Content-Length": str(len(BLOB) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"
        return httpx.Response(206 if start else 200, headers=headers, stream=Drip(BLOB[start:]))

    with (
        Transport(
            "http://c",
            "t",
            patience_seconds=300,
            transport=httpx.MockTransport(drip),
            say=print,
            clock=clock,
            sleep=clock.sleep,
        ) as transport,
        pytest.raises(UnreachableError, match=r"only \d+ bytes came in 30 s"),
    ):
        transport.download(DIGEST, tmp_path / "blob")
    assert clock.now < 600
    assert len(clock.pauses) > 2


def test_an_answer_that_drips_is_given_up_within_patience():
    clock = Clock(1.0)
    handler = httpx.MockTransport(lambda request: httpx.Response(200, stream=Drip(b" " * 10_000)))
    with (
        Transport(
            "http://c", "t", patience_seconds=300, transport=handler, say=print, clock=clock, sleep=clock.sleep
        ) as transport,
        pytest.raises(UnreachableError, match="the answer did not end within 60 s"),
    ):
        transport.check_in(CHECK_IN)
    assert clock.now < 600


INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"
DRIPS = {
    "a head that never ends": lambda: (b"HTTP/1.1 200 OK\r\n", *repeat(b"X-A: b\r\n", 400)),
    "a line that never ends": lambda: (b"HTTP/1.1 200 OK\r\nX-A: ", *repeat(b"b", 400)),
    "early hints without an answer": lambda: repeat(INTERIM, 400),
}


@pytest.mark.parametrize("pieces", DRIPS.values(), ids=DRIPS)
def test_a_head_that_drips_is_given_up_within_patience(pieces, monkeypatch):
    """A piece each tenth of a second, each of which comes well within the time-out of a socket."""
    monkeypatch.setattr(lamina.net.deadlines, "HEAD_SECONDS", 0.8)

    def drip(path):
        for piece in pieces():
            yield piece
            server.pause(0.1)

    began = time.monotonic()
    with (
        hostile(drip) as server,
        device(server, patience_seconds=1.0) as transport,
        pytest.raises(UnreachableError, match=r"the head of the answer did not end within 1 s|timed out"),
    ):
        transport.check_in(CHECK_IN)
    assert time.monotonic() - began < 15


def test_a_body_may_take_longer_than_a_head(tmp_path, monkeypatch):
    monkeypatch.setattr(lamina.net.deadlines, "HEAD_SECONDS", 0.8)

    def slow(path):
        head, body = http(BLOB)[: -len(BLOB)], BLOB
        yield head
        for start in range(0, len(body), len(body) // 16):
            yield body[start : start + len(body) // 16]
            server.pause(0.1)

    with hostile(slow) as server, device(server) as transport:
        transport.download(DIGEST, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == BLOB
    assert len(server.heads) == 1


@pytest.mark.parametrize(("shortest", "longest"), [(0, 0), (0, 86400), (86400, 86400), (5, 1), (3, 3)])
def test_a_wait_is_neither_hot_nor_endless_and_never_the_same_for_all(shortest, longest):
    pauses, bounds = [], []

    def uniform(low, high):
        bounds.append((low, high))
        return high

    transport = Transport(
        "http://c", "t", transport=httpx.MockTransport(lambda request: None), sleep=pauses.append, uniform=uniform
    )
    transport.wait(Wait(reason="round", detail="", wait_seconds_min=shortest, wait_seconds_max=longest))
    ((low, high),) = bounds
    assert 0.2 <= low < high <= 3600
    assert pauses == [high]


@pytest.mark.parametrize("token", ["two\nlines", "schl\u00fcssel", "with space", "x" * 2000, "\u001b[2J", 5, None])
def test_a_token_that_can_be_none_in_the_answer_of_enrolment_is_a_protocol_error(token):
    body = json.dumps({"device_id": "d1", "device_token": token}).encode()
    with hostile(lambda path: [http(body)]) as server, device(server) as transport, pytest.raises(ProtocolError):
        transport.enrol(Enrolment(name="attic"), "enrol-me")


def test_a_token_with_a_line_break_is_neither_sent_nor_shown(tmp_path):
    said = []
    with hostile(lambda path: [http(b"{}")]) as server:
        with device(server, say=said.append) as transport, pytest.raises(ConfigError) as caught:
            transport.enrol(Enrolment(name="attic"), "two\r\nlines-of-a-secret")
        with pytest.raises(ConfigError) as also:
            Client(server.url, "two\r\nlines-of-a-secret")
        (tmp_path / "token").write_text("two\nlines-of-a-secret")
        with pytest.raises(ConfigError) as third:
            read_token(tmp_path / "token")
        assert server.heads == [] and said == []
    assert not any("secret" in error.value.message for error in (caught, also, third))


@pytest.mark.parametrize("run", ["../../../v1/devices?x=", "..", "a/b", "a?b", "a#b", "a b", "%2e%2e"])
def test_a_run_name_cannot_leave_its_place_in_the_address(run):
    with hostile(lambda path: [http(b"{}", "404 Not Found")]) as server, Client(server.url, "t") as client:
        with pytest.raises(ProtocolError):
            client.run(run)
        assert all(path.startswith("/v1/runs/") and "/" not in path[9:] and "?" not in path for path in server.paths)


def test_what_a_coordinator_says_steers_no_terminal(capsys):
    problem = {"code": "protocol", "title": "t", "status": 400, "detail": "\u001b]0;owned\u0007\u001b[2J[/x]" + "y" * 9999}
    reply = http(json.dumps(problem).encode(), "400 Bad")
    expected = pytest.raises(ProtocolError)
    with hostile(lambda path: [reply]) as server, device(server) as transport, expected as caught:
        transport.check_in(CHECK_IN)
    assert caught.value.message.isprintable() and len(caught.value.message) <= 1000


# Memory: asked in a process of its own, whose peak nothing else has raised.

PEAK = """
import sys
from edge_client.process.memory import peak_bytes
from edge_client.talk.transport import Transport
from lamina.errors import LaminaError
from lamina.wire import CheckIn
check_in = CheckIn(engine="onnxruntime", modalities=("motion",), train_examples=1, test_examples=0)
def ask(transport):
    try:
        transport.check_in(check_in)
    except LaminaError as error:
        return error.code
with Transport(sys.argv[1], "t", patience_seconds=1, say=lambda line: None) as transport:
    ask(transport)  # a small answer first: what it takes to speak HTTP at all
    before = peak_bytes()
    print(ask(transport), peak_bytes() - before)
"""


def endless(piece, count):
    head = http(b"", Content_Length="", Transfer_Encoding="chunked")
    chunk = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    return [head, *repeat(chunk, count)]


LARGE = {
    "300 MB of JSON": lambda: endless(b"[" + b"1," * 50_000, 3000),
    "300 MB of JSON, as its length says": lambda: [http(b"[", Content_Length="300000000"), *repeat(b" " * 100_000, 3000)],
    "a gzip bomb": lambda: [http(gzip.compress(b" " * 100_000_000), Content_Encoding="gzip")],
    "an endless refusal": lambda: [http(b"", "500 Oops", Content_Length=""), *repeat(b"x" * 100_000, 3000)],
    "as many small values as fit": lambda: [http(b"[" + b"{}," * 174_000 + b"1]")],
    "as many small keys as fit": lambda: [http(b"{" + b",".join(b'"%d":1' % i for i in range(48_000)) + b"}")],
    "a header without an end": lambda: [b"HTTP/1.1 200 OK\r\nX: ", *repeat(b"x" * 100_000, 3000)],
    "headers without an end": lambda: [b"HTTP/1.1 200 OK\r\n", *repeat(b"X: y\r\n" * 10_000, 3000)],
}


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
def test_an_answer_without_a_bound_costs_a_device_less_than_32_mib(large):
    with hostile(lambda path: [http(b"{}")] if len(server.heads) < 2 else large()) as server:
        done = subprocess.run([sys.executable, "-c", PEAK, server.url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, grown = done.stdout.split()
    assert code in ("protocol", "unreachable")
    assert int(grown) < 32 << 20


# Addresses, proxies and certificates.


def test_https_to_a_coordinator_that_speaks_http_is_named_at_once():
    with hostile(lambda path: [http(b"{}", "400 Bad Request")]) as server:
        address = f"https://127.0.0.1:{server.port}"
        started = time.monotonic()
        for ask in (
            lambda: Transport(address, "t").check_in(CHECK_IN),
            lambda: Client(address, "t").runs(),
        ):
            with pytest.raises(TlsError, match=f"speaks http, not https: use http://127.0.0.1:{server.port}"):
                ask()
        assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost and 127.0.0.1, with its key, in one file; and one for another host."""
    folder, made = tmp_path_factory.mktemp("tls"), {}
    for name, names in (("own", "DNS:localhost,IP:127.0.0.1"), ("other", "DNS:elsewhere.example")):
        key, cert = folder / f"{name}.key", folder / f"{name}.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
        subprocess.run(
            [*command, "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"], check=True, capture_output=True
        )
        made[name] = (cert, key)
    return made


def tls_server(files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return lambda connection: context.wrap_socket(connection, server_side=True)


def test_a_certificate_that_never_passes_ends_at_once(certificate, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with hostile(lambda path: [http(json.dumps(WAIT).encode())], tls_server(certificate["own"])) as server:
        address = f"https://127.0.0.1:{server.port}"
        with pytest.raises(TlsError, match=r"self.signed.*SSL_CERT_FILE"):
            Transport(address, "t").check_in(CHECK_IN)
        with pytest.raises(TlsError):
            Client(address, "t").runs()
        # And the way out that the message names.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate["own"][0]))
        assert Transport(address, "t").check_in(CHECK_IN) == Wait.model_validate(WAIT)
        heartbeat = heartbeat_to(server, tmp_path)
        assert check_in(Heartbeat(f"{address}/v1/check-in", "{}", heartbeat.token_file, 60.0)) == WAIT


def test_a_certificate_of_another_host_ends_at_once(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate["other"][0]))
    with hostile(lambda path: [], tls_server(certificate["other"])) as server, pytest.raises(TlsError, match="not valid for"):
        Transport(f"https://127.0.0.1:{server.port}", "t").check_in(CHECK_IN)


def test_a_file_of_certificates_that_is_none_is_named(monkeypatch, tmp_path):
    (tmp_path / "none.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"SSL_CERT_FILE names .*none\.pem"):
        Transport("https://coordinator", "t")


@pytest.fixture
def no_proxies(monkeypatch):
    for stem in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{stem}_proxy", raising=False)
        monkeypatch.delenv(f"{stem}_proxy".upper(), raising=False)


def test_a_proxy_that_is_not_used_here_is_named_without_its_password(no_proxies, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://me:my-password@proxy:1080")
    for connect in (Transport, Client):
        with pytest.raises(ConfigError, match=r"ALL_PROXY names a proxy .*socks5.*NO_PROXY") as caught:
            connect("http://coordinator:8763", "t")
        assert "my-password" not in caught.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.8.8", "a.localhost"])
def test_no_proxy_is_asked_for_this_machine(no_proxies, monkeypatch, host):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert proxy_of(f"http://{host}:8763") is None


def test_a_coordinator_on_this_machine_answers_in_spite_of_a_proxy(no_proxies, monkeypatch, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with hostile(lambda path: [http(json.dumps(WAIT).encode())]) as server:
        with device(server) as transport:
            assert transport.check_in(CHECK_IN) == Wait.model_validate(WAIT)
        assert check_in(heartbeat_to(server, tmp_path)) == WAIT


def test_the_proxy_in_use_is_named_where_nothing_answers(no_proxies, monkeypatch):
    with hostile(lambda path: [http(b"<html>no such host</html>", "502 Bad Gateway")]) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:my-password@127.0.0.1:{proxy.port}")
        with (
            Transport("http://coordinator.test", "t", patience_seconds=0.5, say=print) as transport,
            pytest.raises(UnreachableError, match=rf"through the proxy http://127\.0\.0\.1:{proxy.port} \(http_proxy\)") as e,
        ):
            transport.check_in(CHECK_IN)
        assert "my-password" not in e.value.message
        assert proxy.paths[0] == "http://coordinator.test/v1/check-in"


@pytest.mark.parametrize(
    ("url", "exempt", "is_used"),
    [
        ("http://10.1.2.3:8763", "10.0.0.0/8", False),
        ("http://10.1.2.3:8763", "11.0.0.0/8", True),
        ("http://coordinator.lan", ".lan", False),
        ("http://coordinator.lan", "*", False),
        ("http://coordinator.lan", "", True),
    ],
)
def test_no_proxy_exempts(url, exempt, is_used):
    proxy = proxy_of(url, {"HTTP_PROXY": "proxy:3128", "NO_PROXY": exempt})
    assert (str(proxy) if proxy else None) == ("http://proxy:3128 (HTTP_PROXY)" if is_used else None)


@pytest.mark.parametrize(
    "url", ["http://me:pw@host", "http://host?x=1", "http://host:0", "http://host:99999", "http://a b", "x"]
)
def test_an_address_that_is_none_is_refused_without_its_password(url):
    with pytest.raises(ConfigError, match="no coordinator address") as caught:
        coordinator_address(url)
    assert "pw" not in caught.value.message


# The heartbeat of the training process.


@pytest.mark.parametrize("body", [b"", b"<html>", b"[" * 100_000, b"1" * 10_000, b" " * (1 << 20), b"\xff"])
def test_a_heartbeat_answered_with_no_json_is_an_os_error(tmp_path, body):
    with hostile(lambda path: [http(body)]) as server, pytest.raises(OSError):
        check_in(heartbeat_to(server, tmp_path))


def test_a_heartbeat_that_drips_does_not_hold_training_up(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_client.train.heartbeat._ANSWER_SECONDS", 1.0)

    def drip(path):
        yield b"HTTP/1.1 200 OK\r\n"
        for _ in range(100):
            server.pause(0.2)
            yield b"X"

    with hostile(drip) as server:
        started = time.monotonic()
        with pytest.raises(OSError, match="no answer within"):
            check_in(heartbeat_to(server, tmp_path))
        assert time.monotonic() - started < 5


def test_an_answer_that_was_damaged_once_is_asked_for_again():
    """Each part of an answer in turn: its body, its status, its digest."""
    good = json.dumps({"kind": "wait", "reason": "round", "detail": "x", "wait_seconds_min": 1, "wait_seconds_max": 2}).encode()
    right = http(good, Content_Digest=content_digest(good))
    for damaged in (
        http(good.replace(b'"x"', b'"y"'), Content_Digest=content_digest(good)),
        right.replace(b"200 OK", b"300 OK"),
        right.replace(b"200 OK", b"204 OK"),
        http(good, Content_Digest=content_digest(b"")),
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 31\r\n\r\nInvalid HTTP request received.\r\n",  # of the question
    ):
        replies = [[right], [damaged]]
        with hostile(lambda path, replies=replies: replies.pop()) as server, device(server) as transport:
            assert transport.check_in(CHECK_IN).detail == "x", damaged
            assert len(server.heads) == 2


def test_an_answer_that_is_always_damaged_is_named_as_such():
    with hostile(lambda path: [http(b"{}", Content_Digest=content_digest(b"other"))]) as server, device(server) as transport:
        with pytest.raises(ProtocolError, match="was damaged on its way"):
            transport.check_in(CHECK_IN)
        assert len(server.heads) == 4


def test_requests_and_heartbeats_bring_digests_that_the_coordinator_checks(tmp_path):
    def fits(head):
        lines = [line.partition(": ") for line in head.split("\r\n")[1:]]
        headers = {name.title(): value for name, _, value in lines}
        return headers[REQUEST_DIGEST] == request_digest(*head.split(" ")[:2], headers) and CONTENT_DIGEST in headers

    with hostile(lambda path: [http(b"{}")]) as server:
        with device(server) as transport, pytest.raises(ProtocolError):
            transport.check_in(CHECK_IN)
        check_in(heartbeat_to(server, tmp_path))
        assert len(server.heads) == 2 and all(fits(head) for head in server.heads)


def test_a_heartbeat_does_not_believe_a_damaged_answer(tmp_path):
    reply = http(b'{"kind": "wait"}', Content_Digest=content_digest(b"{}"))
    with hostile(lambda path: [reply]) as server, pytest.raises(OSError, match="damaged on its way"):
        check_in(heartbeat_to(server, tmp_path))
