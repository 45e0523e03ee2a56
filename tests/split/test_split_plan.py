"""What a split plan refuses, with the reason, before anything is exported."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from lamina.errors import ConfigError
from lamina.split.manifest import program_names
from lamina.split.plan import SplitPlan
from lamina.split.wire import features_down, gradients_up
from tests.split.house import ENCODERS, make_plan

PLAN_FILE = Path(__file__).parents[2] / "benchmarks" / "plans" / "split" / "m2fedsa.toml"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secure_aggregation": True}, "must see each device's activations"),
        ({"secure_aggregation": True, "party": "device"}, "not built for split plans"),
        ({"encoders": ENCODERS[:1]}, "two modalities or more"),
        ({"encoders": (ENCODERS[0], ENCODERS[0])}, "different names"),
        ({"encoders": (ENCODERS[0], ENCODERS[1].model_copy(update={"layers": 2}))}, "audio has 2 layers; a split needs 3"),
        ({"encoders": (ENCODERS[0], ENCODERS[1].model_copy(update={"width": 32}))}, "one width"),
        ({"encoders": (ENCODERS[0], ENCODERS[1].model_copy(update={"modality": "fusion"}))}, "rename it"),
        ({"users": {"size": 2, "min_users": 3}}, "min_users 3 is larger"),
        ({"training": {"batch_size": 1}}, "batch_size"),
        ({"swich": {}}, "swich"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_the_reason(changes: dict, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_plan(**changes)
    assert reason in str(caught.value)


def test_the_plan_file_of_the_benchmarks_is_a_split_plan() -> None:
    plan = SplitPlan.from_toml(PLAN_FILE)
    assert plan.name == PLAN_FILE.stem and plan.party == "server"
    assert plan.adapter.hidden == 64 and plan.switch.window == 10


def test_a_plan_file_with_a_fault_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "faulty.toml"
    file.write_text(PLAN_FILE.read_text().replace("classes", "clases"))
    with pytest.raises(ConfigError, match=r"faulty\.toml is(.|\n)*clases: unknown key; did you mean 'classes'"):
        SplitPlan.from_toml(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        SplitPlan.from_toml(tmp_path / "none.toml")
    file.write_text("[")
    with pytest.raises(ConfigError, match="no valid TOML"):
        SplitPlan.from_toml(file)


def test_after_the_switch_f_comes_down_and_no_gradient_of_the_logits_goes_up() -> None:
    plan = make_plan()
    assert [spec.name for spec in features_down(plan, 2, False)] == ["image", "audio", "logits"]
    assert [spec.name for spec in features_down(plan, 2, True)] == ["image", "audio", "logits", "fused"]
    assert [spec.name for spec in gradients_up(plan, 2, False)] == ["image", "audio", "logits"]
    assert [spec.name for spec in gradients_up(plan, 2, True)] == ["image", "audio"]


def test_a_device_that_does_all_has_no_program_of_the_coordinator() -> None:
    assert program_names(make_plan(party="device")) == ["image.prefix", "audio.prefix", "step", "step_transfer", "answer"]
