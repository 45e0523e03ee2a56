"""Blobs over HTTP: immutable, resumable, verified."""

import pytest
from coordinator_harness import InProcess, make_bundle, problem_of
from hypothesis import given
from hypothesis import strategies as st

from coordinator.http.downloads import parse_range
from lamina.encoding.tensors import hash_bytes

DATA = bytes(range(256)) * 9000  # above 2 MiB: more than two pieces
ADDRESS = f"/v1/blobs/{hash_bytes(DATA)}"


@pytest.fixture
def stored(coordinator: InProcess) -> InProcess:
    assert coordinator.http.put(ADDRESS, content=DATA, headers=coordinator.admin).status_code == 201
    return coordinator


def test_a_blob_comes_back_as_it_was_sent(stored: InProcess) -> None:
    answer = stored.http.get(ADDRESS, headers=stored.admin)
    assert answer.content == DATA
    assert answer.headers["etag"] == f'"{hash_bytes(DATA)}"'
    assert answer.headers["content-length"] == str(len(DATA))
    assert "immutable" in answer.headers["cache-control"]


def test_a_device_may_fetch_blobs_and_may_not_send_them(stored: InProcess) -> None:
    device = stored.join("phone")
    assert stored.http.get(ADDRESS, headers=device.headers).content == DATA
    problem_of(stored.http.put(ADDRESS, content=DATA, headers=device.headers), 401, "not-enrolled")


def test_head_tells_the_size_without_the_bytes(stored: InProcess) -> None:
    answer = stored.http.head(ADDRESS, headers=stored.admin)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(DATA))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=100-", slice(100, None)),
        ("bytes=1048570-1048590", slice(1048570, 1048591)),
        ("bytes=5-99999999", slice(5, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-99999999", slice(0, None)),
    ],
)
def test_a_download_is_resumed_by_range(stored: InProcess, text: str, part: slice) -> None:
    answer = stored.http.get(ADDRESS, headers={**stored.admin, "Range": text})
    first, end, _ = part.indices(len(DATA))
    assert answer.status_code == 206
    assert answer.content == DATA[part]
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{len(DATA)}"


@pytest.mark.parametrize("text", [f"bytes={len(DATA)}-", "bytes=9-3", "bytes=-0", "bytes=-", "bytes=a-b", "lines=1-2"])
def test_a_range_outside_of_the_blob_is_refused(stored: InProcess, text: str) -> None:
    answer = stored.http.get(ADDRESS, headers={**stored.admin, "Range": text})
    problem_of(answer, 416, "protocol")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


@given(size=st.integers(0, 50), text=st.from_regex(r"bytes=\d{0,2}-\d{0,2}", fullmatch=True))
def test_a_parsed_range_always_lies_within_the_blob(size: int, text: str) -> None:
    found = parse_range(text, size)
    if found is not None:
        first, length = found
        assert first >= 0 and length > 0 and first + length <= size


@pytest.mark.parametrize("extra", [{"Range": "bytes=0-1,5-6"}, {"Range": "bytes=0-1", "If-Range": '"other"'}])
def test_several_ranges_or_another_version_are_answered_with_the_whole(stored: InProcess, extra) -> None:
    answer = stored.http.get(ADDRESS, headers={**stored.admin, **extra})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_blob_that_the_client_has_is_not_sent_again(stored: InProcess) -> None:
    tag = f'"{hash_bytes(DATA)}"'
    for header in (tag, f'W/"x", {tag}', "*"):
        answer = stored.http.get(ADDRESS, headers={**stored.admin, "If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert stored.http.get(ADDRESS, headers={**stored.admin, "If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize("name", ["0" * 64, "abc", "..%2f..%2fadmin.token", "A" * 64])
def test_an_unknown_blob_is_not_found(coordinator: InProcess, name: str) -> None:
    problem_of(coordinator.http.get(f"/v1/blobs/{name}", headers=coordinator.admin), 404, "unknown-name")


def test_bytes_with_another_hash_are_refused_and_not_kept(coordinator: InProcess) -> None:
    answer = coordinator.http.put(ADDRESS, content=DATA + b"x", headers=coordinator.admin)
    assert hash_bytes(DATA + b"x") in problem_of(answer, 400, "hash-mismatch")
    problem_of(coordinator.http.get(ADDRESS, headers=coordinator.admin), 404, "unknown-name")
    assert list((coordinator.state / "blobs").iterdir()) == []


def test_a_blob_needs_a_sha256_as_its_address(coordinator: InProcess) -> None:
    problem_of(coordinator.http.put("/v1/blobs/mine", content=b"x", headers=coordinator.admin), 404, "unknown-name")
    assert list((coordinator.state / "blobs").iterdir()) == []


def test_a_truncated_blob_is_not_kept(coordinator: InProcess) -> None:
    headers = {**coordinator.admin, "Content-Length": str(len(DATA) + 1)}
    problem_of(coordinator.http.put(ADDRESS, content=DATA, headers=headers), 400, "protocol")
    assert list((coordinator.state / "blobs").iterdir()) == []


def test_sending_a_blob_again_is_no_new_one(stored: InProcess) -> None:
    assert stored.http.put(ADDRESS, content=DATA, headers=stored.admin).status_code == 200


def test_updates_are_no_blobs(coordinator: InProcess) -> None:
    """What one device learned is not for the others to fetch."""
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a"), coordinator.join("b")
    a.check_in()
    b.check_in()
    sent = a.work()
    a.send(sent)
    answer = coordinator.http.get(f"/v1/blobs/{hash_bytes(a.body(sent))}", headers=b.headers)
    problem_of(answer, 404, "unknown-name")


def test_half_written_files_of_a_crash_are_removed_at_the_next_start(coordinator: InProcess) -> None:
    for folder in ("blobs", "updates"):
        (coordinator.state / folder / ".half.partial").write_bytes(b"x")
    coordinator.restart()
    assert list((coordinator.state / "blobs").iterdir()) == []
    assert list((coordinator.state / "updates").iterdir()) == []
