"""The device's own gradient of a batch that goes through in micro-batches, on every engine, against eager PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.device.job_alone import client_job, random_examples
from edge_client.engines import load_engine
from edge_client.train.epochs import reader
from edge_client.train.trainer import features, stage_model
from export.graphs.cut import cut_stage, find_segments
from export.models.models import build_model
from lamina.bundles.manifest import ENGINES
from tests.small_plans import CONTRASTIVE_MICRO, SUPERVISED_MICRO, shared_bundle

PLANS = {"supervised": SUPERVISED_MICRO} | {f"contrastive-{size}": plan for size, plan in CONTRASTIVE_MICRO.items()}


class NoLease:
    def keep(self):
        pass


@pytest.mark.parametrize("name", PLANS)
def test_the_gradient_of_a_batch_in_micro_batches_is_that_of_eager_torch(
    engine, name, shared_folder: Path, program_cache: Path, tmp_path: Path
) -> None:
    plan = PLANS[name]
    folder, manifest = shared_bundle(plan, ENGINES, shared_folder, program_cache)
    data = random_examples(plan.model, 2 * plan.training.batch_size, tmp_path / "data.npz")
    job = client_job(manifest, folder, engine.name, 0, data, tmp_path / "state")
    (inputs,) = features(job, engine, print, NoLease())
    indices = list(range(1, 1 + plan.training.batch_size))
    model = stage_model(job, engine)
    loss, correct = model.gradients(reader(inputs), indices)

    segments = find_segments(build_model(plan.model, plan.seed), plan.model)
    cut = cut_stage(segments, plan.model, plan.stages[0])
    batch = {key: torch.from_numpy(rows.take(indices)) for key, rows in inputs.items()}
    expected_loss, expected_correct = cut.module(*(batch[spec.name] for spec in cut.inputs))
    gradients = torch.autograd.grad(expected_loss, list(cut.module.parameters()))
    expected = np.concatenate([gradient.numpy().ravel() for gradient in gradients])
    assert loss == pytest.approx(expected_loss.item(), abs=1e-5)
    assert correct == int(expected_correct)
    assert np.abs(model.gradient - expected).max() <= 1e-5
    model.close()


@pytest.mark.parametrize("name", ["contrastive-2", "contrastive-3"])
def test_evaluation_in_micro_batches_is_that_of_the_whole_batch(
    name, shared_folder: Path, program_cache: Path, tmp_path: Path
) -> None:
    plan = PLANS[name]
    engine = load_engine("onnxruntime")
    folder, manifest = shared_bundle(plan, ENGINES, shared_folder, program_cache)
    data = random_examples(plan.model, plan.training.batch_size, tmp_path / "data.npz")
    job = client_job(manifest, folder, engine.name, 0, data, tmp_path / "state")
    (inputs,) = features(job, engine, print, NoLease())
    model = stage_model(job, engine)
    indices = range(plan.training.batch_size)
    trained, judged = model.gradients(reader(inputs), indices), model.evaluate(reader(inputs), indices)
    assert judged == (pytest.approx(trained[0], abs=1e-6), trained[1])
    model.close()
