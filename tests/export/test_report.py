"""The cost report against the manifest of an export, against numbers counted by hand, and against another counter."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from export.cost.counts import count_forward
from export.cost.estimate import cost_report, plan_costs, plan_examples
from export.models.models import Layer, build_model
from lamina.cli.cost import cost
from lamina.encoding.tensors import ENCODINGS, encode
from lamina.errors import ConfigError, CutError
from lamina.figures.cost_report import Accounting, CostReport, file_bytes
from lamina.plans.plan import Stage
from lamina.plans.segments import TensorSpec
from lamina.plans.strategies import make_stages
from tests.export.tiny import AUDIO, LAYERS, ONE, PAIR, TWO, export_tiny, model_of, plan_of

CLI = Typer()
CLI.command()(cost)


def report_of(plan, accounting=None) -> CostReport:
    return plan_costs(plan, build_model(plan.model, plan.seed), accounting)


def test_it_says_what_the_export_says(tmp_path):
    shallow = ONE.model_copy(update={"encoders": (AUDIO.model_copy(update={"layers": 2}),)})
    plan = plan_of(shallow, download_encoding="int8", upload_encoding="fp16")
    manifest = export_tiny(tmp_path / "bundle", tmp_path / "programs", plan=plan)
    for stage, exported in zip(report_of(plan).stages, manifest.stages, strict=True):
        step, promised = stage.with_heads, exported.cost
        assert step.active_parameters == promised.active_parameters
        assert step.frozen_parameters == promised.frozen_parameters
        assert step.training_flops_per_sample == promised.flops_per_sample
        assert step.prefix_flops_per_sample == promised.prefix_flops_per_sample
        assert step.round_bytes_down == promised.round_bytes_down
        assert step.round_bytes_up == promised.round_bytes_up
        assert step.prefix_bytes_down == promised.frozen_bytes


def test_embedding_first_counts_in_the_plan_and_not_in_the_end_to_end_training_beside_it():
    whole, pieces = (report_of(plan_of(PAIR, micro_batch=size)) for size in (None, 3))
    assert 3 * pieces.with_heads.plan.training_flops == 4 * whole.with_heads.plan.training_flops > 0
    assert pieces.with_heads.end_to_end == whole.with_heads.end_to_end


NAMES = st.text(st.sampled_from("abcdefgh0123456789._é"), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(1, 12), max_size=3).map(tuple)


@given(st.dictionaries(NAMES, SHAPES, max_size=6), st.sampled_from(ENCODINGS))
@settings(max_examples=60)
def test_the_size_of_a_file_is_known_without_making_it(shapes, encoding):
    specs = [TensorSpec(name=name, shape=shape) for name, shape in shapes.items()]
    data = encode({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, encoding)
    assert file_bytes(specs, encoding) == len(data)
    assert file_bytes(specs, encoding, with_header=False) == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_heads_are_what_the_two_counts_differ_by():
    report = report_of(plan_of(TWO))
    heads = [segment for segment in report.segments if segment.is_head]
    assert [segment.name for segment in heads] == ["audio.projection", "motion.projection", "head"]
    for stage in (*report.stages, report.end_to_end):
        difference = stage.with_heads.training_flops_per_sample - stage.without_heads.training_flops_per_sample
        assert difference == 3 * sum(segment.forward_macs for segment in heads)
        fewer = stage.with_heads.active_parameters - stage.without_heads.active_parameters
        assert fewer == sum(segment.parameters for segment in heads)
        assert stage.with_heads.frozen_bytes == stage.without_heads.frozen_bytes


def test_end_to_end_saves_nothing_and_has_no_prefix():
    savings = report_of(plan_of(strategy="end_to_end")).with_heads.savings
    assert savings.communication == savings.communication_with_prefix == 1
    assert savings.flops == savings.flops_cached == 1


def test_the_cache_is_filled_once_with_each_newly_frozen_layer():
    report = report_of(plan_of(local_epochs=5))
    macs = {segment.name: segment.forward_macs for segment in report.segments}
    assert [stage.with_heads.fill_flops_per_sample for stage in report.stages] == [
        0,
        macs["audio.stem"] + macs["audio.layers.0"],
        macs["audio.layers.1"],
    ]
    run = report.with_heads.plan
    assert run.fill_flops == macs["audio.stem"] + macs["audio.layers.0"] + macs["audio.layers.1"]
    assert run.prefix_flops == 5 * sum(s.rounds * s.with_heads.prefix_flops_per_sample for s in report.stages)
    assert run.cached_flops < run.flops


def test_the_cache_is_filled_with_the_views_that_a_stage_takes():
    plan = plan_of(ONE, local_epochs=2)
    segments, examples = model_of(ONE).segments(), plan_examples(plan)
    stages = make_stages(ONE, "layerwise", [1, 1, 3], 0.1)
    counts = {views: cost_report(segments, examples, stages, name="x", local_epochs=2, views=views) for views in (1, 4)}
    once, more = (counts[views].with_heads.plan.fill_flops for views in (1, 4))
    _, second, third = (stage.with_heads.fill_flops_per_sample for stage in counts[4].stages)
    assert (once, more) == (second + third, 2 * second + 4 * third)  # of 2 epochs, and of 6


def test_a_stage_without_rounds_fills_nothing_and_its_layers_are_paid_by_the_next():
    plan = plan_of()
    stages = make_stages(plan.model, "layerwise", [2, 0, 1], 0.1)
    report = report_of(plan.model_copy(update={"stages": stages}))
    last = report.stages[-1].with_heads
    assert last.fill_flops_per_sample == last.prefix_flops_per_sample
    assert report.with_heads.plan.fill_flops == last.prefix_flops_per_sample
    assert report.with_heads.plan.new_prefix_bytes_down == last.prefix_bytes_down


def test_devices_that_come_once_fetch_the_prefix_and_run_it_in_every_round():
    plan = plan_of(local_epochs=3)
    kept, fetched = report_of(plan), report_of(plan, Accounting(frozen_weights="downloaded"))
    for one, other in zip(kept.stages, fetched.stages, strict=True):
        assert other.with_heads.round_bytes_down == one.with_heads.round_bytes_down + one.with_heads.prefix_bytes_down
        assert other.with_heads.round_bytes_up == one.with_heads.round_bytes_up
    run = fetched.with_heads.plan
    assert run.new_prefix_bytes_down == 0
    assert run.fill_flops == sum(s.rounds * s.with_heads.prefix_flops_per_sample for s in fetched.stages)


def test_encodings_save_on_both_sides_and_are_told_against_fp32():
    plain, packed = (report_of(plan_of(**kwargs)) for kwargs in ({}, {"download_encoding": "fp16", "upload_encoding": "fp16"}))
    saved = packed.with_heads.savings
    assert saved.communication_against_fp32 > plain.with_heads.savings.communication_against_fp32 * 1.5
    assert saved.communication_with_prefix < saved.communication_against_fp32
    assert packed.with_heads.end_to_end.bytes_moved < plain.with_heads.end_to_end.bytes_moved


@given(st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=20)
def test_depth_dropout_leaves_the_budget_in_use_on_average(layers, budget):
    segments = {f"x.layers.{i}": nn.Linear(4, 4, device="meta") for i in range(layers)}
    names = list(segments)
    stages = [Stage(index=i, active=(n,), frozen=tuple(names[:i]), rounds=1, learning_rate=1) for i, n in enumerate(names)]
    accounting = Accounting(frozen_weights="downloaded", layer_budget=budget, file_headers=False)
    examples = dict.fromkeys(names, (torch.zeros(1, 4, device="meta"),))
    report = cost_report(segments, examples, stages, name="x", accounting=accounting)
    for depth, stage in enumerate(report.stages, start=1):
        assert stage.with_heads.round_bytes_down == min(depth, budget) * 80
        assert stage.with_heads.prefix_flops_per_sample == (min(depth, budget) - 1) * 16
        assert stage.with_heads.fill_flops_per_sample is None
    assert report.with_heads.savings.flops_cached is None


def test_the_first_layer_is_always_in_use_and_the_others_share_what_the_budget_leaves():
    widths = (1, 10, 20, 30)
    segments = {f"x.layers.{i}": nn.Linear(width, 1, bias=False) for i, width in enumerate(widths)}
    examples = {name: (torch.zeros(1, module.in_features),) for name, module in segments.items()}
    names = list(segments)
    stage = Stage(index=0, active=(names[3],), frozen=tuple(names[:3]), rounds=1, learning_rate=1)
    report = cost_report(segments, examples, [stage], name="x", accounting=Accounting(layer_budget=3))
    assert report.stages[0].with_heads.prefix_flops_per_sample == 1 + (10 + 20) // 2


def test_a_budget_without_room_for_the_first_layer_is_refused():
    both = Stage(index=0, active=("x.layers.1", "x.layers.2"), frozen=("x.layers.0",), rounds=1, learning_rate=1)
    segments = {f"x.layers.{i}": nn.Linear(2, 2) for i in range(3)}
    examples = dict.fromkeys(segments, (torch.zeros(1, 2),))
    with pytest.raises(ConfigError, match="give at least 3"):
        cost_report(segments, examples, [both], name="x", accounting=Accounting(layer_budget=2))


def test_running_statistics_are_exchanged_but_not_parameters_and_counters_are_neither():
    segments = {"x.layers.0": nn.BatchNorm1d(5, affine=False), "x.projection": nn.Linear(5, 2)}
    examples = dict.fromkeys(segments, (torch.zeros(1, 5),))
    stage = Stage(index=0, active=tuple(segments), rounds=1, learning_rate=1)
    report = cost_report(segments, examples, [stage], name="x", unused=[nn.Linear(3, 1)])
    norm = report.segments[0]
    assert (norm.parameters, norm.statistics, norm.stored_bytes) == (0, 10, 4 * 10 + 8)
    assert report.stages[0].without_heads.active_bytes == 40
    assert report.stages[0].without_heads.model_bytes == 48 + 16
    assert report.unused_parameters == 4
    assert segments["x.layers.0"].training, "the report leaves the model as it was"


class FusedAttention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


LSTM_MACS = 5 * 4 * 8 * (8 + 8)
LAYER_MACS = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (FusedAttention(), (1, 2, 7, 4), 2 * 2 * 7 * 7 * 4),
        (nn.LSTM(8, 8, batch_first=True), (1, 5, 8), LSTM_MACS),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), LAYER_MACS),
        (nn.Conv1d(4, 4, 3, groups=4), (1, 4, 5), 4 * 3 * 3),
    ],
    ids=["fused attention", "lstm", "fused transformer layer", "depthwise convolution"],
)
def test_fused_kernels_are_counted_as_the_products_that_they_are(module, shape, macs, device):
    counted, uncounted = count_forward(module.eval().to(device), (torch.zeros(shape, device=device),))
    module.to_empty(device="cpu")
    assert (counted, uncounted) == (macs, ())


class VectorProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x):
        return (self.weight @ x[0])[None]


def test_an_operator_that_nobody_counts_is_named():
    stage = Stage(index=0, active=("x.stem",), rounds=1, learning_rate=1)
    report = cost_report({"x.stem": VectorProduct()}, {"x.stem": (torch.zeros(1, 4),)}, [stage], name="x")
    assert report.segments[0].uncounted == ("mv",)


def test_another_counter_agrees():
    fvcore = pytest.importorskip("fvcore.nn")
    plan = plan_of(TWO)
    segments, examples = model_of(TWO).segments(), plan_examples(plan)
    for segment in report_of(plan).segments:
        analysis = fvcore.FlopCountAnalysis(segments[segment.name].eval(), examples[segment.name])
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counted = analysis.by_operator()
        assert segment.forward_macs == sum(counted[name] for name in ("linear", "matmul", "conv", "addmm", "bmm")), segment.name


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"active": ("x.layers.9",)}, r"names segment 'x.layers.9'; the model has x.layers.0"),
        ({"active": ("x.layers.0",), "frozen": ("x.layers.0",)}, "both active and frozen"),
        ({"active": ("x.layers.0",), "rounds": 0}, "every stage has 0 rounds"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stage, message):
    segments, examples = {"x.layers.0": nn.Linear(2, 2)}, {"x.layers.0": (torch.zeros(1, 2),)}
    with pytest.raises(ConfigError, match=message):
        cost_report(segments, examples, [Stage(**({"index": 0, "rounds": 1, "learning_rate": 1} | stage))], name="x")


def test_segments_that_cannot_be_counted_are_refused():
    stage = Stage(index=0, active=("x.layers.0",), rounds=1, learning_rate=1)
    layer = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"'x.layers.0' has no example"):
        cost_report({"x.layers.0": layer}, {}, [stage], name="x")
    with pytest.raises(CutError, match=r"x.layers.0 cannot take an example of shape \(1, 3\)"):
        cost_report({"x.layers.0": layer}, {"x.layers.0": (torch.zeros(1, 3),)}, [stage], name="x")
    with pytest.raises(CutError, match=r"x.layers.1/weight belongs to x.layers.0 too"):
        examples = dict.fromkeys(("x.layers.0", "x.layers.1"), (torch.zeros(1, 2),))
        cost_report({"x.layers.0": layer, "x.layers.1": layer}, examples, [stage], name="x")


def test_layers_that_look_alike_are_counted_each_by_itself():
    """The number of heads is in no shape; a count that was shared by looks could be wrong, so none is."""
    segments = {"x.layers.0": Layer(8, 2, 4), "x.layers.1": nn.Sequential(Layer(8, 2, 4), Layer(8, 4, 4))}
    examples = dict.fromkeys(segments, (torch.zeros(1, 3, 8),))
    stage = Stage(index=0, active=tuple(segments), rounds=1, learning_rate=1)
    first, second = cost_report(segments, examples, [stage], name="x").segments
    assert second.forward_macs == 2 * first.forward_macs > 0


def run_cli(*words: object):
    return CliRunner().invoke(CLI, [str(word) for word in words], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_shows_every_stage_and_writes_the_report(tmp_path):
    plan = plan_of(upload_encoding="int8")
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    found = run_cli(tmp_path / "plan.json", "--json", tmp_path / "cost.json")
    assert found.exit_code == 0, found.output
    assert "…" not in found.output, "a heading or a number is cut off at 80 columns"
    for part in ("with heads", "without heads"):
        table = found.output.partition(f"one device, {part}")[2]
        assert [int(n) for n in re.findall(r"^ +(\d) +\d", table, re.MULTILINE)[:LAYERS]] == list(range(LAYERS))
    assert "against end-to-end training in fp32" in found.output
    written = CostReport.from_file(tmp_path / "cost.json")
    assert written == report_of(plan)
    ratio = json.loads((tmp_path / "cost.json").read_text())["with_heads"]["savings"]["flops"]
    assert f" {ratio:.2f} " in found.output


def test_the_command_counts_other_schedules_and_refuses_what_it_does_not_know(tmp_path):
    plan = plan_of()
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    options = ("--frozen-weights", "downloaded", "--layer-budget", 2, "--json", tmp_path / "cost.json")
    assert run_cli(tmp_path / "plan.json", *options).exit_code == 0
    expected = report_of(plan, Accounting(frozen_weights="downloaded", layer_budget=2))
    assert CostReport.from_file(tmp_path / "cost.json") == expected
    refused = run_cli(tmp_path / "plan.json", "--frozen-weights", "both")
    assert isinstance(refused.exception, ConfigError)
