"""Published figures come out of the function that serves `lamina cost`. Importing `transformers` takes most of the time."""

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.published import depth_dropout, lw_fedmml_advance, lw_fedmml_coco
from benchmarks.published.__main__ import BOUND, PAGE, rendered, table_of
from benchmarks.published.checks import Check, all_checks

CHECKS = all_checks()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.method}: {check.quantity}: {check.published}")
def test_a_published_figure_is_met_to_its_printed_digit(check: Check) -> None:
    assert check.shown == check.published
    if len(check.published) > 3:
        assert abs(check.deviation) < BOUND


def test_every_figure_of_the_methods_is_checked() -> None:
    assert len(CHECKS) == 43
    assert {check.source for check in CHECKS} == {"paper", "derived"}


def test_the_page_has_the_table_that_the_command_makes() -> None:
    assert table_of(PAGE.read_text()) == rendered(CHECKS), "run `python -m benchmarks.published --write`"


def test_parts_of_the_published_model_have_their_known_sizes() -> None:
    report = lw_fedmml_coco.report("layerwise", lw_fedmml_coco.SKEWED)
    parameters = {segment.name: segment.parameters for segment in report.segments}
    assert parameters["image.stem"] == 185_664
    assert {parameters[f"image.layers.{i}"] for i in range(12)} == {444_864}
    assert parameters["image.norm"] == 384
    assert parameters["text.stem"] == 23_835_648
    assert {parameters[f"text.layers.{i}"] for i in range(6)} == {7_087_872}
    assert parameters["text.norm"] == 0
    assert parameters["image.projection"] + parameters["text.projection"] == 39_616_512
    assert sum(segment.statistics for segment in report.segments) == 33_792
    assert report.unused_parameters == 37_056
    assert not any(segment.uncounted for segment in report.segments)


def test_most_of_the_published_traffic_is_heads() -> None:
    savings = lw_fedmml_coco.report("layerwise", lw_fedmml_coco.SKEWED)
    assert savings.without_heads.savings.communication > 3.5 * savings.with_heads.savings.communication


def test_shorter_texts_barely_move_the_saving() -> None:
    report = lw_fedmml_coco.report("layerwise", lw_fedmml_coco.SKEWED, text_tokens=12)
    assert round(report.with_heads.savings.flops, 2) == 2.35


def test_the_other_published_model_goes_through_the_same_code() -> None:
    report = lw_fedmml_advance.report("layerwise", lw_fedmml_coco.SKEWED)
    macs = {segment.name: segment.forward_macs for segment in report.segments}
    assert macs["audio.stem"] == 1212 * 16 * 16 * 768
    assert macs["audio.layers.0"] == 1214 * 768 * 768 * 12 + 2 * 1214 * 1214 * 768
    assert [len(stage.frozen) for stage in report.stages] == [0, 5, 8, 11, 14, 17]
    assert "head" in report.stages[0].active
    assert report.with_heads.savings.flops > 2.3


def test_another_counter_agrees_on_the_published_layers() -> None:
    """fvcore is what the papers counted with; it cannot follow a convolution on the meta device, so the layers get memory."""
    fvcore = pytest.importorskip("fvcore.nn")
    model = lw_fedmml_coco.make_model()
    report = lw_fedmml_coco.report("layerwise", lw_fedmml_coco.UNIFORM)
    macs = {segment.name: segment.forward_macs for segment in report.segments}
    for encoder in model.encoders:
        for name in (
            macs.keys() & encoder.segments.keys() & {"image.stem", "image.layers.0", "text.layers.0", "text.projection"}
        ):
            example = tuple(torch.zeros_like(value, device="cpu") for value in encoder.examples[name])
            analysis = fvcore.FlopCountAnalysis(encoder.segments[name].eval().to_empty(device="cpu"), example)
            counted = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
            products = sum(counted[kind] for kind in ("linear", "matmul", "conv", "addmm", "bmm", "einsum"))
            assert products == macs[name], name


def test_a_device_that_keeps_the_prefix_pays_for_one_layer_in_every_phase() -> None:
    report = depth_dropout.report("resident")
    whole = report.end_to_end.with_heads.round_bytes
    assert {stage.with_heads.round_bytes / whole for stage in report.stages} == {1 / 12}
