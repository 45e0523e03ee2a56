"""What does not fit is refused by name, with the reason and the way out."""

import pytest
import torch
from torch import nn

from export.models.adapters import adapt
from export.models.adapters.common import run_trunk
from export.trunk import MeanTokens, Trunk
from lamina.errors import ConfigError, CutError
from lamina.plans.model import Image, Values
from tests.export.adapters.small import bert, clip, clip_tower, distilbert, timm_vit, transformers, vit, wav2vec2, whisper
from tests.export.adapters.timm_beside_cpu_torch import import_timm

WIDTH = 8


class Own(nn.Module):
    input = Values(shape=(6,))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 3 * WIDTH), nn.Unflatten(1, (3, WIDTH)))
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])


class OwnWithAll(Own):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.pool = nn.Flatten()


def test_a_trunk_is_given_back_as_it_is():
    trunk = adapt(Own())
    assert adapt(trunk) is trunk


def test_a_module_with_the_protocol_needs_neither_norm_nor_pool():
    own = Own()
    trunk = adapt(own)
    assert isinstance(trunk.norm, nn.Identity)
    assert isinstance(trunk.pool, MeanTokens)
    assert trunk.input == own.input
    x = torch.randn(2, 6)
    assert torch.equal(run_trunk(trunk, x), own.layers[1](own.layers[0](own.stem(x))).mean(1))
    assert trunk.stem[0].weight is not own.stem[0].weight


def test_a_module_with_the_protocol_keeps_its_norm_and_pool():
    trunk = adapt(OwnWithAll())
    assert run_trunk(trunk, torch.randn(2, 6)).shape == (2, 3 * WIDTH)


def test_a_wrong_attribute_of_the_protocol_is_named():
    class Wrong(Own):
        input = (6,)

    with pytest.raises(CutError, match=r"Wrong\.input is a tuple; it must be a lamina\.plans\.model\.Image"):
        adapt(Wrong())


def test_a_protocol_without_layers_is_refused():
    own = Own()
    own.layers = nn.ModuleList()
    with pytest.raises(CutError, match="has no layers"):
        adapt(own)


def test_segments_that_share_weights_get_copies_and_a_note_if_that_is_asked_for():
    own = Own()
    own.layers = nn.ModuleList([own.layers[0], own.layers[0]])
    together = adapt(own)
    assert together.layers[0].weight is together.layers[1].weight and not together.notes
    trunk = adapt(own, copy_shared=True)
    assert isinstance(trunk, Trunk)
    assert trunk.layers[0].weight is not trunk.layers[1].weight
    assert torch.equal(trunk.layers[0].weight, trunk.layers[1].weight)
    (note,) = trunk.notes
    assert note.startswith("layer 1: weight began as a copy of one in layer 0")


def test_an_unknown_class_is_told_what_is_known_and_how_to_be():
    with pytest.raises(CutError) as caught:
        adapt(nn.LSTM(2, 2))
    for words in ("torch.nn.modules.rnn.LSTM", "VisionTransformer", "DistilBERT", "class Mine(nn.Module)", "docs/export.md"):
        assert words in str(caught.value)


def test_what_is_no_module_is_refused():
    with pytest.raises(CutError, match="a dict is no model"):
        adapt({})


def test_swin_is_refused_with_the_reason():
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(img_size=16, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    with pytest.raises(CutError, match=r"SwinTransformer: its stages merge patches between layers"):
        adapt(swin)


def test_albert_is_refused_with_the_reason():
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    with pytest.raises(CutError, match="all its layers are one layer"):
        adapt(transformers("AlbertModel", "AlbertConfig", config=sizes))


@pytest.mark.parametrize("flag", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_a_decoder_is_refused(flag):
    with pytest.raises(CutError, match="is_decoder=True; a trunk is an encoder"):
        adapt(bert(**flag))


def test_relative_positions_are_refused():
    with pytest.raises(CutError, match="position_embedding_type='relative_key'"):
        adapt(bert(position_embedding_type="relative_key"))


def test_a_whisper_decoder_is_refused():
    with pytest.raises(CutError, match="has no encoder"):
        adapt(whisper().decoder)


def test_wav2vec2_with_an_adapter_is_refused():
    with pytest.raises(CutError, match="add_adapter=True"):
        adapt(wav2vec2(add_adapter=True), samples=400)


def test_a_pool_with_weights_is_refused_and_can_be_replaced():
    model = timm_vit(global_pool="map")
    with pytest.raises(CutError, match=r"pools with 'map'.*pool='mean'"):
        adapt(model)
    assert run_trunk(adapt(model, pool="mean"), torch.randn(2, 3, 16, 16)).shape == (2, 16)


def test_the_first_token_needs_a_class_token():
    with pytest.raises(CutError, match="no class token; give pool='mean'"):
        adapt(timm_vit(class_token=False, global_pool="avg"), pool="first")


def test_a_subclass_that_computes_something_else_is_refused():
    model = vit()

    class Scaled(type(model)):
        def forward(self, *args, **options):
            found = super().forward(*args, **options)
            found.last_hidden_state = found.last_hidden_state * 2
            return found

    model.__class__ = Scaled
    with pytest.raises(CutError, match="differs from the library's forward pass"):
        adapt(model)


def test_half_precision_and_another_device_are_refused():
    with pytest.raises(CutError, match=r"is torch.float16; .* call model.float\(\)"):
        adapt(vit().half())
    with pytest.raises(CutError, match="is on meta"):
        adapt(vit().to("meta"))


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (bert, {"part": "text"}, "has no option 'part'; it takes pool, tokens, gated"),
        (Own, {"pool": "mean"}, "has no option 'pool'; it takes gated"),
        (bert, {"gated": "no"}, "option 'gated' is true or false, given 'no'"),
        (bert, {"pool": "max"}, "pool='max' is not known; say 'first' or 'mean'"),
        (distilbert, {"tokens": 13}, "tokens=13 must be 1 to 12"),
        (clip, {}, "has two towers; say part='vision' or part='text'"),
        (clip, {"part": "audio"}, "part='audio' is not known"),
        (clip, {"part": "vision", "tokens": 4}, "the option 'tokens' is for part='text'"),
        (wav2vec2, {"samples": 19}, "samples=19 are too few for its convolutions, which read 20 for one frame"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(build, options, words):
    with pytest.raises(ConfigError, match=words):
        adapt(build(), **options)


def test_a_tower_that_is_not_there_is_refused():
    with pytest.raises(CutError, match="has no text tower, only vision"):
        adapt(clip_tower("CLIPVisionModel"), part="text")


def test_an_image_input_has_the_models_size():
    assert adapt(vit(image_size=(16, 24))).input == Image(channels=3, height=16, width=24)
