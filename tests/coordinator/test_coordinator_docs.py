"""The pages about the protocol and the errors say what the code does: the same endpoints, fields, codes and statuses."""

import inspect
import re
from pathlib import Path

import pytest
from coordinator_harness import InProcess

from coordinator.http import bodies
from coordinator.http.problems import STATUS_OF_CODE, TITLES
from coordinator.settings import Settings
from lamina import wire
from lamina.bounds import MAX_ITEMS, MAX_LAYERS, MAX_ROUNDS, MAX_SEGMENTS, MAX_STAGES
from lamina.bundles.signing import signed_message
from lamina.digests import CONTENT_DIGEST
from lamina.errors import all_errors
from lamina.federation.content import MAX_DIFFERENCE
from lamina.federation.losses import MAX_EXAMPLES
from lamina.record import Record
from lamina.wire import MAX_JSON_BYTES, REPORT_HEADER, SIGNATURE_HEADER, SMALL_JSON_BYTES

DOCS = Path(__file__).parents[2] / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text()
ERRORS = (DOCS / "errors.md").read_text()
MESSAGES = [
    item
    for _, item in inspect.getmembers(wire, inspect.isclass)
    if issubclass(item, Record) and item.__module__ == wire.__name__
]


def sections(page: str, level: str) -> dict[str, str]:
    """Heading -> text up to the next heading of the same or a higher level."""
    parts = re.split(rf"^(#{{1,{len(level)}}}) (.+)$", page, flags=re.MULTILINE)
    return {parts[i + 1].strip(): parts[i + 2] for i in range(1, len(parts), 3) if parts[i] == level}


def rows(text: str) -> dict[str, list[str]]:
    """First column -> the other cells, of the rows of a table whose first cell is code."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `"):
            found[cells[0].strip("`")] = cells[1:]
    return found


def test_there_is_a_section_for_each_endpoint_and_no_other(coordinator: InProcess) -> None:
    routes = {
        f"{method} {route.path}".replace("{number}", "{round}")
        for route in coordinator.app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    }
    titles = {title for title in sections(PROTOCOL, "##") if title.partition(" ")[0] in ("GET", "POST", "PUT")}
    assert len(routes) == 19
    assert titles == routes


def test_the_list_in_wire_py_has_the_same_endpoints(coordinator: InProcess) -> None:
    listed = set(re.findall(r"^    (GET|PUT|POST) +(/v1/\S+)", wire.__doc__, flags=re.MULTILINE))
    documented = {tuple(title.split(" ")) for title in sections(PROTOCOL, "##") if "/v1/" in title}
    same = {(method, path.replace("{digest}", "{sha256}")) for method, path in documented}
    assert same - {("GET", "/v1/health")} == listed


def test_every_message_has_a_section() -> None:
    assert len(MESSAGES) == 25
    assert {message.__name__ for message in MESSAGES} == set(sections(PROTOCOL, "###"))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_every_field_has_a_row_in_the_order_of_the_code(message: type[Record]) -> None:
    text = sections(PROTOCOL, "###")[message.__name__]
    assert list(rows(text)) == list(message.model_fields)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_the_words_that_a_field_may_hold_are_listed(message: type[Record]) -> None:
    table = rows(sections(PROTOCOL, "###")[message.__name__])
    properties = message.model_json_schema()["properties"]
    for name, schema in properties.items():
        words = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if words:
            assert re.findall(r"`(\w+)`", table[name][0]) == [str(word) for word in words]


def test_the_links_within_the_protocol_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")
        for level in ("##", "###")
        for title in sections(PROTOCOL, level)
    }
    links = re.findall(r"\]\(#([^)]+)\)", PROTOCOL)
    assert len(links) > 10
    assert set(links) <= anchors


def test_the_numbers_and_headers_are_those_of_the_code() -> None:
    assert MAX_JSON_BYTES == 16 << 20 and "16 MiB" in PROTOCOL
    assert SMALL_JSON_BYTES == 16 << 10 and "16 KiB" in PROTOCOL and "16 KiB" in ERRORS
    settings = Settings(state=Path("any"))
    for number in (settings.connections, settings.enrolment_burst, MAX_SEGMENTS, MAX_LAYERS, MAX_STAGES, MAX_ROUNDS, MAX_ITEMS):
        assert re.search(rf"\b({number}|{number:,})\b", PROTOCOL), number
    assert settings.idle_seconds == bodies.GRACE_SECONDS == 10 and "for 10 s" in PROTOCOL
    assert MAX_DIFFERENCE == 1e4 and "beyond 1e4" in PROTOCOL and "beyond 1e4" in ERRORS
    assert MAX_EXAMPLES == 2**24 and "1 to 2^24" in PROTOCOL
    assert f"`{CONTENT_DIGEST}: sha-256=" in PROTOCOL and f"`{REPORT_HEADER}`" in PROTOCOL
    assert f"`{SIGNATURE_HEADER}`" in PROTOCOL and b"lamina bundle v1\0" + bytes(32) == signed_message("00" * 32)


def test_the_codes_and_statuses_of_the_protocol_page_are_real() -> None:
    quoted = set(re.findall(r"(\d{3}) `([a-z-]+)`", PROTOCOL))
    assert len(quoted) >= 8
    assert {(str(STATUS_OF_CODE[code]), code) for _, code in quoted} == quoted


def test_every_code_has_a_section_with_cause_and_way_out() -> None:
    found = sections(ERRORS, "##")
    assert set(found) == set(all_errors())
    for code, text in found.items():
        assert re.search(r"^Cause: \S", text, flags=re.MULTILINE), code
        assert re.search(r"^Way out: \S", text, flags=re.MULTILINE), code


def test_the_statuses_are_those_that_the_coordinator_answers_with() -> None:
    told = {
        code: int(match.group(1))
        for code, text in sections(ERRORS, "##").items()
        if (match := re.search(r"^Status: (\d{3})$", text, flags=re.MULTILINE))
    }
    assert told == STATUS_OF_CODE
    assert set(TITLES) == set(STATUS_OF_CODE)
