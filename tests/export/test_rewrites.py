"""Rewrites replace what engines cannot train by equal operations, are measured on real inputs, and leave the model alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export.faults.supported import remedy, unsupported
from export.ops.rewrites import ChannelAffine, fold_batch_norm, plain_operations, prove_rewrites, untie
from export.ops.rewrites.proof import Proofs
from lamina.errors import CutError, ParityError
from tests.export.training_blocks import ENGINES, check_trains, joint_of

WIDTH, HEADS, TOKENS = 8, 2, 5


class FusedAttention(nn.Module):
    """As libraries write it."""

    def __init__(self, **options):
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), options

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).reshape(x.shape))


class CallsWith(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def kinds(found):
    return {each.kind: each.count for each in found}


@settings(max_examples=30)
@given(
    mask=st.sampled_from(["none", "bool", "float", "causal"]),
    scale=st.sampled_from([None, 0.3]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_attention_in_plain_products_gives_what_torch_gives(mask, scale, queries, keys, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, HEADS, queries, 4), torch.randn(2, HEADS, keys, 4), torch.randn(2, HEADS, keys, 4)
    options = {"scale": scale, "is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = torch.rand(2, 1, queries, keys) > 0.5  # also rows without any key
    if mask == "float":
        options["attn_mask"] = torch.randn(queries, keys)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with plain_operations():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), expected)


def test_each_kind_of_rewrite_is_counted_with_its_largest_difference():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, WIDTH, 2, 2), nn.Flatten(2), nn.Dropout(0.5)
    )
    found = prove_rewrites(module, (torch.randn(2, 3, 17, 16),), "the stem")
    assert kinds(found) == {"patches as one product": 2, "batch norm as scale and shift": 1, "average pool as a mean": 1}
    assert all(each.where == "the stem" and each.largest_difference < 1e-5 for each in found)


def test_attention_inside_torch_s_own_layers_is_rewritten():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    (found,) = prove_rewrites(layer, (torch.randn(2, TOKENS, WIDTH),))
    assert (found.kind, found.count) == ("attention in plain products", 1)
    assert layer.training  # the user's module stays as it was


def test_dropout_that_is_on_in_evaluation_mode_is_left_out_and_said():
    (found,) = prove_rewrites(CallsWith(lambda x: F.dropout(x, 0.5)), (torch.ones(2, 3),))
    assert found.kind == "dropout left out"
    assert "also in evaluation mode" in found.note


@pytest.mark.parametrize("options", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 2}])
def test_a_convolution_whose_kernels_overlap_or_have_padding_or_groups_stays(options):
    assert prove_rewrites(nn.Conv2d(4, 4, 2, **options), (torch.randn(2, 4, 6, 6),)) == []


def test_heads_that_share_keys_are_refused_with_the_way_out():
    q, k = torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2)
    with plain_operations(), pytest.raises(CutError, match="repeat the key and value heads"):
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def test_a_replacement_that_gives_something_else_is_a_parity_error_with_its_name():
    with pytest.raises(ParityError, match=r"layer 3: attention, call 1: .*differs by 1, allowed 2e-05"):
        Proofs("layer 3").add("attention", [], lambda: torch.full((2,), 2.0), torch.ones(2))


def test_the_fast_path_of_torch_is_off_inside_and_back_afterwards():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="mine"), plain_operations():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError("mine")
    assert torch.backends.mha.get_fastpath_enabled() == before


def measured(norm):
    for _ in range(3):
        norm(torch.randn(4, norm.num_features, *((3,) if isinstance(norm, nn.BatchNorm1d) else (3, 3))) * 2 + 1)
    return norm


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)])
def test_folded_batch_norm_gives_the_same_and_has_no_buffers(norm):
    module = nn.Sequential(measured(norm), nn.ReLU())
    folded, (rewrite,) = fold_batch_norm(module, "block")
    x = torch.randn(2, 4, *((3,) if isinstance(norm, nn.BatchNorm1d) else (3, 3)))
    torch.testing.assert_close(folded(x), module.eval()(x))
    assert not list(folded.buffers())
    assert [name for name, _ in folded.named_parameters()] == ["0.weight", "0.bias"]
    assert module[0] is norm
    assert ("no scale and shift of its own" in rewrite.note) == (norm.weight is None)


def test_a_batch_norm_that_never_saw_data_is_said_to_normalise_nothing():
    _, (rewrite,) = fold_batch_norm(nn.Sequential(nn.BatchNorm2d(4), measured(nn.BatchNorm2d(4))))
    assert "1 of 2: statistics were never measured" in rewrite.note
    assert "GroupNorm" in rewrite.note


def test_one_batch_norm_under_two_names_stays_one():
    norm = nn.BatchNorm2d(4)
    folded, (rewrite,) = fold_batch_norm(nn.Sequential(norm, nn.ReLU(), norm))
    assert folded[0] is folded[2]
    assert isinstance(folded[0], ChannelAffine)
    assert rewrite.count == 1


def test_batch_norm_without_running_statistics_is_refused_by_name():
    with pytest.raises(CutError, match=r"^1 normalises by the statistics of each batch"):
        fold_batch_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)))


def test_tied_segments_get_their_own_copies_and_are_listed():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    copies, (rewrite,) = untie({"stem": first, "head": second})
    assert (rewrite.where, rewrite.count) == ("head", 1)
    assert "weight began as a copy of one in stem" in rewrite.note
    assert copies["head"].weight is not copies["stem"].weight
    assert second.weight is first.weight


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_with_fused_attention_trains_on_every_engine(engine):
    check_trains(engine, FusedAttention(is_causal=True), TOKENS, WIDTH)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_patch_convolution_trains_on_every_engine(engine):
    check_trains(engine, nn.Conv2d(3, WIDTH, 4, 4), 3, 8, 8)


@pytest.mark.parametrize("engine", ENGINES)
def test_operators_that_an_engine_cannot_run_are_named_with_a_remedy(engine):
    trains, _, _ = joint_of(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Hardswish()), 2, 6, 6)
    assert unsupported(engine, trains) == []
    overlapping, _, _ = joint_of(nn.AvgPool2d(3, 2), 2, 7, 7)
    ((operator, words),) = unsupported(engine, overlapping)
    assert operator == "aten.avg_pool2d_backward.default"
    assert "without overlap" in words


def test_an_unknown_operator_has_a_remedy_too():
    assert "keep this layer frozen" in remedy("mine.operator.default")
