"""What the further methods add to a bundle: references, programs of devices without all modalities, calibration, zero-init."""

from itertools import pairwise

import pytest
import torch

from export.assemble import _Network, output_names
from export.build import export_bundle
from export.cost.counts import TRAINING_FACTOR, embedding_bytes, forward_macs, held_values
from export.cost.estimate import plan_costs, plan_examples
from export.faults.survey import examine
from export.fit.fit import Base, fits
from export.graphs.cut import cut_stage, find_segments
from export.graphs.stage_module import Terms
from export.inputs import example_inputs, raw_input
from export.models.models import build_model, zero_late_layers
from export.plans.notes import notes_of
from export.programs import stage_terms
from lamina.bundles.manifest import LABEL, Manifest, second_view
from lamina.encoding.tensors import encode, hash_bytes
from lamina.errors import ConfigError, CutError
from lamina.plans.model import ModelDescription, SelfSupervised, Supervised
from lamina.plans.plan import Augmentation, Calibration, FeatureStore, Plan, Stage, Training
from lamina.plans.strategies import make_stages
from tests.export.tiny import AUDIO, BATCH, CLASSES, HIDDEN, MOTION, OUTPUT, SHALLOW, describe
from tests.export.user_models import Block

MIB = 1 << 20
VIEWS = {"features": FeatureStore(views=2, keep="round"), "augmentation": {"audio": Augmentation(noise=0.1)}}


def plan_of(model: ModelDescription, strategy: str = "layerwise", **settings: object) -> Plan:
    training = settings.pop("training", {})
    if model.objective.kind == "self_supervised":
        training = VIEWS | training
    stages = settings.pop("stages", None) or make_stages(model, strategy, rounds=4, learning_rate=0.1)
    return Plan(
        name="methods",
        model=model,
        strategy=strategy,
        stages=stages,
        training=Training(**({"batch_size": BATCH} | training)),
        **settings,
    )


def with_objective(objective, model: ModelDescription = SHALLOW) -> ModelDescription:
    return model.model_copy(update={"objective": objective})


ONE = describe(AUDIO.model_copy(update={"layers": 3}))
MOCO = with_objective(SelfSupervised(method="moco", moon=0.5, align=0.5), describe(AUDIO.model_copy(update={"layers": 2})))
MOMENTUM = with_objective(SelfSupervised(method="moco"), MOCO)  # the extra terms take as long again to trace
FUSED = with_objective(
    Supervised(classes=CLASSES, fusion="gated", blend={"audio": 0.5}, align=0.3, distill=0.2, distill_temperature=2.0)
)


def frozen_stems(model: ModelDescription) -> tuple[Stage, ...]:
    """With the stem frozen from the first stage on, all stages of equal layers are equal: less to trace."""
    return make_stages(model, "layerwise", rounds=4, learning_rate=0.1, freeze_stems=True)


