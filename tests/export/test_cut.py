"""The cut module holds the active segments alone, in exchange order; what cannot be cut is refused by name."""

import pytest
import torch
from torch import nn

from export.graphs.cut import cut_stage, find_pools, find_segments, locate_pools, locate_segments, run_segment
from export.graphs.trace import forward_graph
from export.inputs import example_inputs
from lamina.errors import CutError
from lamina.plans.model import Contrastive, ModelDescription, TextTokens
from lamina.plans.segments import segment_names
from tests.export.tiny import AUDIO, LAYERS, ONE, TOKENS, TWO, WIDTH, Doubling, describe, model_of, plan_of


def cut(description=ONE, strategy="layerwise", stage=1, model=None):
    plan = plan_of(description, strategy)
    return cut_stage(find_segments(model or model_of(description), description), description, plan.stages[stage])


def test_frozen_layers_are_not_in_the_graph():
    for stage in range(1, LAYERS):
        part = cut(stage=stage)
        graph = forward_graph(part.module, example_inputs(ONE, part.inputs, 2), 4)
        products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
        assert len(products) == 6 + 2 + 1  # one layer, the projection head, the task head


def test_weights_are_in_the_order_of_the_stage_and_named_by_segment():
    plan = plan_of(TWO)
    for stage in plan.stages:
        part = cut(TWO, stage=stage.index)
        assert list(dict.fromkeys(spec.name.split("/")[0] for spec in part.weights)) == list(stage.active)
        assert [spec.shape for spec in part.weights] == [tuple(p.shape) for p in part.module.parameters()]


def test_input_is_raw_where_the_stem_is_active_else_features():
    assert cut(stage=0).inputs[0].shape == AUDIO.input.shape
    assert cut(stage=1).inputs[0].shape == (TOKENS, WIDTH)
    assert [spec.name for spec in cut(TWO).inputs] == ["audio", "motion", "label"]
    assert cut(strategy="progressive", stage=2).inputs[0].shape == AUDIO.input.shape


def test_token_ids_are_int64_and_a_contrastive_stage_has_no_label():
    text = AUDIO.model_copy(update={"modality": "text", "input": TextTokens(vocabulary=7, length=TOKENS)})
    model = ModelDescription(name="c", encoders=(AUDIO, text), projection=ONE.projection, objective=Contrastive())
    assert [(spec.name, spec.dtype) for spec in cut(model, stage=0).inputs] == [("audio", "float32"), ("text", "int64")]


def test_a_modality_may_have_no_active_layer():
    short = AUDIO.model_copy(update={"modality": "short", "layers": 1})
    both = describe(AUDIO, short)
    part = cut(both, stage=2)
    assert [spec.name for spec in part.weights if spec.name.startswith("short")] == [
        "short.norm/weight",
        "short.norm/bias",
        *(f"short.projection/{name}" for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")),
    ]
    loss, _ = part.module(*example_inputs(both, part.inputs, 2))
    assert loss.isfinite()


def test_cutting_leaves_the_given_model_as_it_is():
    model = model_of().eval()
    model.encoders["audio"].layers.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    part = cut(model=model)
    with torch.no_grad():
        next(iter(part.module.parameters())).add_(1)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model_of().parameters(), strict=True))


def tie(model):
    model.encoders["audio"].layers[1].mlp_in.weight = model.encoders["audio"].layers[0].mlp_in.weight


def orphan(model):
    model.temperature = nn.Parameter(torch.ones(1))


def drop_layers(model):
    model.encoders["audio"].layers = nn.ModuleList()


def drop_norm(model):
    del model.encoders["audio"].norm


def drop_encoder(model):
    del model.encoders["audio"]


def drop_one_layer(model):
    model.encoders["audio"].layers = model.encoders["audio"].layers[:-1]


def double_tokens(model):
    model.encoders["audio"].layers[1] = Doubling()


def wrong_width(model):
    model.encoders["audio"].layers[2] = nn.Linear(WIDTH, WIDTH + 1)


def add_batch_norm(model):
    model.encoders["audio"].norm = nn.BatchNorm1d(TOKENS)


def halve(model):
    model.encoders["audio"].layers[0].half()


def to_meta(model):
    model.encoders["audio"].layers[0].to("meta")


def recurrent(model):
    model.encoders["audio"].layers[1] = nn.GRU(WIDTH, WIDTH, batch_first=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (tie, r"audio\.layers\.0/mlp_in\.weight and audio\.layers\.1/mlp_in\.weight are one tied parameter.*give each"),
        (orphan, r"'temperature' belongs to no segment.*move it"),
        (drop_layers, r"encoders\['audio'\] has no layers.*give"),
        (drop_norm, r"encoders\['audio'\] has no module `norm`.*see"),
        (drop_encoder, r"encoders has no module for modality 'audio'"),
        (drop_one_layer, r"only in the description \['audio\.layers\.2'\].*make the two agree"),
        (double_tokens, r"audio\.layers\.1 gives shape \(2, 8, 16\).*\(2, 4, 16\).*make the two agree"),
        (wrong_width, r"audio\.layers\.2 gives shape \(2, 4, 17\)"),
        (add_batch_norm, r"buffer 'encoders\.audio\.norm\.running_mean'.*use LayerNorm"),
        (halve, r"attention_norm\.weight' is torch\.float16.*model\.float\(\)"),
        (to_meta, r"attention_norm\.weight' is on meta.*model\.cpu\(\)"),
        (recurrent, r"audio\.layers\.1 gives a tuple.*wrap it"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name_with_the_way_out(spoil, words):
    model = model_of()
    spoil(model)
    with pytest.raises(CutError, match=words):
        find_segments(model, ONE)


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [KeyError("mask"), AttributeError("no head"), AssertionError(), NotImplementedError("later")])
def test_whatever_a_layer_raises_is_refused_with_its_name_and_the_cause(error):
    model = model_of()
    model.encoders["audio"].layers[1] = Raising(error)
    with pytest.raises(CutError, match=rf"audio\.layers\.1 cannot take .*\(2, 4, 16\).*{type(error).__name__}") as refused:
        find_segments(model, ONE)
    assert refused.value.__cause__ is error


def test_a_keyboard_interrupt_is_no_fault_of_the_layer():
    with pytest.raises(KeyboardInterrupt):
        run_segment("audio.layers.1", Raising(KeyboardInterrupt()), torch.zeros(2))


@pytest.mark.parametrize("spoil", [tie, orphan, double_tokens, add_batch_norm, halve, to_meta, recurrent])
def test_faulty_segments_are_located_all_the_same(spoil):
    model = model_of()
    spoil(model)
    found = locate_segments(model, ONE)
    assert list(found) == segment_names(ONE)
    assert found["audio.layers.1"] is model.encoders["audio"].layers[1]


@pytest.mark.parametrize("spoil", [drop_layers, drop_norm, drop_encoder, drop_one_layer])
def test_missing_parts_are_refused_while_segments_are_located(spoil):
    model = model_of()
    spoil(model)
    with pytest.raises(CutError):
        locate_segments(model, ONE)


def test_a_pool_with_parameters_is_located_and_refused():
    model = model_of()
    model.encoders["audio"].pool = nn.Linear(2, 2)
    assert locate_pools(model, ONE) == {"audio": model.encoders["audio"].pool}
    with pytest.raises(CutError, match=r"pool has parameters.*move them into `norm`"):
        find_pools(model, ONE)
