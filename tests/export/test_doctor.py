"""`lamina doctor PLAN`: every fault of a layer gets its reason and remedy, and holds back no other layer."""

import json

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from export.faults.survey import Finding, examine
from export.models.models import Layer
from export.plans.resolve import resolve
from export.trunk import MeanTokens, Trunk
from lamina.cli.main import app
from lamina.errors import CutError
from lamina.names import ENGINES
from lamina.plans.model import TextTokens, Values
from lamina.plans.plan import Plan, Stage
from tests.export.tiny import AUDIO, LAYERS, MOTION, ONE, TOKENS, TWO, WIDTH, Doubling, describe, model_of, plan_of

Step = tuple[str, int, int]


class Linear(nn.Module):
    """The base of the layers below: one weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)


class BranchesOnValues(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(-x)


class ReadsAValue(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.max().item()


class SingularValues(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linalg.svdvals(self.linear(x)).sum(-1, keepdim=True)[..., None]


class Fourier(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.linear(x)).real


class FixesTheBatch(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(2, TOKENS, -1))


class EndsTheGradient(Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(x)


class LeavesTorch(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.from_numpy(x.detach().numpy()))


class LeavesAWeightUnused(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Raises(Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such thing")


class GivesTwo(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Numbered(Linear):
    """As libraries number their layers; the number changes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Scaled(Numbered):
    """Here the number is part of what is computed, but not of what can be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) / self.number


class WithBuffer(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class Counts(WithBuffer):
    def forward(self, x: Tensor) -> Tensor:
        self.scale += 1
        return self.linear(x)


class LosesTheBatch(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(0)


class NoPool(nn.Module):
    """Leaves the tokens where they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def healthy() -> nn.Module:
    return Layer(WIDTH, heads=2, mlp_ratio=4)


LAYERS_OF_THE_SICK = {
    "healthy": healthy(),
    "branches": BranchesOnValues(),
    "reads": ReadsAValue(),
    "batch": FixesTheBatch(),
    "gradient": EndsTheGradient(),
    "numpy": LeavesTorch(),
    "unused": LeavesAWeightUnused(),
    "raises": Raises(),
    "two": GivesTwo(),
    "shape": Doubling(),
    "buffer": BatchNorm(),
    "half": nn.Linear(WIDTH, WIDTH).half(),
    "device": nn.Linear(WIDTH, WIDTH, device="meta"),
    "svd": SingularValues(),
    "fourier": Fourier(),
    "number 1": Numbered(1),
    "number 2": Numbered(2),
    "scale 1": Scaled(1),
    "scale 2": Scaled(2),
    "scale by text": Scaled("nought"),  # type: ignore[arg-type]
    "healthy again": healthy(),
}


def segment_of(key: str) -> str:
    return f"audio.layers.{list(LAYERS_OF_THE_SICK).index(key)}"


class Sick:
    """A model with every fault at once, and what the doctor finds."""

    def __init__(self) -> None:
        description = describe(AUDIO.model_copy(update={"layers": len(LAYERS_OF_THE_SICK)}), MOTION)
        self.plan = plan_of(description)
        self.model = model_of(description)
        self.model.encoders["audio"].layers = nn.ModuleList(LAYERS_OF_THE_SICK.values())
        motion = self.model.encoders["motion"]
        motion.layers[2].mlp_in.weight = motion.layers[0].mlp_in.weight
        motion.pool = NoPool()
        self.model.loose = nn.Parameter(torch.ones(1))
        self.findings = examine(self.plan, self.model, ENGINES)

    def of(self, segment: str, engine: str = "onnxruntime") -> Finding:
        (found,) = [each for each in self.findings if segment in each.segments and each.engine == engine]
        return found


@pytest.fixture(scope="module")
def sick() -> Sick:
    return Sick()


