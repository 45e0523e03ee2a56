"""A model with adapters in frozen layers, over real processes and in simulation: what is frozen stays as it is, to the bit."""

from pathlib import Path

import numpy as np

from benchmarks.demo.federated import federated_run
from benchmarks.simulate.simulation import Simulation
from export.models.models import build_model
from export.plans.resolve import resolve
from lamina.encoding.tensors import decode_file

TRAINED = 4 * 16
"""Numbers of a layer that are trained; 16 * 16 + 16 are not."""


def _data(path: Path) -> Path:
    rng, arrays = np.random.default_rng(3), {}
    for split, count in (("train", 10), ("test", 4)):
        arrays[f"{split}_signal"] = rng.normal(size=(count, 5, 16)).astype(np.float32)
        arrays[f"{split}_label"] = rng.integers(0, 3, count)
    np.savez(path, **arrays)
    return path


def test_what_is_frozen_stays_to_the_bit_and_travels_once_and_simulation_equals_real_processes(tmp_path: Path) -> None:
    """The encodings are the smallest there are: they round what is trained, and nothing else."""
    training = {"batch_size": 4, "download_encoding": "int8", "upload_encoding": "int8", "compression": "zstd"}
    changes = {"classes": 3, "rounds": 3, "training": training, "cohort": {"size": 1, "min_updates": 1, "lease_seconds": 60}}
    plan = resolve("tests.export.user_models:adapted", changes).plan
    files, real = [_data(tmp_path / "data.npz")], tmp_path / "real"
    manifest, status = federated_run(plan, files, ["onnxruntime"], real, timeout_seconds=240, weights=tmp_path / "weights")
    simulated = Simulation(manifest, real / "bundle", files, tmp_path / "simulated", "onnxruntime").run()

    assert simulated.blobs == status.weights
    own = build_model(plan.model, plan.seed).segments()
    for segment in manifest.segments:
        pulled = decode_file(str(tmp_path / "weights" / f"{segment.name}.safetensors"), segment.all_tensors)
        for name, value in own[segment.name].named_parameters():
            assert (pulled[name] == simulated.weights[segment.name][name]).all()
            assert (pulled[name] == value.detach().numpy()).all() == (not value.requires_grad), (segment.name, name)

    assert manifest.segment("signal.layers.1").parameters == TRAINED
    first, _, last = simulated.rounds
    frozen = {name: manifest.blobs[digest] for name, digest in manifest.frozen_tensors.items()}
    assert first.bytes_down["device-0"] > sum(frozen.values()) / 2  # layer 0 is in the graph, layer 1 is not there yet
    assert last.bytes_down["device-0"] <= manifest.stages[1].cost.round_bytes_down  # all else is there
    assert last.frozen["device-0"] == ("signal.stem", "signal.layers.0")
