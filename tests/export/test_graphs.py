"""Graphs carry no weights, do not know their place in the model, and are refused if engines would disagree on them."""

from io import BytesIO

import pytest
import torch
from torch import nn

from export.graphs.cut import cut_stage, find_segments
from export.graphs.joint import joint_graph
from export.graphs.trace import forward_graph, graph_text
from export.inputs import example_inputs
from export.lowering.lower_torch import lower_torch
from export.lowering.parity import check_parity
from export.lowering.worker import lower
from export.ops.decompositions import LEAN
from lamina.errors import CutError
from tests.export.tiny import LAYERS, ONE, TOKENS, TWO, WIDTH, model_of, plan_of
from tests.export.training_blocks import check_trains


def graphs_of(stage, description=ONE, model=None):
    segments = find_segments(model or model_of(description), description)
    part = cut_stage(segments, description, plan_of(description).stages[stage])
    example = example_inputs(description, part.inputs, 2)
    forward = forward_graph(part.module, example, 4)
    return forward, joint_graph(forward, [spec.name for spec in part.weights])


def test_layerwise_stages_after_the_first_have_equal_graphs():
    texts = [tuple(map(graph_text, graphs_of(stage))) for stage in range(LAYERS)]
    assert texts[1] == texts[2]
    assert texts[0][0] != texts[1][0]
    assert texts[0][1] != texts[1][1]


def test_frozen_layers_of_two_modalities_have_equal_graphs():
    segments = find_segments(model_of(TWO), TWO)
    names = ("audio.layers.0", "audio.layers.2", "motion.layers.1")
    texts = {graph_text(forward_graph(segments[name], (torch.randn(2, TOKENS, WIDTH),), 4)) for name in names}
    assert len(texts) == 1


def test_another_largest_batch_or_another_shape_is_another_graph():
    layer = find_segments(model_of(), ONE)["audio.layers.0"]
    base = graph_text(forward_graph(layer, (torch.randn(2, TOKENS, WIDTH),), 4))
    assert base != graph_text(forward_graph(layer, (torch.randn(2, TOKENS, WIDTH),), 8))
    assert base != graph_text(forward_graph(layer, (torch.randn(2, TOKENS + 1, WIDTH),), 4))


class WithNoise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class WithConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.randn(TOKENS, WIDTH)

    def forward(self, x):
        return x + self.table


@pytest.mark.parametrize(("layer", "words"), [(WithNoise(), "remove it from"), (WithConstant(), "make it a parameter")])
def test_a_layer_that_draws_numbers_or_hides_data_is_refused(layer, words):
    with pytest.raises(CutError, match=words):
        forward_graph(layer, (torch.randn(2, TOKENS, WIDTH),), 4)


def test_a_parameter_without_effect_is_refused_by_name():
    model = model_of()
    model.encoders["audio"].layers[1].unused = nn.Parameter(torch.ones(3))
    with pytest.raises(CutError, match=r"does not depend on audio\.layers\.1/unused"):
        graphs_of(1, model=model)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_own_backward_formulas_equal_those_of_torch(batch):
    aten = torch.ops.aten
    x, gradient = torch.randn(batch, 5), torch.randn(batch, 5)
    y = torch.softmax(x, -1)
    target = torch.randint(5, (batch,))
    logp, scalar, count = torch.log_softmax(x, -1), torch.tensor(2.0), torch.tensor(float(batch))
    for operation, arguments in (
        (aten.gelu_backward.default, (gradient, x)),
        (aten._softmax_backward_data.default, (gradient, y, -1, torch.float32)),
        (aten.nll_loss_backward.default, (scalar, logp, target, None, 1, -100, count)),
    ):
        torch.testing.assert_close(LEAN[operation](*arguments), operation(*arguments))


def through_a_file(graph):
    """The graph as a lowering process gets it."""
    return torch.export.load(BytesIO(lower_torch(graph)))


def test_an_executorch_program_for_at_most_two_samples_takes_one():
    pytest.importorskip("executorch", reason="the exporter writes for the engines that are installed")
    layer, x = find_segments(model_of(), ONE)["audio.layers.0"], torch.randn(2, TOKENS, WIDTH)
    two, four = (lower("executorch", through_a_file(forward_graph(layer, (x,), size))) for size in (2, 4))
    check_parity(two.data, "executorch", "frozen", "the layer", layer, (x,))
    assert four.arena_bytes / two.arena_bytes == pytest.approx(2, rel=0.05)


class WithSmallConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        scales = torch.tensor([0.5, 2.0] * (WIDTH // 2))
        return self.linear(x) * scales * scales + x


@pytest.mark.parametrize("engine", ["executorch", "onnxruntime"])
def test_a_small_constant_of_the_code_is_in_the_joint_graph(engine):
    check_trains(engine, WithSmallConstant(), TOKENS, WIDTH)
