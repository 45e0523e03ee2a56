"""Tensors that the user froze inside layers that are trained, on every engine, as a device runs them: features, loss, and the
gradient of what is trained, against autograd on the uncut model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.device.job_alone import client_job, random_examples
from edge_client.train.epochs import reader
from edge_client.train.trainer import features, stage_model
from export.graphs.cut import find_segments
from export.models.models import build_model
from export.objectives.objectives import apply_objective
from lamina.bundles.manifest import ENGINES, LABEL
from lamina.encoding.quantize import dequantize_rows, frozen_weights
from lamina.plans.model import Contrastive, ModelDescription, ModuleEncoder, Projection, Supervised, Values
from lamina.plans.segments import HEAD, norm, projection
from tests.small_plans import make_plan, shared_bundle

TOLERANCE = 1e-5
PROJECTION = Projection(hidden=8, output=4)


def lora(modality: str, factory: str, width: int, layers: int) -> ModuleEncoder:
    return ModuleEncoder(
        modality=modality,
        factory=f"tests.export.user_models:{factory}",
        input=Values(shape=(5, width)),
        features=((5, width),) * (layers + 1),
        width=width,
    )


ONE = ModelDescription(
    name="lora",
    encoders=(lora("signal", "adapted", 16, 2),),
    projection=PROJECTION,
    objective=Supervised(classes=3),
)
PAIR = ModelDescription(
    name="lora_pair",
    encoders=(lora("left", "adapted_pair", 16, 1), lora("right", "adapted_pair", 8, 1)),
    projection=PROJECTION,
    objective=Contrastive(temperature=0.1),
)
SUPERVISED = make_plan(ONE, micro_batch=2)
EIGHT_BITS = make_plan(ONE, suffix="_int8", prefix_precision="int8", micro_batch=2)
MICRO = make_plan(PAIR, "end_to_end", "_micro", micro_batch=2)


class NoLease:
    def keep(self) -> None:
        pass


@pytest.mark.parametrize(("plan", "index"), [(SUPERVISED, 0), (SUPERVISED, 1), (EIGHT_BITS, 1), (MICRO, 0)])
def test_a_devices_gradients_are_those_of_the_uncut_model(
    engine, plan, index: int, shared_folder: Path, program_cache: Path, tmp_path: Path
) -> None:
    folder, manifest = shared_bundle(plan, ENGINES, shared_folder, program_cache)
    stage, batch = plan.stages[index], plan.training.batch_size
    data = random_examples(plan.model, batch, tmp_path / "data.npz")
    job = client_job(manifest, folder, engine.name, index, data, tmp_path / "state")
    (inputs,) = features(job, engine, print, NoLease())
    model = stage_model(job, engine)
    loss, correct = model.gradients(reader(inputs), range(batch))

    segments = find_segments(build_model(plan.model, plan.seed), plan.model)
    if plan is EIGHT_BITS:
        round_matrices(segments[f"{plan.model.modalities[0]}.layers.0"])
    trained = [value for name in stage.active for value in segments[name].parameters() if value.requires_grad]
    assert sum(value.numel() for value in trained) == model.parameters.size == manifest.stages[index].cost.active_parameters
    with np.load(data) as arrays:
        raw = {
            name: torch.from_numpy(arrays[f"train_{name}"])
            for name in (*plan.model.modalities, LABEL)
            if f"train_{name}" in arrays
        }
    embeddings = []
    for modality in plan.model.modalities:
        x = raw[modality]
        for name in (*stage.frozen_chain(plan.model, modality), *stage.active_chain(plan.model, modality)):
            x = segments[name](x)
        embeddings.append(segments[projection(modality)](segments[norm(modality)](x).mean(dim=1)))
    expected, right = apply_objective(plan.model.objective, segments.get(HEAD), embeddings, raw.get(LABEL))
    gradient = np.concatenate([value.numpy().ravel() for value in torch.autograd.grad(expected, trained)])
    assert loss == pytest.approx(expected.item(), abs=TOLERANCE)
    assert correct == int(right)
    assert np.abs(model.gradient - gradient).max() <= TOLERANCE
    model.close()


def round_matrices(module: torch.nn.Module) -> None:
    """What int8 stands for: in a frozen layer, what the user froze is rounded like the rest."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                steps, scales = frozen_weights([parameter.numpy()], "int8")
                parameter.copy_(torch.from_numpy(dequantize_rows(steps, scales)))
