"""Layers that begin as the identity, whatever they compute. Engines are held to them in tests/conformance."""

import pytest
import torch

from export.models.adapters import adapt
from export.models.adapters.common import run_trunk, segments_of
from export.plans.resolve import resolve
from export.trunk import MeanTokens, Trunk
from lamina.errors import CutError
from lamina.plans.model import Values
from tests.export.adapters.small import CASES, LAYERS
from tests.export.tiny import Doubling
from tests.export.user_models import Block, signal


@pytest.mark.parametrize("name", ["bert", "timm", "clip text"])
def test_layers_change_nothing_until_their_gates_open_and_compute_what_they_did_at_1(name):
    case = next(CASES[each] for each in CASES if each.startswith(name))
    torch.manual_seed(0)
    model = case.build()
    plain, gated = adapt(model, **case.options), adapt(model, **case.options, gated=True)
    x = case.draw()
    with torch.no_grad():
        features = plain.layers[0](plain.stem(x))
        assert torch.equal(gated.layers[0](gated.stem(x)), features)
        for layer in gated.layers[1:]:
            assert torch.equal(layer(features), features)
        for layer in gated.layers[1:]:
            layer.gate += 1
        torch.testing.assert_close(run_trunk(gated, x), run_trunk(plain, x))
    assert len(gated.layers) == len(plain.layers) == LAYERS


def test_a_gate_learns_at_once_and_its_layer_when_it_has_opened():
    trunk = adapt(signal(), gated=True)
    x = torch.randn(3, 5, 8)
    layer = trunk.layers[1]
    for opened in (False, True):
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).square().sum().backward()
        assert layer.gate.grad.any()
        assert layer.layer.out.weight.grad.any() == opened
        with torch.no_grad():
            layer.gate += 0.1


def test_a_trunk_of_the_users_own_gets_gates_too():
    trunk = Trunk(torch.nn.Linear(3, 8), (Block(8), Block(8).eval()), torch.nn.Identity(), MeanTokens(), Values(shape=(5, 3)))
    stem, first, second, norm = segments_of(adapt(trunk, gated=True))
    assert "gate" in dict(second.named_parameters()) and not second.training
    assert not any(name == "gate" for part in (stem, first, norm) for name, _ in part.named_parameters())


def test_a_layer_that_changes_the_shape_cannot_begin_as_the_identity():
    model = signal()
    model.layers = torch.nn.ModuleList([Block(8), Doubling()])
    trunk = adapt(model, gated=True)
    with pytest.raises(CutError, match=r"gated: a Doubling makes features \(10, 8\) of \(5, 8\)"):
        run_trunk(trunk, torch.randn(2, 5, 3))


def test_a_plan_file_asks_for_gates_with_an_option(tmp_path):
    (tmp_path / "plan.toml").write_text(
        'name = "mine"\nclasses = 3\n[encoders.signal]\nfactory = "tests.export.user_models:signal"\n'
        "options = { gated = true }\n"
    )
    model = resolve(str(tmp_path / "plan.toml")).model
    assert [name for name, _ in model.named_parameters() if name.endswith("gate")] == ["encoders.signal.layers.1.gate"]
