"""Task heads: how embeddings are joined, and what happens where a modality is absent."""

from typing import get_args

import pytest
import torch

from export.models.models import build_model
from export.objectives.fusions import classify, make_head
from lamina.plans.model import Fusion, Supervised
from tests.export.tiny import OUTPUT, TWO

FUSIONS = get_args(Fusion)
CLASSES = 3


def head_of(fusion: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return make_head(fusion, 2, OUTPUT, CLASSES)


def embeddings() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, OUTPUT, generator=generator) for _ in range(2)]


def test_the_head_of_concatenated_embeddings_has_the_tensors_that_bundles_always_had():
    head = build_model(TWO, 0).head
    assert {key: tuple(value.shape) for key, value in head.named_parameters()} == {
        "weight": (CLASSES, 2 * OUTPUT),
        "bias": (CLASSES,),
    }


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_head_takes_the_list_of_embeddings_or_one_tensor_of_them(fusion):
    head, z = head_of(fusion), embeddings()
    assert torch.equal(head(z), head(torch.cat(z, dim=1)))
    assert head(z).shape == (4, CLASSES)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_modality_that_is_absent_has_no_gradient_in_the_head_and_no_say_in_the_logits(fusion):
    head, (first, _) = head_of(fusion), embeddings()
    logits = classify(head, [first, None])
    gradients = torch.autograd.grad(logits.square().sum(), list(head.parameters()))
    assert all(torch.isfinite(value).all() for value in gradients)
    by_name = dict(zip((name for name, _ in head.named_parameters()), gradients, strict=True))
    # The columns of the last Linear that belong to the second embedding.
    last = by_name["weight" if fusion == "concat" else "out.weight"]
    assert not last[:, OUTPUT : 2 * OUTPUT].any() and last[:, :OUTPUT].any()
    if fusion == "gated":
        assert not by_name["values.1.weight"].any() and not by_name["values.1.bias"].any() and not by_name["gate.weight"].any()


def test_a_single_modality_that_is_present_has_the_whole_gate():
    head, (first, _) = head_of("gated"), embeddings()
    expected = head.out(torch.cat([first, torch.zeros_like(first), head.values[0](first)], dim=1))
    assert torch.allclose(classify(head, [first, None]), expected, atol=1e-6)


def test_without_one_of_two_modalities_co_attention_attends_to_nothing():
    head, (first, _) = head_of("co_attention"), embeddings()
    expected = head.out(torch.cat([first, *[torch.zeros_like(first)] * 3], dim=1))
    assert torch.equal(classify(head, [first, None]), expected)


def test_a_head_of_the_users_own_takes_the_embeddings_side_by_side():
    head, z = torch.nn.Linear(2 * OUTPUT, CLASSES), embeddings()
    assert torch.equal(classify(head, z), head(torch.cat(z, dim=1)))
    assert torch.equal(classify(head, [z[0], None]), head(torch.cat([z[0], torch.zeros_like(z[0])], dim=1)))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_model_predicts_with_the_head_of_its_fusion(fusion):
    model = build_model(TWO.model_copy(update={"objective": Supervised(classes=CLASSES, fusion=fusion)}), 0)
    raw = {m: torch.randn(2, *encoder.input.shape) for m, encoder in zip(TWO.modalities, TWO.encoders, strict=True)}
    (logits,) = model(*raw.values())
    assert torch.equal(logits, model.head(list(model.embed(raw).values())))