def test_a_built_in_plan_is_all_yes_on_every_engine_and_progress_is_told() -> None:
    plan, steps = plan_of(TWO), list[Step]()

    findings = examine(plan, model_of(TWO), ENGINES, lambda *step: steps.append(step))

    assert all(each.trains and each.runs_frozen is not False and not each.reason for each in findings)
    assert not any(each.blocks(plan) for each in findings)
    layers = [each for each in findings if "motion.layers.2" in each.segments]
    assert {each.engine for each in layers} == set(ENGINES)
    assert layers[0].segments == tuple(f"{m}.layers.{i}" for m in ("audio", "motion") for i in range(LAYERS))
    assert all(each.runs_frozen is None for each in findings if each.segment == "head")
    assert steps[0] == ("audio.stem", 0, 6) and [done for _, done, _ in steps] == list(range(7))


@pytest.mark.parametrize(
    ("key", "runs_frozen", "reason", "remedy"),
    [
        ("branches", False, "depends on the values of its input (test_doctor.py, line", "torch.where"),
        ("reads", False, "values of its input", ".item()"),
        ("batch", False, "one batch size only", "x.shape[0]"),
        ("gradient", True, "no gradient to its weights", "no_grad"),
        ("numpy", False, "leaves torch", "torch operations"),
        ("unused", True, "does not depend on spare.weight", "remove the parameter"),
        ("raises", False, "raises KeyError for an input of shape (2, 4, 16)", "forward()"),
        ("two", False, "gives a tuple", "wrap it"),
        ("shape", False, "gives shape (2, 8, 16) for 2 samples, the plan promises (2, 4, 16)", "make the two agree"),
        ("buffer", False, "buffer 'norm.running_mean'", "LayerNorm"),
        ("half", False, "parameter 'weight' is torch.float16", "model.float()"),
        ("device", False, "parameter 'weight' is on meta", "model.cpu()"),
        ("scale by text", False, "raises TypeError", "forward()"),
    ],
)
def test_a_faulty_layer_has_its_reason_and_remedy_on_every_engine(
    sick: Sick, key: str, runs_frozen: bool, reason: str, remedy: str
) -> None:
    for engine in ENGINES:
        found = sick.of(segment_of(key), engine)

        assert found.segments == (segment_of(key),) and not found.trains and found.runs_frozen is runs_frozen
        assert reason in found.reason and remedy in found.remedy and found.blocks(sick.plan)


def test_healthy_segments_stay_yes_beside_faulty_ones(sick: Sick) -> None:
    for engine in ENGINES:
        layer = sick.of(segment_of("healthy"), engine)
        assert layer.segments == (segment_of("healthy"), segment_of("healthy again"), "motion.layers.1")
        assert layer.trains and layer.runs_frozen and not layer.reason
        assert all(sick.of(name, engine).trains for name in ("audio.stem", "audio.norm", "motion.projection", "head"))


@pytest.mark.parametrize(("key", "operator"), [("svd", "svd"), ("fourier", "fft")])
def test_an_operator_that_an_engine_lacks_is_named_for_that_engine_alone(sick: Sick, key: str, operator: str) -> None:
    by_engine = {engine: sick.of(segment_of(key), engine) for engine in ENGINES}

    assert by_engine["torch"].trains and by_engine["torch"].runs_frozen
    lacking = [found for found in by_engine.values() if not found.trains]
    assert lacking
    assert all(operator in found.reason and found.engine in found.reason and found.remedy for found in lacking)


def test_a_tied_parameter_is_told_at_both_ends(sick: Sick) -> None:
    first, last = sick.of("motion.layers.0"), sick.of("motion.layers.2")

    assert "tied to motion.layers.2/mlp_in.weight" in first.reason and "tied to motion.layers.0/mlp_in.weight" in last.reason
    assert first.blocks(sick.plan) and "of its own" in last.remedy


def test_a_parameter_outside_of_all_segments_is_told(sick: Sick) -> None:
    found = sick.of("(parameter loose)")

    assert "no segment" in found.reason and found.blocks(sick.plan)


