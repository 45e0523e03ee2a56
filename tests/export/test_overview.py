"""The figures of a bundle, read off its manifest: they add up to those of the exporter."""

import json

import pytest
from typer.testing import CliRunner

from lamina.bundles.bundle import bundle_digest
from lamina.bundles.manifest import ENGINES
from lamina.cli.main import app
from lamina.figures.overview import overview, plan_picture
from tests.small_plans import CONTRASTIVE, SUPERVISED, make_plan, shared_bundle


@pytest.fixture(
    scope="module", params=[(SUPERVISED, "layerwise"), (CONTRASTIVE, "progressive")], ids=["layerwise", "progressive"]
)
def bundle(request, shared_folder, program_cache):
    return shared_bundle(make_plan(*request.param), ENGINES, shared_folder, program_cache)


def test_modalities_add_up_to_the_stage(bundle):
    _, manifest = bundle
    for row, stage in zip(overview(manifest, "0" * 64).stages, manifest.stages, strict=True):
        cost = stage.cost
        assert sum(each.active_parameters for each in row.modalities) == cost.active_parameters
        assert sum(each.frozen_parameters for each in row.modalities) == cost.frozen_parameters
        assert sum(each.round_bytes_down for each in row.modalities) == cost.round_bytes_down
        assert sum(each.prefix_flops_per_sample for each in row.modalities) == cost.prefix_flops_per_sample
        # The exporter counts the stage as a whole, where a contrastive loss adds the product of the two embeddings.
        flops = sum(each.training_flops_per_sample for each in row.modalities)
        assert flops <= cost.flops_per_sample <= flops + 3 * manifest.plan.model.projection.output


def test_disk_is_what_a_device_of_that_stage_fetches(bundle):
    folder, manifest = bundle
    for row in overview(manifest, "0" * 64).stages:
        for engine, size in row.disk_bytes.items():
            stage = manifest.plan.stages[row.index]
            programs = manifest.stages[row.index]
            used = {programs.train[engine], programs.eval[engine], *(manifest.frozen_programs[engine][n] for n in stage.frozen)}
            weights = [manifest.initial_weights[name] for name in (*stage.active, *stage.frozen)]
            files = [folder / "blobs" / digest for digest in (*used, *weights)]
            assert size == sum(path.stat().st_size for path in files)


def test_the_picture_has_a_row_for_each_segment_and_a_letter_for_each_stage(bundle):
    _, manifest = bundle
    rows = dict(plan_picture(manifest))
    assert list(rows) == [segment.name for segment in manifest.segments]
    is_layerwise = manifest.plan.strategy == "layerwise"
    assert rows["image.stem"] == ("Af" if is_layerwise else "AA")
    assert rows["image.layers.1"] == ".A"


def test_inspect_verifies_and_shows_the_same_figures(bundle, tmp_path):
    folder, manifest = bundle
    done = CliRunner().invoke(app, ["inspect", str(folder), "--json", str(tmp_path / "o.json")])
    assert done.exit_code == 0, done.output
    assert f"{len(manifest.blobs)} blobs verified" in done.output
    assert json.loads((tmp_path / "o.json").read_bytes()) == json.loads(overview(manifest, bundle_digest(folder)).to_json())
