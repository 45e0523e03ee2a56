"""A trunk of a library's model gives what the library's own forward pass gives, and the model stays as it was."""

import copy

import pytest
import torch

from export.models.adapters import adapt
from export.models.adapters.common import run_trunk, segments_of
from tests.export.adapters.small import CASES, LAYERS, PAD, TOKENS, Case, bert, clip, texts, wav2vec2
from tests.export.adapters.tracing import trace

RELATIVE = 1e-6


def adapted(case: Case):
    torch.manual_seed(0)
    model = case.build()
    return model, adapt(model, **case.options)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= RELATIVE * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_pooled_features_are_the_librarys(name):
    case = CASES[name]
    model, trunk = adapted(case)
    x = case.draw()
    with torch.no_grad():
        close(run_trunk(trunk, x), case.expected(model.eval(), x))
    assert len(trunk.layers) == LAYERS
    assert tuple(x.shape[1:]) == tuple(trunk.input.shape)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_not_changed(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().train()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(getattr(model, "config", None))
    attention = getattr(config, "_attn_implementation", None)

    trunk = adapt(model, **case.options)
    with torch.no_grad():
        for segment in segments_of(trunk):
            for value in segment.parameters():
                value += 1

    assert all(module.training for module in model.modules())
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == attention
    assert all(getattr(module, "fused_attn", True) for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", CASES)
def test_segments_share_nothing_hide_nothing_and_are_in_evaluation_mode(name):
    _, trunk = adapted(CASES[name])
    parts = [*segments_of(trunk), *([trunk.projection] if trunk.projection else [])]
    owned = [value for part in parts for value in part.parameters()]
    assert len({id(value) for value in owned}) == len(owned)
    assert all(value.dtype == torch.float32 for value in owned)
    assert not [key for part in [*parts, trunk.pool] for key, _ in part.named_buffers()]
    assert not list(trunk.pool.parameters())
    assert not any(module.training for part in [*parts, trunk.pool] for module in part.modules())


@pytest.mark.parametrize("name", CASES)
def test_stem_and_layer_trace_and_equal_layers_give_equal_graphs(name):
    case = CASES[name]
    _, trunk = adapted(case)
    x = case.draw()[:2]
    trace(trunk.stem, x)
    features = trunk.stem(x).detach()
    assert len({trace(layer, features) for layer in trunk.layers}) == 1


@pytest.mark.parametrize("name", ["bert", "bert, first", "distilbert"])
def test_what_padding_embeds_to_does_not_matter(name):
    _, trunk = adapted(CASES[name])
    ids = texts()
    with torch.no_grad():
        before = run_trunk(trunk, ids)
        trunk.stem.word_embeddings.weight[PAD] += 5
        assert torch.equal(run_trunk(trunk, ids), before)


def test_a_text_padded_further_keeps_its_embedding():
    model = bert()
    ids = texts()[1:2]
    with torch.no_grad():
        short = run_trunk(adapt(model, tokens=5), ids[:, :5])
        close(run_trunk(adapt(model, tokens=TOKENS), ids), short)


def test_a_text_of_padding_alone_gives_finite_features():
    trunk = adapt(bert(), tokens=TOKENS)
    with torch.no_grad():
        assert run_trunk(trunk, torch.full((1, TOKENS), PAD)).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "distilbert", "clip text"])
def test_a_stored_column_that_is_a_little_off_marks_the_same_tokens(name):
    case = CASES[name]
    _, trunk = adapted(case)
    features = trunk.stem(case.draw()).detach()
    noise = torch.linspace(-0.4, 0.4, features[..., -1].numel()).reshape(features[..., -1].shape)
    stored = features.clone()
    stored[..., -1] += noise

    with torch.no_grad():
        for layer in trunk.layers:
            features, stored = layer(features), layer(stored)
        assert torch.equal(features[..., :-1], stored[..., :-1])
        assert torch.equal(trunk.pool(trunk.norm(features)), trunk.pool(trunk.norm(stored)))


def test_features_stored_as_float16_and_int8_mark_the_same_tokens():
    trunk = adapt(bert(), tokens=TOKENS)
    features = trunk.stem(texts()).detach()
    step = features.abs().max() / 127
    for stored in (features.half().float(), (features / step).round() * step):
        assert torch.equal(stored[..., -1] > 0.5, features[..., -1] > 0.5)
        assert 0 < float((stored[..., -1] > 0.5).float().mean()) < 1


def test_layers_keep_the_librarys_parameter_names():
    names = [name for name, _ in adapt(bert()).layers[0].named_parameters()]
    assert names == [f"layer.{name}" for name, _ in bert().encoder.layer[0].named_parameters()]


def test_clip_projects_as_the_library_does():
    model = clip().eval()
    for part, features in (("vision", model.get_image_features), ("text", model.get_text_features)):
        case = CASES[f"clip {part}"]
        x = case.draw()
        trunk = adapt(model, **case.options)
        with torch.no_grad():
            close(trunk.projection(run_trunk(trunk, x)), features(x).pooler_output)


def test_what_stands_after_the_end_of_a_clip_text_is_not_read():
    case = CASES["clip text"]
    _, trunk = adapted(case)
    ids = case.draw()[:1]
    other = ids.clone()
    other[0, 7:] = 5
    with torch.no_grad():
        assert torch.equal(run_trunk(trunk, ids), run_trunk(trunk, other))


def test_what_is_left_out_is_said():
    assert "Left out: pooler." in adapt(bert()).notes
    assert "Left out: classifier." in adapt(bert("BertForSequenceClassification")).notes
    assert "Left out: vision_model, visual_projection, logit_scale." in adapt(clip(), part="text").notes
    assert any("masked_spec_embed" in note for note in adapt(wav2vec2(), samples=100).notes)


def test_a_text_is_as_long_as_the_model_allows_unless_told_otherwise():
    assert adapt(bert()).input.length == 12
    assert adapt(bert(max_position_embeddings=200)).input.length == 128
