"""A bundle is what a phone takes as it is: this reader knows JSON, offsets and sha256, and nothing of lamina."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from export.models.models import build_model
from tests.small_plans import SENSORS, make_plan, shared_bundle

PLAN = make_plan(SENSORS)


@pytest.fixture(scope="module")
def folder(shared_folder, program_cache):
    return shared_bundle(PLAN, ("onnxruntime", "torch"), shared_folder, program_cache)[0]


def blob(folder, digest):
    data = (folder / "blobs" / digest).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    return data


def read_weights(data):
    """name -> array: 8 bytes of length, a JSON header with an offset for each tensor, then plain little-endian float32."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: np.frombuffer(body[slice(*spec["data_offsets"])], "<f4").reshape(spec["shape"])
        for name, spec in header.items()
        if spec["dtype"] == "F32"
    }


def test_the_manifest_says_where_everything_is_and_is_small(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (folder / "manifest.json").stat().st_size < 40_000
    for digest, size in manifest["blobs"].items():
        assert len(blob(folder, digest)) == size


def test_a_frozen_segment_runs_from_the_bundle_alone(folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    spec = manifest["plan"]["model"]["encoders"][0]["input"]
    x = np.random.default_rng(0).standard_normal((2, spec["channels"], spec["samples"]), dtype=np.float32)
    features = x
    for name in ("motion.stem", "motion.layers.0"):
        segment = next(each for each in manifest["segments"] if each["name"] == name)
        weights = read_weights(blob(folder, manifest["initial_weights"][name]))
        ordered = [weights[tensor["name"]] for tensor in segment["tensors"]]
        program = blob(folder, manifest["frozen_programs"]["onnxruntime"][name])
        session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        (features,) = session.run(None, dict(zip(names, [*ordered, features], strict=True)))
    model = build_model(PLAN.model, PLAN.seed).encoders["motion"]
    with torch.no_grad():
        expected = model.layers[0](model.stem(torch.from_numpy(x)))
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
