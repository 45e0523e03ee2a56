"""The cost report against numbers counted by hand."""

import pytest
import torch
from torch import nn

from export.cost.counts import peak_live_bytes, planned_bytes
from export.graphs.trace import forward_graph
from lamina.encoding.tensors import encode
from lamina.plans.plan import SGD, AdamW
from tests.export.tiny import (
    BATCH,
    CLASSES,
    COEFFICIENTS,
    HIDDEN,
    LAYERS,
    OUTPUT,
    TOKENS,
    WIDTH,
    export_tiny,
    model_of,
    plan_of,
)

# Multiply-accumulates of one sample, and parameters, of each kind of segment.
STEM_MACS = TOKENS * COEFFICIENTS * WIDTH
LAYER_MACS = TOKENS * WIDTH * WIDTH * (4 + 2 * 4) + 2 * TOKENS * TOKENS * WIDTH
HEAD_MACS = WIDTH * HIDDEN + HIDDEN * OUTPUT + OUTPUT * CLASSES
STEM = COEFFICIENTS * WIDTH + WIDTH + TOKENS * WIDTH
LAYER = 4 * (WIDTH * WIDTH + WIDTH) + 2 * 2 * WIDTH + (8 * WIDTH * WIDTH + 5 * WIDTH)
HEADS = 2 * WIDTH + (WIDTH * HIDDEN + HIDDEN) + (HIDDEN * OUTPUT + OUTPUT) + (OUTPUT * CLASSES + CLASSES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    return export_tiny(folder / "bundle", folder / "programs", plan=plan_of())


def test_flops_and_parameters_of_every_stage(manifest):
    for stage in manifest.stages:
        first = stage.index == 0
        cost = stage.cost
        assert cost.flops_per_sample == 3 * (LAYER_MACS + HEAD_MACS + (STEM_MACS if first else 0))
        assert cost.prefix_flops_per_sample == (0 if first else STEM_MACS + stage.index * LAYER_MACS)
        assert cost.active_parameters == LAYER + HEADS + (STEM if first else 0)
        assert cost.frozen_parameters == (0 if first else STEM + stage.index * LAYER)


def test_bytes_are_those_of_the_files(manifest):
    segments = dict(model_of().segments())
    files = {n: len(encode({k: p.detach().numpy() for k, p in m.named_parameters()})) for n, m in segments.items()}
    for stage, cost in zip(manifest.plan.stages, (stage.cost for stage in manifest.stages), strict=True):
        update = {
            f"{name}/{key}": value.detach().numpy() for name in stage.active for key, value in segments[name].named_parameters()
        }
        assert cost.round_bytes_down == sum(files[name] for name in stage.active)
        assert cost.round_bytes_up == len(encode(update))
        assert cost.frozen_bytes == sum(files[name] for name in stage.frozen)


def test_bytes_of_a_round_follow_the_encodings(tmp_path, manifest):
    down, up = "int8", "fp16"
    plan = plan_of(download_encoding=down, upload_encoding=up)
    stage, tensors = plan.stages[1], {}
    for name in stage.active:
        parameters = model_of().segments()[name].named_parameters()
        tensors[name] = {key: value.detach().numpy() for key, value in parameters}
    update = {f"{name}/{key}": value for name, values in tensors.items() for key, value in values.items()}
    cost = export_tiny(tmp_path / "b", tmp_path / "programs", plan=plan).stages[1].cost
    assert cost.round_bytes_down == sum(len(encode(values, down)) for values in tensors.values())
    assert cost.round_bytes_up == len(encode(update, up))
    assert cost.frozen_bytes < manifest.stages[1].cost.frozen_bytes


def test_programs_are_paid_in_the_stage_that_first_uses_them(manifest):
    sizes = manifest.blobs
    first, second, third = manifest.stages
    frozen = manifest.frozen_programs["torch"]
    assert first.cost.program_bytes == {"torch": sizes[first.train["torch"]]}  # one file serves train and eval
    new = {second.train["torch"], frozen["audio.stem"], frozen["audio.layers.0"]}
    assert second.cost.program_bytes == {"torch": sum(sizes[digest] for digest in new)}
    assert third.cost.program_bytes == {"torch": 0}
    assert len(manifest.stages) == LAYERS


@pytest.mark.parametrize(("optimizer", "vectors"), [(SGD(), 2), (SGD(momentum=0.9), 3), (AdamW(), 4)])
def test_planned_bytes_count_weights_gradients_and_moments(optimizer, vectors):
    assert planned_bytes(10, optimizer, activation_bytes=7) == 4 * 10 * vectors + 7


def test_planned_bytes_of_a_stage(manifest):
    cost = manifest.stages[1].cost
    program = manifest.programs[manifest.stages[1].train["torch"]]
    assert plan_of().training.optimizer == AdamW()
    assert cost.planned_bytes["torch"] == 16 * cost.active_parameters + program.activation_bytes
    # At the very least, the input of the wide GELU and the gradient that meets it are alive together.
    assert program.activation_bytes >= 2 * BATCH * TOKENS * 4 * WIDTH * 4


class ThreeSteps(nn.Module):
    def forward(self, x):
        a = x.exp()  # a
        b = a.t().t() + 1  # a, b: the transposes are views
        return b * 2  # b, result: a is gone


def test_peak_of_live_bytes_by_hand():
    graph = forward_graph(ThreeSteps(), (torch.randn(2, 8),), 16)
    assert peak_live_bytes(graph, 1) == 2 * 8 * 4
    assert peak_live_bytes(graph, 10) == 10 * peak_live_bytes(graph, 1)