def test_a_pool_that_fails_is_told_with_the_norm_before_it(sick: Sick) -> None:
    found = sick.of("motion.norm")

    assert not found.trains and "(2, 4, 16)" in found.reason and "(2, 16)" in found.reason


def test_layers_that_differ_by_a_number_alone_share_a_row(sick: Sick) -> None:
    assert sick.of(segment_of("number 1")).segments == (segment_of("number 1"), segment_of("number 2"))
    assert sick.of(segment_of("scale 1")).segments == (segment_of("scale 1"), segment_of("scale 2"))


def test_what_no_stage_does_with_a_layer_does_not_block_the_plan(sick: Sick) -> None:
    name = segment_of("gradient")  # it runs frozen, and cannot be trained
    trains_it = next(stage for stage in sick.plan.stages if name in stage.active)
    freezes_it = next(stage for stage in sick.plan.stages if name in stage.frozen)

    def plan_with(stage: Stage) -> Plan:
        return sick.plan.model_copy(update={"stages": (stage,)})

    assert sick.of(name).blocks(plan_with(trains_it)) and not sick.of(name).blocks(plan_with(freezes_it))
    assert sick.of(segment_of("half")).blocks(plan_with(sick.plan.stages[0]))  # no export takes such a model


def test_texts_a_norm_without_parameters_and_an_int8_prefix_are_fine() -> None:
    text = AUDIO.model_copy(update={"modality": "text", "input": TextTokens(vocabulary=11, length=TOKENS)})
    description = describe(text)
    model = model_of(description)
    model.encoders["text"].norm = nn.Identity()

    findings = examine(plan_of(description, prefix_precision="int8"), model, ("executorch", "onnxruntime"))

    assert all(each.trains and not each.reason for each in findings)
    assert all(each.runs_frozen for each in findings if ".layers." in each.segment)


def test_a_model_without_the_parts_is_refused_as_a_whole() -> None:
    with pytest.raises(CutError, match="encoders"):
        examine(plan_of(ONE), nn.Linear(2, 2), ("torch",))
    model = model_of(ONE)
    del model.encoders["audio"].layers[2]
    with pytest.raises(CutError, match=r"only in the description \['audio\.layers\.2'\].*make the two agree"):
        examine(plan_of(ONE), model, ("torch",))


