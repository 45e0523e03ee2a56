"""Retries, refusals and downloads, against functions instead of a network and a clock that nobody waits for."""

import errno
from base64 import b64encode
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import httpx
import pytest

from edge_client.talk.blobs import BlobCache
from edge_client.talk.transport import Transport
from lamina.encoding.compression import compress
from lamina.encoding.tensors import hash_bytes
from lamina.errors import (
    ConfigError,
    DiskFullError,
    HashMismatchError,
    NotEnrolledError,
    ProtocolError,
    RoundClosedError,
    UnknownNameError,
    UnreachableError,
)
from lamina.wire import Accepted, CheckIn, Evaluation, TrainReport, Wait
from tests.edge_client.fake_coordinator import answer, problem

CHECK_IN = CheckIn(engine="onnxruntime", modalities=("motion",), train_examples=1, test_examples=0)
WAIT = Wait(reason="round", detail="2 more updates", wait_seconds_min=1, wait_seconds_max=2)
BLOB = bytes(range(256)) * 1000
DIGEST = hash_bytes(BLOB)


class Clock:
    def __init__(self):
        self.now, self.pauses = 1000.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def connect(clock, said):
    """connect(handler) -> Transport with the longest jitter."""

    def make(handler, uniform=lambda low, high: high):
        return Transport(
            "http://coordinator:8000/",
            "secret-token",
            patience_seconds=100,
            transport=httpx.MockTransport(handler),
            say=said.append,
            clock=clock,
            sleep=clock.sleep,
            uniform=uniform,
        )

    return make


def scripted(*answers):
    """A handler that gives these answers in turn, exceptions raised, the last one for ever."""
    left = list(answers)

    def handle(request):
        value = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(value, Exception):
            raise value
        return value

    return handle


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("no answer"),
        httpx.RemoteProtocolError("cut"),
        *(httpx.Response(status) for status in (429, 502, 503, 504, 507)),
    ],
    ids=lambda trouble: getattr(trouble, "status_code", type(trouble).__name__),
)
def test_passing_trouble_is_tried_again_and_said(connect, clock, said, trouble):
    transport = connect(scripted(trouble, trouble, trouble, answer(WAIT)))
    assert transport.check_in(CHECK_IN) == WAIT
    assert clock.pauses == [0.5, 1.0, 2.0]
    assert len(said) == 3
    assert "check-in: http://coordinator:8000 does not answer" in said[0]


def test_waits_grow_to_a_bound_and_end_at_the_deadline(connect, clock):
    transport = connect(scripted(httpx.ConnectError("refused")))
    with pytest.raises(UnreachableError, match=r"check-in: http://coordinator:8000 did not answer for 100 s \(refused\)"):
        transport.check_in(CHECK_IN)
    assert clock.pauses == [0.5, 1, 2, 4, 8, 16, 32]
    assert clock.now - 1000 <= 100


def test_jitter_is_full(connect, clock):
    asked = []
    transport = connect(
        scripted(httpx.ConnectError("x"), httpx.ConnectError("x"), answer(WAIT)),
        uniform=lambda low, high: asked.append((low, high)) or 0.0,
    )
    transport.check_in(CHECK_IN)
    assert asked == [(0, 0.5), (0, 1.0)]


def test_a_coordinator_that_names_a_time_is_not_asked_before(connect, clock):
    transport = connect(scripted(httpx.Response(429, headers={"Retry-After": "17"}), answer(WAIT)))
    transport.check_in(CHECK_IN)
    assert clock.pauses == [17.0]


def test_a_coordinator_whose_disk_stays_full_is_named_as_such(connect):
    transport = connect(scripted(problem("disk-full", 507, "no space left on the coordinator")))
    with pytest.raises(DiskFullError, match="no space left on the coordinator"):
        transport.check_in(CHECK_IN)


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("not-enrolled", 401, NotEnrolledError),
        ("unknown-name", 404, UnknownNameError),
        ("round-closed", 409, RoundClosedError),
    ],
)
def test_a_refusal_becomes_the_error_of_its_code_at_once(connect, clock, code, status, error):
    with pytest.raises(error, match="what was wrong") as caught:
        connect(scripted(problem(code, status, "what was wrong"))).check_in(CHECK_IN)
    assert type(caught.value) is error
    assert clock.pauses == []


