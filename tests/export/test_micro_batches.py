"""Programs for micro-batches: their roles, names, shapes and planned memory. That they add up is in tests/conformance."""

import pytest

from export.cost.counts import planned_bytes
from export.graphs.cut import find_segments
from export.graphs.trace import example_batch, forward_graph
from lamina.bundles.manifest import gradient_input
from lamina.errors import CutError
from lamina.plans.segments import TensorSpec
from tests.export.tiny import (
    BATCH,
    COEFFICIENTS,
    OUTPUT,
    PAIR,
    TOKENS,
    TWO,
    WIDTH,
    export_tiny,
    model_of,
    one_stage,
    plan_of,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, cache):
    return export_tiny(tmp_path_factory.mktemp("pair") / "bundle", cache, plan=plan_of(PAIR, micro_batch=3))


def of_role(manifest, role):
    return [program for program in manifest.programs.values() if program.role == role]


def test_only_the_micro_batch_decides_about_supervised_programs(tmp_path, cache):
    planned = []
    for micro_batch in (1, 3):
        sizes = {"same": BATCH, "twice": 2 * BATCH}
        manifests = [
            export_tiny(
                tmp_path / f"{name}{micro_batch}", cache, plan=one_stage(plan_of(batch_size=n, micro_batch=micro_batch))
            )
            for name, n in sizes.items()
        ]
        assert manifests[0].programs == manifests[1].programs
        assert manifests[0].stages[0].cost == manifests[1].stages[0].cost
        (program,) = manifests[0].programs.values()  # train and eval: for torch they are one file
        assert (program.role, program.max_batch) == ("train", micro_batch)
        assert manifests[0].loss_programs == {}
        planned.append(manifests[0].stages[0].cost.planned_bytes["torch"])
    assert planned[0] < planned[1]


def test_a_batch_that_is_always_one_has_no_symbol():
    layer = model_of().segments()["audio.layers.0"]
    example = model_of().segments()["audio.stem"].position.detach()  # (1, tokens, width)
    assert example_batch(1) == 1
    assert not forward_graph(layer, (example,), 1).range_constraints


def test_names_and_shapes_of_the_three_contrastive_programs(pair):
    output = (OUTPUT,)
    embeddings = tuple(TensorSpec(name=m, shape=output) for m in PAIR.modalities)
    gradients = tuple(TensorSpec(name=f"{m}_gradient", shape=output) for m in PAIR.modalities)
    assert [gradient_input(m) for m in PAIR.modalities] == [spec.name for spec in gradients]
    (loss,) = of_role(pair, "loss")
    assert pair.loss_programs == {"torch": loss.blob}
    assert (loss.inputs, loss.weights, loss.max_batch) == (embeddings, (), BATCH)
    for stage, programs in zip(pair.plan.stages, pair.stages, strict=True):
        backward, embed = (pair.programs[digest["torch"]] for digest in (programs.train, programs.eval))
        assert (backward.role, embed.role) == ("backward", "embed")
        assert backward.inputs == embed.inputs + gradients
        shape = (TOKENS, WIDTH) if stage.index else (TOKENS, COEFFICIENTS)
        assert embed.inputs[0] == TensorSpec(name="audio", shape=shape)
        assert backward.weights == embed.weights == tuple(spec.shape for spec in pair.exchange_specs(stage.index))
        assert backward.max_batch == embed.max_batch == 3


def test_a_contrastive_batch_that_is_one_piece_stays_one_program(tmp_path, cache):
    assert not plan_of(PAIR).embeds_first
    plan = one_stage(plan_of(PAIR, micro_batch=BATCH))
    assert not plan.embeds_first
    manifest = export_tiny(tmp_path / "b", cache, plan=plan)
    assert {program.role for program in manifest.programs.values()} == {"train"}
    assert manifest.loss_programs == {}


def test_a_supervised_stage_needs_no_embeddings():
    assert not plan_of(TWO, micro_batch=1).embeds_first
    assert plan_of(PAIR, micro_batch=1).embeds_first


def test_planned_bytes_of_contrastive_micro_batches(pair):
    (loss,) = of_role(pair, "loss")
    for programs in pair.stages:
        peaks = [pair.programs[digest["torch"]].activation_bytes for digest in (programs.train, programs.eval)]
        at_once = max(*peaks, loss.activation_bytes) + 4 * BATCH * OUTPUT * 2
        cost = programs.cost
        assert cost.planned_bytes["torch"] == planned_bytes(cost.active_parameters, pair.plan.training.optimizer, at_once)


def test_embedding_first_is_a_further_forward_pass(pair, tmp_path, cache):
    whole = export_tiny(tmp_path / "b", cache, plan=plan_of(PAIR))
    assert (pair.plan.passes_of_a_step, whole.plan.passes_of_a_step) == (4, 3)
    for pieces, one in zip(pair.stages, whole.stages, strict=True):
        # The whole step has the products of the loss as well.
        assert pieces.cost.flops_per_sample * 3 == pytest.approx(one.cost.flops_per_sample * 4, rel=1e-3)


def test_the_loss_program_is_paid_once(pair):
    first, second = pair.stages
    (loss,) = of_role(pair, "loss")
    files = {first.train["torch"], first.eval["torch"], loss.blob}
    assert first.cost.program_bytes["torch"] == sum(pair.blobs[digest] for digest in files)
    frozen = {pair.frozen_programs["torch"][name] for name in pair.plan.stages[1].frozen}
    files = {second.train["torch"], second.eval["torch"], *frozen}
    assert second.cost.program_bytes["torch"] == sum(pair.blobs[digest] for digest in files)


def test_a_projection_of_another_width_than_described_is_refused():
    model = model_of(PAIR)
    wide = PAIR.model_copy(update={"projection": PAIR.projection.model_copy(update={"output": OUTPUT + 1})})
    with pytest.raises(CutError, match=r"audio\.projection gives shape \(2, 6\).*promises \(2, 7\)"):
        find_segments(model, wide)
