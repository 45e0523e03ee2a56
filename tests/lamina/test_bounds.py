"""Nothing in a message or a manifest is without a bound, and refusing one costs little, however hostile it is."""

import inspect
import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from lamina import wire
from lamina.bounds import MAX_COUNT, MAX_LOSS
from lamina.bundles import manifest
from lamina.errors import ConfigError
from lamina.plans import plan
from lamina.plans.segments import TensorSpec
from lamina.record import Record
from lamina.wire import CheckIn, Enrolment, Evaluation, Problem, Refused, TrainReport, Wait

ROOMS = (wire, manifest, plan)
RECORDS = [
    item
    for room in ROOMS
    for _, item in inspect.getmembers(room, inspect.isclass)
    if issubclass(item, Record) and item.__module__ == room.__name__
]
FREE = {"arguments", "options"}
"""What a user hands to a factory of his own; devices and coordinators never look inside."""

CHECK_IN: dict[str, Any] = {"engine": "torch", "modalities": ["motion"], "train_examples": 1, "test_examples": 0}
REPORT = {"num_examples": 1, "loss": 0.5, "train_seconds": 1.0, "peak_bytes": 1, "bytes_down": 1, "bytes_up": 1}


def unbounded(schema: dict[str, Any], where: str) -> Iterator[str]:
    """The places of a JSON schema where something may be of any size."""
    kind = schema.get("type")
    if "enum" in schema or "const" in schema:
        return
    if kind in ("integer", "number"):
        upper = {"maximum", "exclusiveMaximum"} & set(schema)
        lower = {"minimum", "exclusiveMinimum"} & set(schema)
        if not upper or not lower:
            yield where
    if kind == "string" and not {"maxLength", "pattern"} & set(schema):
        yield where
    if kind == "array":
        if "maxItems" not in schema:
            yield where
        yield from unbounded(schema.get("items", {}), where + "[]")
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        keys = schema.get("propertyNames", {})
        if "maxProperties" not in schema and "enum" not in keys:
            yield where
        if not {"pattern", "maxLength", "enum"} & set(keys) and "patternProperties" not in schema:
            yield where + " (keys)"
        yield from unbounded(schema["additionalProperties"], where + "{}")
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from unbounded(part, where)
    for pattern, part in schema.get("patternProperties", {}).items():
        yield from unbounded(part, f"{where}{{{pattern}}}")
    for name, part in schema.get("properties", {}).items():
        if name not in FREE:
            yield from unbounded(part, f"{where}.{name}")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_everything_in_a_message_has_a_bound(record: type[Record]) -> None:
    schema = record.model_json_schema()
    places = [place for part in (schema, *schema.get("$defs", {}).values()) for place in unbounded(part, part.get("title", ""))]
    assert places == []


def test_the_walk_sees_the_messages() -> None:
    assert len(RECORDS) > 40
    assert list(unbounded({"type": "integer", "minimum": 0}, "count")) == ["count"]


@pytest.mark.parametrize("field", ["num_examples", "peak_bytes", "bytes_down", "bytes_up", "failed_attempts", "train_seconds"])
@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "1e300", str(MAX_COUNT + 1), "-1", "null", "[]"])
def test_no_report_holds_a_number_beyond_its_bound(field: str, value: str) -> None:
    text = json.dumps(REPORT | {field: 0}).replace(f'"{field}": 0', f'"{field}": {value}')
    with pytest.raises(ConfigError) as error:
        TrainReport.from_json(text, "the report")
    assert len(error.value.message) < 500
    if len(value) < 4000:  # the reader of JSON itself refuses more digits
        assert field in error.value.message