def test_a_refusal_that_is_not_understood_is_asked_for_again_before_it_is_believed(connect, clock):
    with pytest.raises(ProtocolError, match="what was wrong"):
        connect(scripted(problem("a-code-of-the-future", 418, "what was wrong"))).check_in(CHECK_IN)
    assert len(clock.pauses) == 3


def test_an_answer_that_is_no_problem_document_is_shown(connect):
    with pytest.raises(ProtocolError, match="status 404: <html>not here"):
        connect(scripted(httpx.Response(404, text="<html>not here"))).check_in(CHECK_IN)


@pytest.mark.parametrize("body", [b"not json", b'{"kind": "party"}', b"{}"])
def test_a_success_that_is_not_understood_is_a_protocol_error(connect, body):
    transport = connect(scripted(httpx.Response(200, content=body)))
    with pytest.raises(ProtocolError):
        transport.check_in(CHECK_IN)
    with pytest.raises(ProtocolError):
        transport.put_evaluation("r", 0, 0, Evaluation(num_examples=0, correct=0, loss=0.0))


def test_an_update_carries_its_digest_its_report_and_the_token(connect):
    seen = []

    def handle(request):
        seen.append(request)
        return answer(Accepted(run="r", stage=1, round=2))

    report = TrainReport(num_examples=3, loss=0.5, train_seconds=1, peak_bytes=4, bytes_down=5, bytes_up=6)
    connect(handle).put_update("r", 1, 2, b"body", report)
    (request,) = seen
    assert (request.method, request.url.path) == ("PUT", "/v1/runs/r/stages/1/rounds/2/update")
    assert request.headers["Content-Digest"] == f"sha-256=:{b64encode(sha256(b'body').digest()).decode()}:"
    assert TrainReport.model_validate_json(request.headers["Lamina-Report"]) == report
    assert request.headers["Authorization"] == "Bearer secret-token"


def test_a_compressed_update_is_streamed_from_its_file_and_again_after_trouble(connect, tmp_path):
    path, seen = tmp_path / "update.zst", []
    path.write_bytes(BLOB)

    def handle(request):
        seen.append((request.read(), request.headers))
        return httpx.Response(503) if len(seen) == 1 else answer(Accepted(run="r", stage=1, round=2))

    report = TrainReport(
        num_examples=3, loss=0.5, train_seconds=1, peak_bytes=4, bytes_down=5, bytes_up=6, upload_encoding="int8"
    )
    transport = connect(handle)
    transport.put_update("r", 1, 2, path, report, "zstd")
    assert transport.bytes_up == 2 * len(BLOB)
    for body, headers in seen:
        assert body == BLOB
        assert headers["Content-Encoding"] == "zstd"
        assert headers["Content-Length"] == str(len(BLOB)) and "Transfer-Encoding" not in headers
        assert headers["Content-Digest"] == f"sha-256=:{b64encode(sha256(BLOB).digest()).decode()}:"
        assert TrainReport.model_validate_json(headers["Lamina-Report"]) == report


def test_bodies_are_counted_in_both_directions_with_every_attempt(connect):
    transport = connect(scripted(httpx.Response(503, content=b"12345"), answer(WAIT)))
    transport.check_in(CHECK_IN)
    assert transport.bytes_up == 2 * len(CHECK_IN.to_json())
    assert transport.bytes_down == 5 + len(WAIT.to_json())


@pytest.mark.parametrize("url", ["coordinator:8000", "ftp://coordinator", "http://host:eight", "https://"])
def test_an_address_that_is_none_is_a_config_error(url):
    with pytest.raises(ConfigError, match="is no coordinator address"):
        Transport(url)