@pytest.fixture(scope="module")
def moco(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("moco")
    plan = plan_of(MOMENTUM, stages=frozen_stems(MOMENTUM))
    return export_bundle(plan, folder / "bundle", ("torch",), cache=folder / "cache", workers=1)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("fused")
    plan = plan_of(FUSED, stages=frozen_stems(FUSED)[:1], device_modalities=(("motion",),))
    return export_bundle(plan, folder / "bundle", ("torch",), cache=folder / "cache", workers=1)


def trained(stages: tuple[Stage, ...], rounds: tuple[int, ...]) -> tuple[Stage, ...]:
    return tuple(stage.model_copy(update={"rounds": count}) for stage, count in zip(stages, rounds, strict=True))


def program(manifest: Manifest, digests: dict[str, str]):
    return manifest.programs[digests["torch"]]


def referred(manifest: Manifest, stage: int, digests: dict[str, str], subset: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Kind -> names of the tensors that a program takes copies of."""
    names = [spec.name for spec in manifest.exchange_specs(stage, subset)]
    return {each.kind: [names[place] for place in each.tensors] for each in program(manifest, digests).references}


def test_stages_of_equal_layers_share_one_program_with_its_references(moco):
    first, second = moco.stages
    assert first.train == second.train and first.eval == second.eval
    assert program(moco, first.train).references


def test_self_supervised_programs_take_two_views_and_copies_of_all_but_the_predictor(moco):
    for stage in moco.stages:
        train = program(moco, stage.train)
        assert [spec.name for spec in train.inputs] == ["audio", second_view("audio")]
        encoding = [s.name for s in moco.exchange_specs(stage.index) if not s.name.startswith("audio.predictor/")]
        assert referred(moco, stage.index, stage.train) == {"momentum": encoding}
        assert program(moco, stage.eval).references == ()
        assert program(moco, stage.eval).weights == train.weights


def test_copies_are_part_of_the_planned_memory(moco):
    assert moco.plan.training.optimizer.kind == "adamw"
    for stage in moco.stages:
        train, count = program(moco, stage.train), stage.cost.active_parameters
        predictor = sum(spec.count for spec in moco.segment("audio.predictor").tensors)
        copy = count - predictor
        assert stage.cost.planned_bytes["torch"] == 4 * (4 * count + copy) + train.activation_bytes


def test_momentum_methods_count_one_view_of_the_trained_branch_and_simclr_two(moco):
    segments, examples = find_segments(build_model(MOCO, 0), MOCO), plan_examples(moco.plan)
    models = {name: with_objective(SelfSupervised(method=name), MOCO) for name in ("simclr", "byol")}
    plans = {name: plan_of(model, stages=frozen_stems(model)) for name, model in models.items()}
    costs = {name: plan_costs(plan, build_model(plan.model, 0)) for name, plan in plans.items()}
    for stage in moco.stages:
        active = moco.plan.stages[stage.index].active
        one_view = sum(forward_macs(segments[name], examples[name]) for name in active)
        assert stage.cost.flops_per_sample == TRAINING_FACTOR * one_view
        without = one_view - forward_macs(segments["audio.predictor"], examples["audio.predictor"])
        of = {name: report.stages[stage.index].with_heads.training_flops_per_sample for name, report in costs.items()}
        assert of == {"byol": TRAINING_FACTOR * one_view, "simclr": 2 * TRAINING_FACTOR * without}


def test_calibration_trains_all_that_is_attached_on_raw_inputs(tmp_path):
    model = with_objective(SelfSupervised(), MOCO)
    plan = plan_of(
        model, stages=trained(frozen_stems(model), (0, 2)), calibration=Calibration(data="own.npz", learning_rate=0.1)
    )
    manifest = export_bundle(plan, tmp_path / "bundle", ("torch",), cache=tmp_path / "cache", workers=1)
    skipped, last = manifest.stages
    assert not skipped.calibrate  # it has no rounds
    calibrate = program(manifest, last.calibrate)
    shapes = [t.shape for name in manifest.calibrated(1) for t in manifest.segment(name).tensors]
    assert list(calibrate.weights) == shapes and len(shapes) > len(program(manifest, last.train).weights)
    assert [spec.shape for spec in calibrate.inputs] == [AUDIO.input.shape] * 2


def test_calibration_has_the_momentum_copy_and_no_other():
    stage = plan_of(MOCO).stages[0]
    segments = find_segments(build_model(MOCO, 0), MOCO)
    assert [r.kind for r in cut_stage(segments, MOCO, stage, terms=Terms(held=False)).references] == ["momentum"]
    assert [r.kind for r in cut_stage(segments, MOCO, stage).references] == ["momentum", "start", "previous"]


def test_terms_of_a_supervised_loss_name_the_tensors_that_they_take_copies_of():
    segments, plan = find_segments(build_model(FUSED, 0), FUSED), plan_of(FUSED)
    for stage, kinds in zip(plan.stages, (["start"], ["start", "teacher"]), strict=True):
        cut = cut_stage(segments, FUSED, stage, terms=stage_terms(plan, stage))
        names = [spec.name for spec in cut.weights]
        taken = {each.kind: [names[place] for place in each.tensors] for each in cut.references}
        assert list(taken) == kinds
        assert taken["start"] == [name for name in names if ".projection/" in name]
        if "teacher" in taken:
            parts = ("norm", "projection", "head")
            assert sorted(taken["teacher"]) == sorted(n for n in names if n.partition("/")[0].rpartition(".")[2] in parts)
        assert cut.evaluation is not cut.module and cut.evaluation.reference_specs == ()


def test_heads_that_nobody_has_trained_yet_are_no_teacher():
    plan = plan_of(FUSED)
    skipped = plan.model_copy(update={"stages": trained(plan.stages, (0, 2))})
    assert [stage_terms(plan, stage).has_teacher for stage in plan.stages] == [False, True]
    assert [stage_terms(skipped, stage).has_teacher for stage in skipped.stages] == [False, False]


def test_a_device_with_some_modalities_trains_their_segments_and_the_head(fused):
    (stage,) = fused.stages
    (part,) = stage.partial
    assert part.modalities == ("motion",)
    train, specs = program(fused, part.train), fused.exchange_specs(0, part.modalities)
    assert list(train.weights) == [spec.shape for spec in specs]
    assert {spec.name.partition("/")[0].partition(".")[0] for spec in specs} == {"motion", "head"}
    assert [spec.name for spec in train.inputs] == ["motion", LABEL]
    taken = referred(fused, 0, part.train, part.modalities)
    assert taken == {"start": [spec.name for spec in specs if ".projection/" in spec.name]}
    assert 0 < part.planned_bytes["torch"] < stage.cost.planned_bytes["torch"]


def test_the_proximal_term_holds_the_weights_that_the_round_started_with():
    plain, near = (plan_of(SHALLOW, training={"proximal": c}) for c in (0.0, 0.1))
    assert (held_values(plain, 100, [7, 5]), held_values(near, 100, [7, 5])) == (12, 112)


# Zero-init.

LATE = plan_of(ONE, zero_init=True)


def test_with_zero_init_the_loss_is_the_same_before_and_after_a_stage_begins():
    model = build_model(ONE, 0)
    segments = find_segments(model, ONE)
    assert zero_late_layers(segments, LATE) == ["audio.layers.1", "audio.layers.2"]
    raw = example_inputs(ONE, (raw_input(AUDIO),), 3)[0]
    label = torch.tensor([0, 1, 2])
    losses = []
    for stage in LATE.stages:
        x = raw
        for name in stage.frozen_chain(ONE, "audio"):
            x = segments[name](x)
        loss, _ = cut_stage(segments, ONE, stage).module(x, label)
        losses.append(loss.item())
    assert all(before == after for before, after in pairwise(losses))


def test_layers_that_start_as_the_identity_learn():
    model = build_model(ONE, 0)
    segments = find_segments(model, ONE)
    zero_late_layers(segments, LATE)
    x = torch.randn(3, *AUDIO.feature_shape(1))
    cut = cut_stage(segments, ONE, LATE.stages[1])
    loss, _ = cut.module(x, torch.tensor([0, 1, 2]))
    gradients = dict(zip((s.name for s in cut.weights), torch.autograd.grad(loss, list(cut.module.parameters())), strict=True))
    for name in ("attention.out.weight", "mlp_out.weight", "mlp_out.bias"):
        assert gradients[f"audio.layers.1/{name}"].any()


def test_zero_init_leaves_the_first_stage_random_and_is_noted(tmp_path):
    plan = LATE.model_copy(update={"stages": LATE.stages[:1]})
    manifest = export_bundle(plan, tmp_path / "bundle", ("torch",), cache=tmp_path / "cache", workers=1)
    assert len(manifest.notes) == 1 and manifest.notes[0].startswith("zero_init: audio.layers.1 to audio.layers.2")
    random = {
        name: hash_bytes(encode({key: value.detach().numpy() for key, value in module.named_parameters()}))
        for name, module in find_segments(build_model(ONE, 0), ONE).items()
    }
    changed = {name for name, digest in manifest.initial_weights.items() if digest != random[name]}
    assert changed == {"audio.layers.1", "audio.layers.2"}


def test_zero_init_refuses_layers_of_another_kind():
    segments = find_segments(build_model(ONE, 0), ONE)
    with pytest.raises(CutError, match=r"zero_init: audio\.layers\.1 is a Block"):
        zero_late_layers(segments | {"audio.layers.1": Block(16)}, LATE)


# Notes.


def test_layers_that_are_attached_and_never_trained_are_noted():
    (note,) = notes_of(plan_of(ONE, stages=trained(plan_of(ONE).stages, (0, 0, 4))), [])
    assert note.startswith("audio.stem to audio.layers.1 (3 segments) are attached and never trained")
    assert notes_of(plan_of(ONE), []) == []


def test_reconstructions_are_named_as_such():
    plan = plan_of(MOCO, calibration=Calibration(data="server.npz", learning_rate=0.1))
    assert [note.partition(" ")[0] for note in notes_of(plan, [])] == ["calibration", "align"]
    assert all("our reconstruction" in note for note in notes_of(plan, []))


# The rest of the room.


@pytest.mark.parametrize("description", [MOCO, FUSED], ids=["moco", "fused"])
def test_the_doctor_looks_at_predictors_classifiers_and_fusions(description):
    shallow = tuple(encoder.model_copy(update={"layers": 1}) for encoder in description.encoders)
    description = description.model_copy(update={"encoders": shallow})
    plan = plan_of(description)
    findings = examine(plan, build_model(description, 0), ("onnxruntime",))
    looked_at = {name for finding in findings for name in finding.segments}
    assert looked_at == set(find_segments(build_model(description, 0), description))
    assert all(finding.trains for finding in findings), [finding.reason for finding in findings if not finding.trains]


@pytest.mark.parametrize("description", [MOCO, FUSED], ids=["moco", "fused"])
def test_the_cost_report_counts_them(description):
    report = plan_costs(plan_of(description), build_model(description, 0))
    heads = {segment.name: segment for segment in report.segments if segment.is_head}
    new = "audio.predictor" if description is MOCO else "audio.classifier"
    assert heads[new].forward_macs > 0
    assert heads[new].parameters == (
        OUTPUT * 128 + 128 + 128 * OUTPUT + OUTPUT if description is MOCO else OUTPUT * CLASSES + CLASSES
    )


def test_a_self_supervised_plan_that_is_held_keeps_its_batch_when_it_is_fitted_and_another_need_not():
    base, budget = Base(supervisor_bytes=0, talk_bytes=0, train_bytes=0), 1000 * MIB
    held, simclr, byol = (
        plan_of(with_objective(objective, describe(AUDIO.model_copy(update={"layers": 1}))))
        for objective in (SelfSupervised(moon=0.1), SelfSupervised(), SelfSupervised(method="byol"))
    )
    (fit,) = fits(held, "onnxruntime", base, budget)
    assert fit.plan.training.micro_batch == BATCH and fit.plan.training.features.keep == "round"
    with pytest.raises(ConfigError, match="a smaller model or batch_size"):
        next(fits(held, "onnxruntime", base, 1000))
    for plan in (simclr, byol):
        sizes = [fit.plan.training.micro_batch for fit in fits(plan, "onnxruntime", base, budget)]
        assert sizes[0] == BATCH and sizes[-1] == 1
    assert embedding_bytes(simclr) == 2 * 4 * BATCH * OUTPUT  # of both views
    assert embedding_bytes(byol) == 4 * 4 * BATCH * OUTPUT  # and of their keys


def test_a_self_supervised_model_is_deployed_without_its_heads():
    model = build_model(MOCO, 0)
    network = _Network(model, MOCO)
    x = torch.randn(2, *AUDIO.input.shape)
    (features,) = network(x)
    assert features.shape == (2, AUDIO.width) and output_names(MOCO) == ["audio_features"]
    assert torch.equal(features, model(x)[0])
    assert not any(tuple(p.shape) == (HIDDEN, AUDIO.width) for p in network.parameters())


def test_a_fused_model_is_deployed_with_its_fusion_and_without_its_classifiers():
    model = build_model(FUSED, 0)
    network = _Network(model, FUSED)
    x = [torch.randn(2, *encoder.input.shape) for encoder in (AUDIO, MOTION)]
    assert torch.equal(network(*x)[0], model(*x)[0])
    kept = sum(p.numel() for p in network.parameters())
    assert kept == sum(p.numel() for n, p in model.named_parameters() if not n.startswith("classifiers."))


def test_a_model_without_a_part_that_its_objective_asks_for_is_refused():
    model = build_model(MOCO, 0)
    del model.predictors
    with pytest.raises(CutError, match="the model has no module `predictors`"):
        find_segments(model, MOCO)


def test_a_head_of_another_width_is_refused():
    model = build_model(MOCO, 0)
    model.predictors["audio"] = torch.nn.Linear(OUTPUT, OUTPUT + 1)
    with pytest.raises(CutError, match=r"audio\.predictor gives shape \(2, 7\) for 2 samples, the plan promises \(2, 6\)"):
        find_segments(model, MOCO)