@pytest.mark.parametrize("loss", [2 * MAX_LOSS, -2 * MAX_LOSS, 1.7e308])
def test_a_loss_stays_one_that_can_be_averaged(loss: float) -> None:
    with pytest.raises(ConfigError, match="loss"):
        TrainReport.from_json(json.dumps(REPORT | {"loss": loss}))
    with pytest.raises(ConfigError, match="loss"):
        Evaluation.from_json(json.dumps({"num_examples": 1, "correct": 0, "loss": loss}))
    assert TrainReport.from_json(json.dumps(REPORT | {"loss": 3.4e38})).loss == 3.4e38  # all that float32 has


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07\x1b[2J", "a\nb", "\u202egnp.exe", "x" * 10_000_000])
def test_text_of_a_message_is_printable_and_short_once_it_is_read(text: str) -> None:
    wait = Wait(reason="cohort", detail=text, wait_seconds_min=0, wait_seconds_max=1)
    problem = Problem(code="config", title=text, status=422, detail=text)
    for shown in (wait.detail, Refused(detail=text).detail, problem.title, problem.detail):
        assert shown.isprintable() and len(shown) <= 4000
    if len(text) <= 200:
        assert TrainReport.from_json(json.dumps(REPORT | {"failure": text})).failure.isprintable()


@pytest.mark.parametrize("seconds", [1e9, 1e18, -1.0])
def test_no_answer_asks_to_wait_for_ever(seconds: float) -> None:
    with pytest.raises(ConfigError, match="wait_seconds_max"):
        Wait.from_json(json.dumps({"reason": "round", "detail": "", "wait_seconds_min": 0, "wait_seconds_max": seconds}))


@pytest.mark.parametrize("run", ["../../../v1/devices?x=", "a b", "", "run\n", "x" * 65, ".."])
def test_the_name_of_a_run_is_no_path(run: str) -> None:
    with pytest.raises(ConfigError, match="run"):
        CheckIn.from_json(json.dumps(CHECK_IN | {"run": run}))


def test_lists_of_a_message_are_short() -> None:
    with pytest.raises(ConfigError, match="modalities"):
        CheckIn.from_json(json.dumps(CHECK_IN | {"modalities": ["a"] * 65}))
    with pytest.raises(ConfigError, match="encodings"):
        CheckIn.from_json(json.dumps(CHECK_IN | {"encodings": ["fp32"] * 17}))
    with pytest.raises(ConfigError, match="weights"):
        wire.Assignment.from_json(
            json.dumps(
                {
                    "phase": "train",
                    "run": "run-1",
                    "manifest": "0" * 64,
                    "stage": 0,
                    "round": 0,
                    "weights": {"../x": "0" * 64},
                    "lease_seconds": 1,
                    "upload_encoding": "fp32",
                }
            )
        )


@pytest.mark.parametrize("shape", [(2**40, 2**40), (-1,), (1,) * 17, (2**60,)])
def test_no_tensor_is_larger_than_can_be_counted(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="shape"):
        TensorSpec.from_json(json.dumps({"name": "w", "shape": shape}))


def test_a_message_at_its_bounds_fits_its_limit() -> None:
    widest = CheckIn(
        engine="onnxruntime",
        modalities=("m" * 32,) * 64,
        train_examples=MAX_COUNT,
        test_examples=MAX_COUNT,
        run="r" * 64,
        encodings=("int8",) * 16,
        compressions=("zstd",) * 16,
        role="calibrator",
    )
    assert len(widest.to_json()) < wire.SMALL_JSON_BYTES


@pytest.mark.parametrize(
    "message",
    [
        {"x" * 15_700_000: 1},
        {"name": "x" * 15_700_000},
        {"name": ["x" * 100] * 150_000},
        {"name": {str(i): "x" * 100 for i in range(100_000)}},
        {"\x1b[2J" * 1_000_000: "\x1b[2J" * 1_000_000},
    ],
    ids=["long key", "long value", "long list", "long map", "escapes"],
)
def test_refusing_a_large_message_is_cheap_and_the_answer_short(message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ConfigError) as error:
        Enrolment.from_json(body, "the enrolment")
    seconds, (_, peak_bytes) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1.5
    assert peak_bytes < 4 * len(body)
    assert len(error.value.message) < 1000 and error.value.message.isprintable()


def test_a_misspelt_key_is_still_told_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'name'"):
        Enrolment.from_json('{"nme": "a"}')


@pytest.mark.parametrize("depth", [100, 100_000])
def test_nesting_is_refused_and_not_followed(depth: int) -> None:
    with pytest.raises(ConfigError):
        Enrolment.from_json('{"name": ' + "[" * depth + "]" * depth + "}")