class BlobServer:
    """Serves BLOB as the wire defines it; connections are cut after `cuts` bytes in turn."""

    def __init__(self, cuts=(), content=BLOB, honours_range=True, digest=DIGEST):
        self.cuts, self.content, self.honours_range, self.ranges = list(cuts), content, honours_range, []
        self.tag = f'"{digest}"'

    def __call__(self, request):
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.honours_range else 0
        headers = {"ETag": self.tag}
        if asked and self.honours_range:
            assert request.headers["If-Range"] == self.tag
            if start >= len(self.content):
                return httpx.Response(416, headers=headers | {"Content-Range": f"bytes */{len(self.content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        part = self.content[start:]
        headers["Content-Length"] = str(len(part))
        cut = self.cuts.pop(0) if self.cuts else None
        return httpx.Response(206 if "Content-Range" in headers else 200, headers=headers, stream=Cut(part, cut))


class Cut(httpx.SyncByteStream):
    def __init__(self, data, cut):
        self.data, self.cut = data, cut

    def __iter__(self):
        yield self.data[: self.cut]
        if self.cut is not None:
            raise httpx.ReadError("connection reset")


@pytest.fixture
def cache(tmp_path, connect, said):
    return lambda server: BlobCache(tmp_path / "blobs", connect(server), said.append)


def test_a_cut_download_resumes_where_it_was_cut(cache):
    server = BlobServer(cuts=[70_000, 100_000])
    blobs = cache(server)
    assert blobs.get(DIGEST).read_bytes() == BLOB
    assert server.ranges == [None, "bytes=70000-", "bytes=170000-"]


def test_a_download_resumes_in_the_next_process(cache, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"{DIGEST}.partial").write_bytes(BLOB[:1000])
    server = BlobServer()
    assert cache(server).get(DIGEST).read_bytes() == BLOB
    assert server.ranges == ["bytes=1000-"]


def test_a_whole_partial_file_needs_no_bytes_but_is_verified(cache, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"{DIGEST}.partial").write_bytes(BLOB)
    assert cache(BlobServer()).get(DIGEST).read_bytes() == BLOB


@pytest.mark.parametrize("left", [b"x" * 100, BLOB + b"more"])
def test_a_partial_file_of_other_bytes_is_downloaded_anew(cache, tmp_path, left):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"{DIGEST}.partial").write_bytes(left)
    assert cache(BlobServer()).get(DIGEST).read_bytes() == BLOB


def test_a_server_without_ranges_starts_from_the_beginning(cache):
    server = BlobServer(cuts=[70_000], honours_range=False)
    assert cache(server).get(DIGEST).read_bytes() == BLOB


def test_a_slow_link_that_is_cut_again_and_again_gets_there_as_long_as_bytes_come(cache, clock):
    server = BlobServer(cuts=[10_000] * 25)
    slow = clock.sleep

    def sleep_long(seconds):
        slow(60)

    blobs = cache(server)
    blobs._transport.sleep = sleep_long
    assert blobs.get(DIGEST).read_bytes() == BLOB
    assert clock.now - 1000 > 100  # longer than the patience with a silent coordinator


def test_what_is_here_is_not_downloaded_again(cache, tmp_path):
    cache(BlobServer()).get(DIGEST)
    server = BlobServer()
    assert cache(server).get(DIGEST) == tmp_path / "blobs" / DIGEST
    assert server.ranges == []


def test_a_blob_altered_on_disk_is_noticed_before_its_first_use_and_replaced(cache, tmp_path, said):
    cache(BlobServer()).get(DIGEST)
    (tmp_path / "blobs" / DIGEST).write_bytes(BLOB[:-1] + b"!")
    server = BlobServer()
    assert cache(server).get(DIGEST).read_bytes() == BLOB
    assert "altered on this disk" in said[0]


def test_wrong_content_is_tried_three_times_and_never_comes_into_place(cache, tmp_path):
    server = BlobServer(content=BLOB[:-1] + b"!")
    with pytest.raises(HashMismatchError, match=f"{DIGEST} arrived 3 times with other content"):
        cache(server).get(DIGEST)
    assert server.ranges == [None, None, None]
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_blob_longer_than_it_can_be_is_stopped_on_the_way(cache, tmp_path):
    with pytest.raises(HashMismatchError, match="longer than the 1000 bytes"):
        cache(BlobServer()).get(DIGEST, max_bytes=1000)
    assert list((tmp_path / "blobs").iterdir()) == []


class Compressed:
    """A server of two blobs: BLOB and its compressed form, or what a test puts in its place."""

    def __init__(self, packed, cuts=()):
        self.packed, self.asked = hash_bytes(packed), []
        self.servers = {DIGEST: BlobServer(), self.packed: BlobServer(cuts, packed, digest=self.packed)}

    def __call__(self, request):
        digest = request.url.path.rpartition("/")[2]
        self.asked.append(digest)
        return self.servers[digest](request)


def test_a_blob_is_fetched_in_its_compressed_form_which_resumes_like_any_other(cache, tmp_path):
    packed = compress(BLOB, "zstd")
    server = Compressed(packed, cuts=[100, 50])
    blobs = cache(server)
    assert blobs.get(DIGEST, len(BLOB), server.packed, "zstd").read_bytes() == BLOB
    assert server.asked == [server.packed] * 3
    assert server.servers[server.packed].ranges == [None, "bytes=100-", "bytes=150-"]
    assert blobs._transport.bytes_down == len(packed) < len(BLOB)
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [DIGEST]
    assert blobs.get(DIGEST, len(BLOB), server.packed, "zstd").read_bytes() == BLOB
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (compress(BLOB[:-1] + b"!", "zstd"), "it holds sha256"),
        (compress(BLOB + BLOB, "zstd"), "becomes 512000 bytes, at most 256000"),
        (compress(BLOB, "zstd")[:-9], "zstd frame"),
        (b"no frame at all", "no valid zstd frame"),
    ],
)
def test_a_compressed_blob_that_does_not_give_the_file_is_done_without(cache, tmp_path, said, packed, why):
    server = Compressed(packed)
    assert cache(server).get(DIGEST, len(BLOB), server.packed, "zstd").read_bytes() == BLOB
    assert server.asked == [server.packed, DIGEST]
    assert why in said[0] and f"downloading {DIGEST[:12]} as it is" in said[0]
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [DIGEST]


