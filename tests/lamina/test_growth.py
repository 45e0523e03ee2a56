"""Growth: readers refuse keys that they do not know, so a record says nothing that its reader would assume anyway.

`tests/vectors/` has what earlier versions wrote, and their schemas as frozen readers.
"""

import json
from pathlib import Path
from typing import Literal, get_args

import pytest
from jsonschema import Draft202012Validator

from benchmarks.demo.plan import MODEL, blended, demo_plan
from lamina import wire
from lamina.cli.reference import SCHEMA, messages
from lamina.plans.model import ModelDescription
from lamina.plans.plan import Plan, StrategyName
from lamina.record import Record

OLD = Path(__file__).parents[1] / "vectors" / "2026-11-21"
SHA = "0" * 64


class Inner(Record):
    size: int = 3
    name: str = "inner"


class Outer(Record):
    kind: Literal["outer"] = "outer"
    must: int
    may: int = 0
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()


def test_a_record_leaves_out_what_holds_its_default():
    assert json.loads(Outer(must=0).to_json()) == {"kind": "outer", "must": 0}
    changed = Outer(must=1, may=2, inner=Inner(size=4), inners=(Inner(),))
    assert json.loads(changed.to_json()) == {"kind": "outer", "must": 1, "may": 2, "inner": {"size": 4}, "inners": [{}]}
    assert Outer.from_json(changed.to_json()) == changed


def test_in_python_a_record_has_all_of_its_fields():
    assert Outer(must=1).model_dump()["inner"] == {"size": 3, "name": "inner"}


def old_reader(file: str, message: str | None = None) -> Draft202012Validator:
    schema = json.loads((OLD / file).read_text())
    return Draft202012Validator(schema[message] if message else schema)


@pytest.mark.parametrize("strategy", get_args(StrategyName))
@pytest.mark.parametrize("model", [MODEL, blended(MODEL)], ids=["plain", "blended"])
def test_a_reader_of_the_first_versions_reads_the_plan_of_todays_demo(strategy: StrategyName, model: ModelDescription):
    plan = demo_plan(model, strategy, rounds=18, layers_per_stage=1, devices=4, seed=0)
    old_reader("plan.schema.json").validate(json.loads(plan.to_json()))


def test_the_old_reader_refuses_what_is_new():
    plan = demo_plan(MODEL, "layerwise", rounds=18, layers_per_stage=1, devices=4, seed=0)
    values = json.loads(plan.to_json()) | {"not_yet": 1}
    assert not old_reader("plan.schema.json").is_valid(values)


def test_todays_reader_reads_the_plan_that_an_old_version_wrote():
    plan = Plan.from_file(OLD / "plan.json")
    assert plan == demo_plan(MODEL, "layerwise", rounds=18, layers_per_stage=1, devices=4, seed=0)


MESSAGES: list[Record] = [
    wire.Enrolment(name="pi-1"),
    wire.CheckIn(engine="onnxruntime", modalities=("image",), train_examples=10, test_examples=0),
    wire.Assignment(
        phase="train",
        run="run-1",
        manifest=SHA,
        stage=0,
        round=0,
        weights={"image.stem": SHA},
        lease_seconds=60,
        upload_encoding="fp32",
    ),
    wire.Wait(reason="cohort", detail="1 of 4 devices are here", wait_seconds_min=1, wait_seconds_max=2),
    wire.Refused(detail="no"),
    wire.TrainReport(num_examples=10, loss=0.5, train_seconds=1, peak_bytes=1, bytes_down=1, bytes_up=1),
    wire.Evaluation(num_examples=10, correct=5, loss=0.5),
    wire.Accepted(run="run-1", stage=0, round=0, sha256=SHA),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_an_old_device_and_an_old_coordinator_read_todays_messages(message: Record):
    old_reader("wire.schema.json", type(message).__name__).validate(json.loads(message.model_dump_json()))


def todays_schema(message: str) -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    return Draft202012Validator({"$ref": f"#/$defs/{message}", "$defs": schema["$defs"]})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_the_schema_for_other_languages_takes_todays_messages_and_no_others(message: Record):
    """With all fields and with those alone that are not at their defaults; an unknown key, or a bound passed, is refused."""
    schema = todays_schema(type(message).__name__)
    for values in (json.loads(message.model_dump_json()), message.model_dump(mode="python")):
        schema.validate(json.loads(json.dumps(values)))
    values = json.loads(message.model_dump_json())
    assert not schema.is_valid(values | {"not_yet": 1})
    for field, value in values.items():
        wrong = [] if isinstance(value, str | int | float) else "no"
        assert not schema.is_valid(values | {field: wrong}), field


def test_the_schema_has_every_message():
    assert len(messages()) == 25 and {kind.__name__ for kind in messages()} <= set(json.loads(SCHEMA.read_text())["$defs"])
