"""A user's `requires_grad=False` is law: what is frozen is in no gradient, update or count, and stays as it is to the bit."""

import json

import pytest
import torch
from torch import nn

from export.assemble import assemble, load_weights
from export.build import export_bundle
from export.cost.estimate import plan_costs
from export.fit.fit import Base, fits
from export.fit.needs import stage_needs
from export.graphs.cut import find_segments
from export.models.adapters import adapt
from export.models.models import build_model
from export.models.parameters import frozen, trained
from export.plans.resolve import resolve
from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import decode_file
from lamina.errors import ConfigError, CutError
from tests.export import user_models
from tests.export.tiny import export_tiny

FACTORIES = "tests.export.user_models"
SETTINGS = {"classes": 3, "rounds": 3, "training": {"batch_size": 4}}
LAYER = "signal.layers.0"
TRAINED, CONSTANT = 4 * 16, 16 * 16 + 16


def read(factory="adapted", **changes):
    return resolve(f"{FACTORIES}:{factory}", SETTINGS | changes)


def export(folder, cache, resolved, engines=("torch",)) -> Manifest:
    return export_bundle(resolved.plan, folder, engines, model=resolved.model, cache=cache, workers=1)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, program_cache):
    folder, resolved = tmp_path_factory.mktemp("lora") / "bundle", read()
    return folder, resolved, export(folder, program_cache, resolved)


def test_frozen_tensors_are_in_a_file_of_their_own_and_equal_to_the_factorys(lora):
    folder, resolved, manifest = lora
    segment = manifest.segment(LAYER)
    assert [spec.name for spec in segment.tensors] == ["a", "b"]
    assert [spec.name for spec in segment.frozen] == ["base.weight", "base.bias"]
    assert set(manifest.frozen_tensors) == {LAYER, "signal.layers.1"}
    stored = decode_file(str(blob_path(folder, manifest.frozen_tensors[LAYER])), segment.frozen)
    for name, value in frozen(resolved.model.segments()[LAYER]).items():
        assert torch.equal(torch.from_numpy(stored[name]), value)


def test_they_are_in_no_gradient_no_update_and_no_count_of_active_parameters(lora):
    _, resolved, manifest = lora
    heads = sum(manifest.segment(name).parameters for name in manifest.plan.stages[1].active if ".layers." not in name)
    for stage, programs in zip(manifest.plan.stages, manifest.stages, strict=True):
        program = manifest.programs[programs.train["torch"]]
        layer = next(name for name in stage.active if ".layers." in name)
        assert program.frozen == tuple(spec.shape for spec in manifest.segment(layer).frozen)
        assert [spec.shape for spec in manifest.exchange_specs(stage.index)] == list(program.weights)
        assert manifest.segment(layer).parameters == TRAINED
    second = manifest.stages[1].cost
    assert second.active_parameters == heads + TRAINED
    assert second.frozen_parameters == (16 * 16 + 16) + TRAINED + 2 * CONSTANT  # the stem, layer 0, and the base of layer 1
    assert second.round_bytes_up < 4 * (heads + TRAINED) + 1000 < 4 * (heads + TRAINED + CONSTANT)
    assert any(f"{2 * CONSTANT} numbers with requires_grad=False" in note for note in manifest.notes)

    report = plan_costs(resolved.plan, resolved.model)
    assert report.stages[1].with_heads.active_parameters == second.active_parameters
    assert report.stages[1].with_heads.frozen_parameters == second.frozen_parameters
    assert report.stages[1].with_heads.round_bytes_up == second.round_bytes_up
    assert report.stages[1].with_heads.prefix_bytes_down == second.frozen_bytes
    assert report.stages[1].with_heads.round_bytes_down == second.round_bytes_down
    assert report.stages[0].with_heads.new_prefix_bytes_down == manifest.stages[0].cost.frozen_bytes  # fetched once


def test_a_manifest_names_a_file_of_frozen_tensors_for_each_segment_that_has_any_and_for_no_other(lora):
    _, _, manifest = lora
    for change in ({}, manifest.frozen_tensors | {"head": manifest.frozen_tensors[LAYER]}):
        values = json.loads(manifest.to_json()) | {"frozen_tensors": change}
        with pytest.raises(ConfigError, match="frozen_tensors must hold one blob for each segment that has frozen tensors"):
            Manifest.from_json(json.dumps(values))


