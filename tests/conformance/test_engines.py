"""The conformance suite: every engine, over every program the exporter writes, computes what eager PyTorch computes.

The reference is autograd on the whole, uncut model with its frozen parts detached. Each program is loaded once and run with
two sets of weights (nothing may be baked in) and with a batch of one, a partial and a full one.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.graphs.cut import find_segments
from export.inputs import example_inputs, raw_input
from export.models.models import MultimodalModel, build_model
from export.objectives.objectives import apply_objective
from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import ENGINES, LABEL, Manifest, gradient_input
from lamina.encoding.quantize import dequantize_rows, frozen_weights
from lamina.plans.plan import Stage
from lamina.plans.segments import HEAD, TensorSpec, norm, projection
from tests.small_plans import CONTRASTIVE_MICRO, INT8_PREFIX, MAX_BATCH, PLANS, SENSORS, SUPERVISED_MICRO, shared_bundle

TOLERANCE = 1e-5
BATCHES = (1, MAX_BATCH - 1, MAX_BATCH)
LABELS = TensorSpec(name=LABEL, shape=(), dtype="int64")


@pytest.fixture(params=PLANS)
def bundle(request, shared_folder: Path, program_cache: Path) -> tuple[Path, Manifest]:
    return shared_bundle(PLANS[request.param], ENGINES, shared_folder, program_cache)


def random_model(manifest: Manifest, seed: int) -> MultimodalModel:
    """Weights that are nowhere 0 or 1, so that no term of a gradient hides."""
    model = build_model(manifest.plan.model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def raw_batch(manifest: Manifest, batch: int, seed: int) -> dict[str, torch.Tensor]:
    specs = [raw_input(encoder) for encoder in manifest.plan.model.encoders]
    if manifest.plan.model.objective.kind == "supervised":
        specs.append(LABELS)
    arrays = example_inputs(manifest.plan.model, tuple(specs), batch, seed)
    return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}


def eager_step(model: MultimodalModel, manifest: Manifest, stage: Stage, raw: dict[str, torch.Tensor]):
    """(loss, correct, gradients in exchange order, features of the frozen prefix by modality) of the uncut model."""
    segments = find_segments(model, manifest.plan.model)
    features, embeddings = {}, []
    for modality in manifest.plan.model.modalities:
        x = raw[modality]
        for name in stage.frozen_chain(manifest.plan.model, modality):
            x = segments[name](x).detach()
        features[modality] = x
        for name in stage.active_chain(manifest.plan.model, modality):
            x = segments[name](x)
        embeddings.append(segments[projection(modality)](segments[norm(modality)](x).mean(dim=1)))
    loss, correct = apply_objective(manifest.plan.model.objective, segments.get(HEAD), embeddings, raw.get(LABEL))
    active = [parameter for name in stage.active for parameter in segments[name].parameters()]
    return loss.detach(), correct, torch.autograd.grad(loss, active), features


def active_arrays(model: MultimodalModel, manifest: Manifest, stage: Stage) -> list[np.ndarray]:
    segments = find_segments(model, manifest.plan.model)
    return [value.detach().numpy() for name in stage.active for value in segments[name].parameters()]


def distance(given: np.ndarray, expected: torch.Tensor) -> float:
    assert given.shape == tuple(expected.shape)
    return float(np.abs(given - expected.numpy()).max())


def test_training_programs_give_the_loss_and_gradients_of_the_uncut_model(engine, bundle):
    folder, manifest = bundle
    for stage in manifest.plan.stages:
        program = manifest.programs[manifest.stages[stage.index].train[engine.name]]
        loaded = engine.load(blob_path(folder, program.blob), program.model_copy(update={"role": "train"}))
        for seed in (1, 2):
            model = random_model(manifest, seed)
            for batch in BATCHES:
                raw = raw_batch(manifest, batch, seed)
                loss, correct, gradients, features = eager_step(model, manifest, stage, raw)
                inputs = [(features | {LABEL: raw.get(LABEL)})[spec.name].numpy() for spec in program.inputs]
                given = loaded.run([*active_arrays(model, manifest, stage), *inputs])
                assert len(given) == 2 + len(gradients)
                assert distance(given[0], loss) <= TOLERANCE
                assert int(given[1]) == int(correct)
                worst = max(distance(a, b) for a, b in zip(given[2:], gradients, strict=True))
                assert worst <= TOLERANCE, (stage.index, seed, batch)
        loaded.close()


def test_evaluation_programs_give_the_loss_and_the_count_of_the_uncut_model(engine, bundle):
    folder, manifest = bundle
    for stage in manifest.plan.stages:
        program = manifest.programs[manifest.stages[stage.index].eval[engine.name]]
        loaded = engine.load(blob_path(folder, program.blob), program.model_copy(update={"role": "eval"}))
        for seed in (1, 2):
            model = random_model(manifest, seed)
            for batch in BATCHES:
                raw = raw_batch(manifest, batch, seed)
                loss, correct, _, features = eager_step(model, manifest, stage, raw)
                inputs = [(features | {LABEL: raw.get(LABEL)})[spec.name].numpy() for spec in program.inputs]
                given = loaded.run([*active_arrays(model, manifest, stage), *inputs])
                assert len(given) == 2
                assert distance(given[0], loss) <= TOLERANCE
                assert int(given[1]) == int(correct)
        loaded.close()


def test_frozen_programs_chained_give_the_features_of_the_uncut_model(engine, bundle):
    folder, manifest = bundle
    last = manifest.plan.stages[-1]
    if not last.frozen:
        assert manifest.frozen_programs[engine.name] == {}
        return
    for seed in (1, 2):
        model = random_model(manifest, seed)
        segments = find_segments(model, manifest.plan.model)
        for batch in BATCHES:
            raw = raw_batch(manifest, batch, seed)
            *_, features = eager_step(model, manifest, last, raw)
            for modality in manifest.plan.model.modalities:
                x = raw[modality].numpy()
                for name in last.frozen_chain(manifest.plan.model, modality):
                    program = manifest.programs[manifest.frozen_programs[engine.name][name]]
                    loaded = engine.load(blob_path(folder, program.blob), program)
                    (given,) = loaded.run([*(p.detach().numpy() for p in segments[name].parameters()), x])
                    x = given.copy()
                    loaded.close()
                assert distance(x, features[modality]) <= TOLERANCE, (modality, seed, batch)


def pieces(batch: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def test_supervised_gradients_of_micro_batches_add_up_to_that_of_the_batch(engine, shared_folder, program_cache):
    folder, manifest = shared_bundle(SUPERVISED_MICRO, ENGINES, shared_folder, program_cache)
    _, whole = shared_bundle(PLANS[f"{SENSORS.name}_layerwise"], ENGINES, shared_folder, program_cache)
    assert manifest.programs == whole.programs  # only the micro-batch decides about them
    batch, micro_batch = manifest.plan.training.batch_size, manifest.plan.training.samples_in_memory
    for stage in manifest.plan.stages:
        program = manifest.programs[manifest.stages[stage.index].train[engine.name]].model_copy(update={"role": "train"})
        assert program.max_batch == micro_batch < batch
        loaded = engine.load(blob_path(folder, program.blob), program)
        model, raw = random_model(manifest, 1), raw_batch(manifest, batch, 1)
        loss, correct, gradients, features = eager_step(model, manifest, stage, raw)
        inputs = [(features | {LABEL: raw[LABEL]})[spec.name].numpy() for spec in program.inputs]
        total = [0.0, 0, *(np.zeros(value.shape, np.float32) for value in gradients)]
        for piece in pieces(batch, micro_batch):
            parts = [np.ascontiguousarray(x[piece]) for x in inputs]
            share = len(parts[0]) / batch
            given = loaded.run([*active_arrays(model, manifest, stage), *parts])
            total = [a + b * (1 if i == 1 else share) for i, (a, b) in enumerate(zip(total, given, strict=True))]
        assert abs(total[0] - float(loss)) <= TOLERANCE
        assert int(total[1]) == int(correct)
        assert max(distance(a, b) for a, b in zip(total[2:], gradients, strict=True)) <= TOLERANCE
        loaded.close()


@pytest.mark.parametrize("micro_batch", CONTRASTIVE_MICRO)
def test_embed_loss_and_backward_give_the_contrastive_gradient_of_the_batch(engine, micro_batch, shared_folder, program_cache):
    folder, manifest = shared_bundle(CONTRASTIVE_MICRO[micro_batch], ENGINES, shared_folder, program_cache)
    (stage,), (programs,) = manifest.plan.stages, manifest.stages
    modalities = manifest.plan.model.modalities
    digests = {
        "embed": programs.eval[engine.name],
        "loss": manifest.loss_programs[engine.name],
        "backward": programs.train[engine.name],
    }
    assert {manifest.programs[digest].role for digest in digests.values()} == set(digests)
    loaded = {r: engine.load(blob_path(folder, digest), manifest.programs[digest]) for r, digest in digests.items()}
    inputs_of = {role: [spec.name for spec in manifest.programs[digest].inputs] for role, digest in digests.items()}
    assert inputs_of["loss"] == list(modalities)
    for seed, batch in ((1, MAX_BATCH), (2, MAX_BATCH), (2, MAX_BATCH - 1)):
        model, raw = random_model(manifest, seed), raw_batch(manifest, batch, seed)
        loss, correct, gradients, _ = eager_step(model, manifest, stage, raw)
        weights = active_arrays(model, manifest, stage)

        embedded = []
        for piece in pieces(batch, micro_batch):
            given = loaded["embed"].run([*weights, *(raw[name][piece].numpy() for name in inputs_of["embed"])])
            embedded.append([embedding.copy() for embedding in given])
        given = loaded["loss"].run([np.concatenate(parts) for parts in zip(*embedded, strict=True)])
        assert distance(given[0], loss) <= TOLERANCE
        assert int(given[1]) == int(correct)
        at_embeddings = dict(zip(map(gradient_input, modalities), [value.copy() for value in given[2:]], strict=True))
        total = [np.zeros(value.shape, np.float32) for value in gradients]
        for piece in pieces(batch, micro_batch):
            arrays = {name: value[piece].numpy() for name, value in raw.items()}
            arrays |= {name: np.ascontiguousarray(value[piece]) for name, value in at_embeddings.items()}
            given = loaded["backward"].run([*weights, *(arrays[name] for name in inputs_of["backward"])])
            total = [a + b for a, b in zip(total, given, strict=True)]
        assert max(distance(a, b) for a, b in zip(total, gradients, strict=True)) <= TOLERANCE, (seed, batch)
    for program in loaded.values():
        program.close()


def test_activations_fall_with_the_micro_batch(engine, shared_folder, program_cache):
    planned = {}
    for size, plan in CONTRASTIVE_MICRO.items():
        _, manifest = shared_bundle(plan, ENGINES, shared_folder, program_cache)
        (stage,) = manifest.stages
        planned[size] = [manifest.programs[digests[engine.name]].activation_bytes for digests in (stage.train, stage.eval)]
    backward, embed = ({size: values[index] for size, values in planned.items()} for index in (0, 1))
    assert backward[1] < backward[2] < backward[3]  # these hold the gradients of the weights as well
    assert embed[3] / embed[2] == pytest.approx(3 / 2, rel=0.01)
    assert 2 * embed[1] <= embed[2]  # a batch that is always 1 is traced as such, and may need fewer copies


def test_int8_frozen_programs_compute_with_the_weights_that_int8_stands_for(engine, shared_folder, program_cache):
    folder, manifest = shared_bundle(INT8_PREFIX, ENGINES, shared_folder, program_cache)
    last = manifest.plan.stages[-1]
    exact = dict.fromkeys(last.frozen, "fp32") | {name: "int8" for name in last.frozen if ".layers." in name}
    for seed in (1, 2):
        model = random_model(manifest, seed)
        segments = find_segments(model, manifest.plan.model)
        raw = raw_batch(manifest, MAX_BATCH - 1, seed)
        for modality in manifest.plan.model.modalities:
            x = raw[modality].numpy()
            for name in last.frozen_chain(manifest.plan.model, modality):
                program = manifest.programs[manifest.frozen_programs[engine.name][name]]
                assert program.precision == exact[name]
                weights = [value.detach().numpy() for value in segments[name].parameters()]
                loaded = engine.load(blob_path(folder, program.blob), program)
                (given,) = loaded.run([*frozen_weights(weights, program.precision), x])
                if program.precision == "int8":
                    round_matrices(segments[name])
                with torch.no_grad():
                    expected = segments[name](torch.from_numpy(x))
                assert distance(given, expected) <= TOLERANCE, (name, seed)
                x = given.copy()
                loaded.close()


def round_matrices(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                (steps, scales) = frozen_weights([parameter.numpy()], "int8")
                parameter.copy_(torch.from_numpy(dequantize_rows(steps, scales)))


def test_the_error_of_an_int8_prefix_is_reported(engine, shared_folder, program_cache):
    _, manifest = shared_bundle(INT8_PREFIX, ENGINES, shared_folder, program_cache)
    errors = manifest.prefix_errors[engine.name]
    assert set(errors) == set(manifest.plan.stages[-1].frozen)
    assert manifest.prefix_errors_on == "random inputs"
    assert all(error < 1e-5 for name, error in errors.items() if name.endswith(".stem"))
    # A weight is off by at most half of 1/127 of its row's largest: well below 1 % of the features after one layer.
    assert all(1e-5 < error < 1e-2 for name, error in errors.items() if ".layers." in name)
