"""`lamina export --memory-mb`: the settings that fit are chosen and shown, or the smallest budget that would do is named.

The device's processes are measured here, as the command does it, so no budget below is a number of this machine.
"""

import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lamina.bundles.bundle import read_bundle
from lamina.cli.main import app
from lamina.errors import ConfigError
from lamina.plans.model import AudioFrames, Encoder, ModelDescription, Projection, Supervised
from lamina.plans.plan import Plan, Training
from lamina.plans.strategies import make_stages

BATCH = 16
# One layer is one stage, quick to lower; long inputs, because a sample must take more than what processes vary by.
MODEL = ModelDescription(
    name="long",
    encoders=(Encoder(modality="audio", input=AudioFrames(frames=256, coefficients=4), width=16, heads=2, layers=1),),
    projection=Projection(hidden=8, output=4),
    objective=Supervised(classes=3),
)
_NOISE_MIB = 8


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stages = make_stages(MODEL, "layerwise", rounds=1, learning_rate=0.1)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_bytes(
        Plan(name="long", model=MODEL, strategy="layerwise", stages=stages, training=Training(batch_size=BATCH)).to_json()
    )
    return path


def export(plan: Path, out: Path, memory_mib: float) -> Result:
    arguments = ["export", str(plan), "--out", str(out), "--engine", "onnxruntime", "--jobs", "1"]
    return CliRunner().invoke(app, [*arguments, "--memory-mb", str(memory_mib)])


def test_a_generous_budget_leaves_the_batch_whole_and_the_table_says_so(plan: Path, tmp_path: Path) -> None:
    done = export(plan, tmp_path / "bundle", 100_000)

    assert done.exit_code == 0, done.output
    assert f"within 100000 MiB: micro-batch {BATCH}, 1 stages" in done.stderr
    assert re.search(rf"long: layerwise, batch {BATCH} *\n", done.stdout)
    assert read_bundle(tmp_path / "bundle").plan.training.samples_in_memory == BATCH


def test_a_budget_that_cannot_be_met_names_the_smallest_which_is_then_met(plan: Path, tmp_path: Path) -> None:
    refused = export(plan, tmp_path / "refused", 1)

    assert isinstance(refused.exception, ConfigError)
    found = re.search(
        r"1 MiB are too few for 'long' on onnxruntime: .* about (\d+) MiB, with micro-batch 1 ", str(refused.exception)
    )
    assert found and not (tmp_path / "refused").exists()

    done = export(plan, tmp_path / "bundle", int(found[1]) + _NOISE_MIB)

    assert done.exit_code == 0, done.output
    chosen = read_bundle(tmp_path / "bundle").plan.training.samples_in_memory
    assert chosen < BATCH
    assert f": micro-batch {chosen}, 1 stages" in done.stderr
    assert f"long: layerwise, batch {BATCH} in micro-batches of {chosen}" in done.stdout