def test_assembling_gives_the_factorys_frozen_tensors_to_the_bit(lora, tmp_path):
    """Those of the weights, as `lamina pull` writes them, or else the model's own."""
    _, resolved, manifest = lora
    segments = resolved.model.segments()
    pulled = {name: {k: v.detach().numpy() + v.requires_grad for k, v in m.named_parameters()} for name, m in segments.items()}
    without = {name: {key: pulled[name][key] for key in trained(module)} for name, module in segments.items()}
    made = assemble(manifest, pulled, tmp_path / "model")
    state = torch.load(made.state_dict)
    again = build_model(manifest.plan.model, manifest.plan.seed)
    load_weights(again, manifest.plan.model, without)
    for name, value in resolved.model.named_parameters():
        assert torch.equal(state[name], value + value.requires_grad)
        assert torch.equal(again.state_dict()[name], state[name])


def test_equal_layers_of_which_other_parts_are_frozen_have_programs_of_their_own(tmp_path, program_cache):
    """Their evaluation is the same function: only what is trained tells them apart."""
    resolved = read("signal", layers_per_stage=1)
    segments = resolved.model.segments()
    segments["signal.layers.1"].out.requires_grad_(False)
    manifest = export(tmp_path / "bundle", program_cache, resolved)
    first, second = (manifest.programs[stage.train["torch"]] for stage in manifest.stages)
    assert first.frozen == () and second.frozen == ((8, 16), (8,))
    assert [spec.shape for spec in manifest.exchange_specs(1)] == list(second.weights)


def test_a_manifest_without_frozen_tensors_does_not_mention_them(tmp_path, program_cache):
    manifest = export_tiny(tmp_path / "bundle", program_cache)
    assert "frozen_tensors" not in json.loads(manifest.to_json())
    assert not any("frozen" in segment for segment in json.loads(manifest.to_json())["segments"])
    assert not any("frozen" in program for program in json.loads(manifest.to_json())["programs"].values())
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("strategy", ["layerwise", "progressive", "end_to_end"])
def test_a_frozen_stem_acts_as_freeze_stems(strategy):
    mine, theirs = read("frozen_stem", strategy=strategy), read("signal", strategy=strategy, freeze_stems=True)
    assert mine.plan.stages == theirs.plan.stages
    assert all("signal.stem" in stage.frozen for stage in mine.plan.stages)


def test_a_plan_that_trains_a_frozen_stem_is_exported_with_it_in_the_prefix(tmp_path, program_cache):
    """Also where the stages were written before anybody froze it, and the model comes as a module."""
    resolved = read("signal")
    resolved.model.segments()["signal.stem"].requires_grad_(False)
    manifest = export(tmp_path / "bundle", program_cache, resolved)
    assert [stage.frozen[0] for stage in manifest.plan.stages] == ["signal.stem"] * 2
    assert manifest.segment("signal.stem").tensors == ()
    assert plan_costs(resolved.plan, resolved.model).stages[0].frozen == ("signal.stem",)


def test_layers_of_which_all_is_frozen_are_attached_with_the_next_that_is_trained():
    plan = read("lower_half", rounds=4).plan
    layers = [[name.rpartition(".")[2] for name in stage.active if ".layers." in name] for stage in plan.stages]
    assert layers == [["2"], ["4"]]
    assert plan.stages[0].frozen == ("signal.stem", "signal.layers.0", "signal.layers.1")
    assert plan.stages[1].frozen[-1] == "signal.layers.3"
    assert [stage.rounds for stage in plan.stages] == [2, 2]


def test_where_all_of_an_encoder_is_frozen_the_heads_are_trained(tmp_path, program_cache):
    resolved = read("all_frozen")
    (stage,) = resolved.plan.stages
    assert stage.frozen == ("signal.stem", *(f"signal.layers.{i}" for i in range(3)))
    manifest = export(tmp_path / "bundle", program_cache, resolved)
    assert manifest.stages[0].cost.active_parameters == sum(
        manifest.segment(name).parameters for name in ("signal.projection", "head")
    )


def test_a_model_without_anything_to_train_is_refused(tmp_path, program_cache):
    resolved = read("signal")
    resolved.model.requires_grad_(False)
    with pytest.raises(CutError, match="stage 0 trains nothing"):
        export(tmp_path / "bundle", program_cache, resolved)


