"""`lamina doctor PLAN`: every fault of a layer gets its reason and remedy, and holds back no other layer."""

import pytest
import torch
from torch import Tensor, nn

from export.doctor import Finding, examine
from export.models import Layer
from lamina.errors import CutError
from lamina.model import TextTokens
from lamina.names import ENGINES
from lamina.plan import Plan, Stage
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
    with pytest.raises(CutError, match="2 layers, the plan says 3"):
        examine(plan_of(ONE), model, ("torch",))
