"""What a plan may choose otherwise: attention over the batch, adapters as released, the direction of the divergence."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from export.split.functions import split_functions
from export.split.graphs import eager, graph
from export.split.modules import Adapter, LowPrefix, transfer_loss
from export.split.split import make_parts
from lamina.plans.segments import layer, stem
from lamina.split.plan import AdapterSettings, FusionNet, Transfer
from tests.split.house import CLASSES, make_plan


@pytest.mark.parametrize("attention", ["modalities", "batch"])
def test_the_fusion_net_looks_at_other_samples_only_where_the_plan_says_so(attention: str) -> None:
    plan = make_plan(fusion=FusionNet(heads=2, head_width=8, attention=attention))
    fusion = make_parts(plan)["fusion"]
    features = [torch.randn(5, 16) for _ in plan.modalities]
    f, logits = fusion(*features)
    assert f.shape == (5, 16) and logits.shape == (5, CLASSES)
    alone = fusion(*(value[:2] for value in features))[1]
    assert torch.allclose(alone, logits[:2], atol=1e-6) == (attention == "modalities")


def test_attention_over_the_batch_is_a_graph_for_every_batch_size() -> None:
    plan = make_plan(fusion=FusionNet(heads=2, head_width=8, attention="batch"))
    function = next(f for f in split_functions(plan, make_parts(plan)) if f.name == "fusion_backward")
    weights = tuple(value.detach() for value in function.module.parameters())

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 16), torch.randn(batch, 16), torch.randn(batch, CLASSES))

    run = graph(function, lambda taken: taken, weights, inputs(2), 8).module()
    for batch in (1, 3, 8):
        given = inputs(batch)
        for actual, expected in zip(run(weights, given), eager(function, lambda w: w, weights, given), strict=True):
            assert torch.allclose(actual, expected, atol=1e-5)


def test_training_starts_at_the_frozen_model() -> None:
    plan = make_plan()
    parts = make_parts(plan)
    block = parts[layer("image", 0)]
    x = torch.randn(2, 1, 8, 8)
    base, branch = LowPrefix(parts[stem("image")], block, plan.adapter)(x)
    adapter = parts["image.modality_adapter"]
    assert torch.equal(base + adapter(branch), base)
    assert torch.allclose(base, block(parts[stem("image")](x)), atol=1e-6)
    released = LowPrefix(parts[stem("image")], block, AdapterSettings(start="released"))(x)
    assert torch.allclose(released[0] + released[1], base, atol=1e-6)  # the adapter alone carries the branch
    assert Adapter(16, AdapterSettings(start="released")).up.weight.abs().max() > 0


@pytest.mark.parametrize("direction", ["released", "textbook"])
@pytest.mark.parametrize(("detach", "reduction"), [(False, "sum"), (True, "mean")])
def test_the_transfer_is_the_formula_of_the_method(direction: str, detach: bool, reduction: str) -> None:
    features, f = torch.randn(6, 16), torch.randn(6, 16)
    own = torch.randn(6, CLASSES, requires_grad=True)
    fused, label = torch.randn(6, CLASSES), torch.arange(6) % CLASSES
    uni, mm = F.cross_entropy(own, label), F.cross_entropy(fused, label)
    settings = Transfer(direction=direction, reduction=reduction, detach=detach)
    loss = transfer_loss(settings, features, own, uni, f, fused, mm)

    p, q = torch.softmax(own, -1), torch.softmax(fused, -1)
    kl = (p * (p / q).log()).sum() if direction == "released" else (q * (q / p).log()).sum()
    kl = kl / (6 if reduction == "mean" else 1)
    denominator = (uni + mm).detach() if detach else uni + mm
    expected = 0.6 * (uni + mm / 2) + 0.2 * kl / denominator + 0.2 * (1 - F.cosine_similarity(features, f, dim=-1).mean())
    assert torch.allclose(loss, expected, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, own, retain_graph=True), torch.autograd.grad(expected, own), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
