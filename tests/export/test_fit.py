"""Choosing settings for a budget, on predictions alone; that predictions are near is measured in
`benchmarks.fit_predictions`."""

import pytest

from export.fit import fit
from export.fit.fit import Base, fits
from export.fit.needs import MIB, StageNeeds, stage_needs
from lamina.errors import ConfigError
from lamina.plans.model import AudioFrames, Encoder, ModelDescription, Projection, Supervised
from lamina.plans.plan import FeatureStore, Plan, Training
from lamina.plans.strategies import make_stages
from tests.small_plans import PAIR, make_plan

BASE = Base(supervisor_bytes=9 * MIB, talk_bytes=40 * MIB, train_bytes=30 * MIB)
MODEL = ModelDescription(
    name="wide",
    encoders=(Encoder(modality="audio", input=AudioFrames(frames=64, coefficients=32), width=128, heads=4, layers=2),),
    projection=Projection(hidden=32, output=16),
    objective=Supervised(classes=4),
)


@pytest.fixture(scope="module", autouse=True)
def _trace_once():
    """A trace takes seconds, and the tests ask for the same few."""
    traced: dict[object, list[StageNeeds]] = {}

    def once(plan, micro_batch=None, on_progress=None):
        key = plan.model.name, str(plan.stages), micro_batch
        if key not in traced:
            traced[key] = stage_needs(plan, micro_batch)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "stage_needs", once)
        yield


def wide_plan(layers_per_stage: int) -> Plan:
    stages = make_stages(MODEL, "layerwise", 8, 0.1, layers_per_stage)
    return Plan(name="wide", model=MODEL, strategy="layerwise", stages=stages, training=Training(batch_size=16))


@pytest.fixture
def plan() -> Plan:
    return wide_plan(layers_per_stage=2)


def choices(plan, memory_mib, **options):
    return list(fits(plan, "executorch", BASE, int(memory_mib * MIB), **options))


def test_a_generous_budget_changes_nothing_that_costs(plan):
    best = choices(plan, 1000)[0]
    assert best.layers_per_stage == 2
    assert best.plan.stages == plan.stages
    assert best.plan.training.micro_batch == 16
    assert best.plan.training.features.encoding == "fp32"
    assert best.plan.training.prefix_precision == "fp32"


def test_a_smaller_budget_takes_a_smaller_micro_batch_and_then_fewer_layers(plan):
    found = choices(plan, 1000)
    assert [(each.layers_per_stage, each.plan.training.micro_batch) for each in found] == [
        (layers, micro) for layers in (2, 1) for micro in (16, 8, 4, 2, 1)
    ]
    peaks = [each.train_bytes for each in found]
    assert peaks[:5] == sorted(peaks[:5], reverse=True)
    assert all(one < two for one, two in zip(peaks[5:], peaks[:5], strict=True))  # one layer needs less than two
    best = choices(plan, peaks[2] / MIB + 9.01)[0]
    assert best.plan.training.micro_batch == 4
    assert sum(stage.rounds for stage in found[5].plan.stages) == 8


def test_the_peak_is_that_of_supervisor_and_the_larger_process(plan):
    best = choices(plan, 1000)[-1]
    assert best.peak_bytes == 9 * MIB + max(40 * MIB, best.train_bytes, best.fill_bytes)


def test_a_budget_that_cannot_be_met_names_the_smallest_that_would_do(plan):
    with pytest.raises(ConfigError, match=r"20 MiB are too few for 'wide' on executorch: the smallest .* is about (\d+) MiB"):
        choices(plan, 20)
    smallest = min(each.peak_bytes for each in choices(plan, 1000))
    with pytest.raises(ConfigError, match=f"about {-(-smallest // MIB)} MiB"):
        choices(plan, 20)
    assert choices(plan, smallest / MIB + 0.01)


def test_features_take_the_first_encoding_that_fits_the_disk_and_at_worst_a_part():
    plan = wide_plan(layers_per_stage=1)  # its second stage has a prefix
    whole = 2 * 1000 * 64 * 128 * 4  # the old and the new file, while one is extended
    for disk, encoding, share in (
        (whole, "fp32", 1.0),
        (whole - 1, "fp16", 1.0),
        (whole // 2 - 1, "int8", 1.0),
        (whole // 8, "int8", (whole / 8) / (2 * 1000 * 64 * (128 + 4))),
    ):
        best = choices(plan, 1000, disk_bytes=disk, examples=1000)[0]
        assert best.plan.training.features.encoding == encoding
        assert best.stored_share == pytest.approx(share)
        assert best.disk_bytes <= disk
    own = plan.model_copy(update={"training": Training(batch_size=16, features=FeatureStore(encoding="fp16"))})
    assert choices(own, 1000)[0].plan.training.features.encoding == "fp16"


def test_a_contrastive_step_in_micro_batches_is_predicted_from_its_three_programs():
    """So is that of a device with one modality, which may take more: it has two views of the larger encoder in memory."""
    plan = make_plan(PAIR, "end_to_end")  # one stage of one layer each
    pair, image = stage_needs(plan.model_copy(update={"device_modalities": (("image",),)}), 2)
    for needs in (pair, image):
        assert set(needs.graphs) == {"embed", "loss", "backward"} and needs.stage.index == 0
        assert needs.embedding_bytes == pair.embedding_bytes
    assert 0 < image.parameters < pair.parameters
    assert set(stage_needs(plan)[0].graphs) == {"train"}


def test_equal_stages_are_traced_once(plan):
    stages = make_stages(MODEL, "layerwise", 8, 0.1)
    again = stages[1].model_copy(update={"index": 2})
    assert [each.stage.index for each in stage_needs(plan.model_copy(update={"stages": (*stages, again)}))] == [0, 1]
