"""The conformance suite: every engine, over every program the exporter writes, computes what eager PyTorch computes.

The reference is autograd on the whole, uncut model with its frozen parts detached. Each program is loaded once and run with
two sets of weights (nothing may be baked in) and with a batch of one, a partial and a full one.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.engines import load_engine
from export.cut import example_inputs, find_segments, raw_input
from export.models import MultimodalModel, build_model
from export.objectives import apply_objective
from lamina.bundle import blob_path
from lamina.errors import EngineMissingError
from lamina.manifest import ENGINES, LABEL, Manifest
from lamina.plan import Stage
from lamina.segments import HEAD, TensorSpec, norm, projection
from tests.small_plans import MAX_BATCH, PLANS, shared_bundle

TOLERANCE = 1e-5
BATCHES = (1, MAX_BATCH - 1, MAX_BATCH)
LABELS = TensorSpec(name=LABEL, shape=(), dtype="int64")


@pytest.fixture(params=ENGINES)
def engine(request):
    try:
        return load_engine(request.param)
    except EngineMissingError as error:
        pytest.skip(error.message)


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
