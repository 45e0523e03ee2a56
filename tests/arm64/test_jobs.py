"""A job of the training process on an arm64 device ends with the update that the same job has on this machine."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.device.job_alone import client_job, random_examples
from edge_client.process.outcome import JOB, UPDATE, read_outcome
from lamina.bundles.manifest import ENGINES
from lamina.encoding.tensors import decode_file
from lamina.plans.plan import SGD
from tests.arm64.tools import ROOT
from tests.small_plans import CONTRASTIVE_MICRO, INT8_PREFIX, PLANS, shared_bundle

TOLERANCE = 1e-5
EXAMPLES = 11  # two batches of 4 and one of 3
JOBS = {
    "frozen layers": PLANS["sensors_layerwise"],
    "frozen layers in int8": INT8_PREFIX,
    "contrastive in micro-batches": CONTRASTIVE_MICRO[3],
}


@pytest.fixture
def device(request):
    if not request.config.pluginmanager.hasplugin("tests.arm64.emulated"):
        pytest.skip("needs an emulated device: make test-arm64")
    from tests.arm64.emulated import DEVICE

    return DEVICE


def python_here(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("engine", ["executorch", "onnxruntime"])
@pytest.mark.parametrize("plan", JOBS)
def test_a_job_ends_on_arm64_as_it_ends_here(device, plan, engine, shared_folder, program_cache, tmp_path):
    bundle, manifest = shared_bundle(JOBS[plan], ENGINES, shared_folder, program_cache)
    stage = manifest.plan.stages[-1].index
    data = random_examples(manifest.plan.model, EXAMPLES, tmp_path / "data.npz")
    outcomes, updates = [], []
    for name, python in (("here", python_here), ("there", device.python)):
        job = client_job(manifest, bundle, engine, stage, data, tmp_path / name)
        # Not AdamW: the gradient of a key's bias is 0 but for rounding, and AdamW takes full steps along what was rounded.
        job = replace(job, local_epochs=2, optimizer=SGD(momentum=0.9).model_dump())
        folder = Path(job.work_folder)
        folder.mkdir(parents=True)
        (folder / JOB).write_bytes(job.to_json())
        done = python("-m", "edge_client.train.trainer", str(folder))
        assert done.returncode == 0, done.stderr
        outcomes.append(read_outcome(folder))
        updates.append(decode_file(str(folder / UPDATE), manifest.exchange_specs(stage)))

    expected, given = outcomes
    assert expected["kind"] == given["kind"] == "trained"
    assert expected["num_examples"] == given["num_examples"] == EXAMPLES
    assert given["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
    expected, given = updates
    assert max(np.abs(value).max() for value in expected.values()) > 100 * TOLERANCE
    for name, value in expected.items():
        np.testing.assert_allclose(given[name], value, atol=TOLERANCE, rtol=0, err_msg=name)