class Mine(nn.Module):
    """A user's model, which its factory alone describes: three equal layers around one more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.input = Values(shape=(TOKENS, 3))
        self.stem = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList([Numbered(1), layer, Numbered(1), Numbered(1)])


def sound() -> nn.Module:
    return Mine(Numbered(1))


def half_layer() -> nn.Module:
    return Mine(Numbered(1).half())


def layer_without_values() -> nn.Module:
    return Mine(Numbered(1).to("meta"))


def layer_with_buffer() -> nn.Module:
    return Mine(WithBuffer())


def layer_that_counts() -> nn.Module:
    return Mine(Counts())


def raising_layer() -> nn.Module:
    return Mine(Raises())


def layer_that_loses_the_batch() -> nn.Module:
    return Mine(LosesTheBatch())


def layer_that_normalises_batches() -> nn.Module:
    return Mine(nn.BatchNorm1d(TOKENS, track_running_stats=False))


def half_trunk() -> Trunk:
    made = half_layer()
    return Trunk(made.stem, tuple(made.layers), nn.Identity(), MeanTokens(), made.input)


def half_layer_and_a_spare_one() -> nn.Module:
    made = half_layer()
    made.spare = nn.Linear(2, 2, bias=False).half()
    return made


def by_segment(source: str, changes: dict[str, int] | None = None) -> dict[str, Finding]:
    """Segment -> finding, as `lamina doctor` has it. Only torch is asked: faults of a layer are the same on every engine."""
    read = resolve(source, changes, check=False)
    found = examine(read.plan, read.model, ("torch",), faults=read.faults)
    assert all(each.blocks(read.plan) for each in found if each.reason)
    return {segment: each for each in found for segment in each.segments}


def of_factory(name: str) -> dict[str, Finding]:
    return by_segment(f"{__name__}:{name}", {"classes": 3})


FAULTY = "signal.layers.1"
SEGMENTS = ["signal.stem", *(f"signal.layers.{i}" for i in range(4)), "signal.norm", "signal.projection", "head"]


@pytest.mark.parametrize(
    ("factory", "reason", "remedy"),
    [
        ("half_layer", "parameter 'linear.weight' is torch.float16", "model.float()"),
        ("half_trunk", "parameter 'linear.weight' is torch.float16", "model.float()"),
        ("layer_without_values", "parameter 'linear.weight' is on meta", "model.cpu()"),
        ("layer_that_counts", "changes its buffer 'scale' in forward()", "LayerNorm"),
        ("layer_that_normalises_batches", "track_running_stats=False", "GroupNorm"),
    ],
)
def test_a_faulty_layer_of_a_factory_leaves_every_other_segment_as_it_is(factory: str, reason: str, remedy: str) -> None:
    found = of_factory(factory)

    assert sorted(found) == sorted(SEGMENTS)
    assert reason in found[FAULTY].reason and remedy in found[FAULTY].remedy
    assert not found[FAULTY].trains and not found[FAULTY].runs_frozen
    assert all(each.trains and not each.reason for name, each in found.items() if name != FAULTY)


@pytest.mark.parametrize(
    ("factory", "reason", "remedy"),
    [
        ("raising_layer", "it raises KeyError for an input of shape (2, 4, 16)", "forward()"),
        ("layer_that_loses_the_batch", "it gives shape (4, 16) for 2 samples", "first axis"),
    ],
)
def test_behind_a_layer_that_fails_the_input_is_not_known_and_that_is_said(factory: str, reason: str, remedy: str) -> None:
    found = of_factory(factory)
    behind = SEGMENTS[SEGMENTS.index(FAULTY) + 1 : -1]

    assert sorted(found) == sorted(SEGMENTS)
    assert reason in found[FAULTY].reason and remedy in found[FAULTY].remedy
    assert all(found[name].trains and not found[name].reason for name in ("signal.stem", "signal.layers.0", "head"))
    assert not any(found[name].trains for name in behind)
    assert all("shape of its input is not known, as signal.layers.1 fails" in found[name].reason for name in behind)
    assert all(found[name].remedy == "mend signal.layers.1 first" for name in behind)


def test_where_a_plan_has_the_shapes_the_layers_behind_a_failing_one_are_looked_at(tmp_path) -> None:
    file = tmp_path / "plan.json"
    plan = resolve(f"{__name__}:sound", {"classes": 3}).plan
    file.write_text(plan.to_json().decode().replace(f"{__name__}:sound", f"{__name__}:raising_layer"))

    found = by_segment(str(file))

    assert "raises KeyError" in found[FAULTY].reason
    assert all(found[name].trains and not found[name].reason for name in SEGMENTS if name != FAULTY)


def test_a_faulty_tensor_that_no_segment_has_is_told_beside_the_segments() -> None:
    found = of_factory("half_layer_and_a_spare_one")

    assert set(found) - set(SEGMENTS) == {"(signal: spare.weight)"}
    assert "torch.float16" in found["(signal: spare.weight)"].reason and "float16" in found[FAULTY].reason


def test_the_command_lists_all_segments_of_a_faulty_model_and_ends_with_status_1(tmp_path) -> None:
    arguments = ["doctor", f"{__name__}:half_layer", "--engine", "onnxruntime", "--json", str(tmp_path / "found.json")]

    done = CliRunner().invoke(app, arguments)

    rows = json.loads((tmp_path / "found.json").read_bytes())["findings"]
    assert done.exit_code == 1 and "cannot be exported for: onnxruntime" in done.output
    assert sorted(name for row in rows for name in (row["segment"], *row["like"])) == sorted(SEGMENTS)
    assert [row["segment"] for row in rows if not row["trains"]] == [FAULTY]
