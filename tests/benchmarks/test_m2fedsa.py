"""M2FedSA on the device: the plan runs federated, what is frozen stays as it is and travels once, adapters begin at zero."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo.federated import federated_run
from benchmarks.m2fedsa import Below, LastBlock, ModalityAdapter, make
from benchmarks.simulate.simulation import Simulation
from export.models.models import Layer, build_model
from export.plans.resolve import resolve
from lamina.encoding.tensors import decode_file

PLAN = Path(__file__).parents[2] / "benchmarks" / "plans" / "m2fedsa.toml"


def _data(path: Path) -> Path:
    rng, arrays = np.random.default_rng(3), {}
    for split, count in (("train", 20), ("test", 4)):
        arrays[f"{split}_image"] = rng.normal(size=(count, 1, 28, 28)).astype(np.float32)
        arrays[f"{split}_audio"] = rng.normal(size=(count, 20, 13)).astype(np.float32)
        arrays[f"{split}_label"] = rng.integers(0, 10, count)
    np.savez(path, **arrays)
    return path


def test_training_starts_from_the_frozen_model() -> None:
    torch.manual_seed(0)
    block, x = Layer(64, 4, 4), torch.randn(2, 4, 64)
    assert torch.equal(LastBlock(block, 64)(x), block(x))
    torch.testing.assert_close(ModalityAdapter(64)(Below(torch.nn.Identity(), block)(x)), block(x))


def test_adapters_and_heads_are_trained_and_nothing_else() -> None:
    for encoder in make().values():
        trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert {name.rpartition(".adapter.")[0] for name in trained} == {"layers.0", "layers.5"}


@pytest.mark.slow
def test_it_runs_federated_and_what_is_frozen_stays_to_the_bit_and_simulation_equals_real_processes(tmp_path: Path) -> None:
    changes = {"rounds": 2, "cohort": {"size": 1, "min_updates": 1, "lease_seconds": 60}}
    plan = resolve(str(PLAN), changes).plan
    files, real = [_data(tmp_path / "data.npz")], tmp_path / "real"
    manifest, status = federated_run(plan, files, ["onnxruntime"], real, timeout_seconds=240, weights=tmp_path / "weights")
    simulated = Simulation(manifest, real / "bundle", files, tmp_path / "simulated", "onnxruntime").run()

    assert simulated.blobs == status.weights
    assert plan.stages[0].frozen == ("image.stem", "audio.stem")  # what is below the adapters is computed once
    own = build_model(plan.model, plan.seed).segments()
    for segment in manifest.segments:
        pulled = decode_file(str(tmp_path / "weights" / f"{segment.name}.safetensors"), segment.all_tensors)
        for name, value in own[segment.name].named_parameters():
            is_same = (pulled[name] == value.detach().numpy()).all()
            assert is_same == (not value.requires_grad), (segment.name, name)
    parts = {spec.name.partition("/")[0].rpartition(".")[2] for spec in manifest.exchange_specs(0)}
    assert parts == {"0", "5", "projection", "classifier", "head"}  # the layers with adapters, and the heads