def test_a_frozen_mask_of_minus_infinity_is_refused_with_its_name_and_the_way_out(tmp_path, program_cache):
    resolved = read("adapted")
    with torch.no_grad():
        resolved.model.segments()[LAYER].base.bias[0] = -torch.inf
    with pytest.raises(CutError, match=r"'base.bias' of signal.layers.0 holds NaN or infinity.*-1e9"):
        export(tmp_path / "bundle", program_cache, resolved)


@pytest.mark.parametrize("factory", ["adapted", "all_frozen"])
def test_a_prediction_of_memory_counts_them_once(factory):
    """No gradient and no moments: a number that is frozen is four bytes, one that is trained sixteen."""
    first = stage_needs(read(factory).plan)[0]
    assert first.held_values == (CONSTANT if factory == "adapted" else 0)
    trained_too = read("adapted")
    assert first.parameters < sum(value.numel() for value in trained_too.model.parameters())
    plan = next(fits(read(factory).plan, "torch", Base(1, 1, 1), memory_bytes=1 << 30)).plan
    assert plan.stages == read(factory).plan.stages


SELF_SUPERVISED = {
    "classes": None,
    "training": {"batch_size": 4, "augmentation": {"signal": {"noise": 0.1}}, "features": {"views": 2}},
}


@pytest.mark.parametrize(("method", "micro_batch"), [("byol", None), ("moco", 2), ("simclr", 2)])
def test_a_momentum_copy_has_no_copy_of_a_frozen_tensor(method, micro_batch, tmp_path, program_cache):
    """The export has compared every program with eager PyTorch."""
    training = SELF_SUPERVISED["training"] | {"micro_batch": micro_batch}
    objective = {"kind": "self_supervised", "method": method}
    manifest = export(tmp_path / "bundle", program_cache, read(objective=objective, classes=None, training=training))
    for stage in manifest.stages:
        program = manifest.programs[stage.eval["torch"] if micro_batch else stage.train["torch"]]
        assert program.frozen == ((16, 16), (16,))
        copied = [place for each in program.references for place in each.tensors]
        assert len(copied) == (0 if method == "simclr" else len(set(copied)))
        assert all(place < len(program.weights) for place in copied)


@pytest.mark.parametrize("changes", [{"micro_batch": 2}, {"prefix_precision": "int8"}])
def test_contrastive_micro_batches_and_an_int8_prefix_take_them(changes, tmp_path, program_cache):
    training = {"batch_size": 4} | changes
    resolved = read("adapted_pair", classes=None, projection={"hidden": 8, "output": 4}, training=training)
    manifest = export(tmp_path / "bundle", program_cache, resolved)
    frozen_program = manifest.programs[manifest.frozen_programs["torch"]["left.layers.0"]]
    assert (frozen_program.weights, frozen_program.frozen) == (((2, 16), (16, 2)), ((16, 16), (16,)))
    assert frozen_program.precision == changes.get("prefix_precision", "fp32")


def test_a_batch_norm_that_the_user_froze_stays_frozen_when_it_is_folded():
    class Layer(nn.Module):
        def __init__(self, flag):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
            self.requires_grad_(flag)

    from export.ops.rewrites import fold_batch_norm

    for flag in (True, False):
        folded, _ = fold_batch_norm(Layer(flag))
        assert {value.requires_grad for value in folded.parameters()} == {flag}
    without, (rewrite,) = fold_batch_norm(nn.BatchNorm1d(4, affine=False))
    assert not trained(without) and "no scale and shift of its own to train" in rewrite.note


def test_a_frozen_parameter_may_be_in_several_segments():
    model = read("adapted").model
    layers = model.encoders["signal"].layers
    layers[1].base.weight = layers[0].base.weight
    assert set(frozen(find_segments(model, read("adapted").plan.model)["signal.layers.1"])) == {"base.weight", "base.bias"}
    layers[1].a = layers[0].a
    with pytest.raises(CutError, match="tied"):
        find_segments(model, read("adapted").plan.model)


def test_asking_for_copies_of_what_is_shared_leaves_frozen_parameters_shared():
    shared = user_models.Adapted()
    shared.layers[1].base.weight = shared.layers[0].base.weight
    trunk = adapt(shared, copy_shared=True)
    assert trunk.rewrites == () and trunk.layers[1].base.weight is trunk.layers[0].base.weight