def test_a_disk_that_fills_while_decompressing_is_named_and_the_download_goes_on_later(cache, tmp_path, monkeypatch):
    server = Compressed(compress(BLOB, "zstd"))

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("edge_client.talk.blobs.decompress_file", no_space)
        with pytest.raises(DiskFullError):
            cache(server).get(DIGEST, len(BLOB), server.packed, "zstd")
    assert cache(server).get(DIGEST, len(BLOB), server.packed, "zstd").read_bytes() == BLOB


def test_blobs_that_are_no_longer_needed_are_deleted(cache, tmp_path):
    blobs = cache(BlobServer())
    blobs.get(DIGEST)
    (tmp_path / "blobs" / "old").write_bytes(b"1")
    blobs.keep_only({DIGEST})
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [DIGEST]
    blobs.keep_only(set())
    assert blobs.get(DIGEST).read_bytes() == BLOB


def test_a_full_disk_is_named_with_its_folder(tmp_path, connect):
    transport = connect(BlobServer())
    with pytest.raises(DiskFullError, match="no space left on the disk of /dev"):
        transport.download(DIGEST, Path("/dev/full"))


class CuttingServer(BaseHTTPRequestHandler):
    """Real sockets: the first answer promises the whole blob and hangs up after 100,000 bytes."""

    ranges: ClassVar[list[str | None]] = []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(BLOB) - start))
        self.send_header("ETag", f'"{DIGEST}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}")
        self.end_headers()
        self.wfile.write(BLOB[start:] if asked else BLOB[:100_000])
        self.close_connection = True

    def log_message(self, *arguments):
        pass


def test_a_connection_cut_by_a_real_server_resumes(tmp_path, said):
    server = HTTPServer(("127.0.0.1", 0), CuttingServer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with Transport(url, "token", say=said.append, uniform=lambda low, high: 0.0) as transport:
            assert BlobCache(tmp_path / "blobs", transport, said.append).get(DIGEST).read_bytes() == BLOB
            assert transport.bytes_down == len(BLOB)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert CuttingServer.ranges == [None, "bytes=100000-"]
    assert "next try in 0.0 s" in said[0]


@pytest.mark.parametrize("location", ["X: y", "http://[", "//", ""])
def test_a_redirection_to_no_address_is_a_named_error(location):
    transport = Transport(
        "http://c",
        "t",
        transport=httpx.MockTransport(lambda _: httpx.Response(302, headers={"Location": location})),
        sleep=lambda _: None,
    )
    with pytest.raises(ProtocolError):
        transport.check_in(CHECK_IN)
