import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.train.optimizers import make_optimizer
from lamina.plans.plan import SGD, AdamW

SETTINGS = [
    SGD(),
    SGD(momentum=0.9),
    SGD(weight_decay=0.1),
    SGD(momentum=0.9, weight_decay=0.05),
    AdamW(),
    AdamW(beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.2),
    AdamW(weight_decay=0.0),
]


def torch_optimizer(settings, parameter, rate):
    if isinstance(settings, SGD):
        return torch.optim.SGD([parameter], rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW([parameter], rate, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay)


def follow(settings, rate, count, seed, steps=20):
    """Parameters after some steps of ours and of torch's, over the same gradients."""
    random = np.random.default_rng(seed)
    parameters = random.normal(size=count).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    reference, ours = torch_optimizer(settings, theirs, rate), make_optimizer(settings.model_dump(), count, rate)
    for _ in range(steps):
        gradient = random.normal(size=count).astype(np.float32)
        before = gradient.copy()
        theirs.grad = torch.from_numpy(gradient.copy())
        reference.step()
        ours.step(parameters, gradient)
        np.testing.assert_array_equal(gradient, before)
    return parameters, theirs.detach().numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("count", [1, 1000, (1 << 15) + 17])  # the last one is more than one piece
def test_twenty_steps_are_those_of_torch(settings, count):
    ours, theirs = follow(settings, 0.01, count, seed=0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


@settings(max_examples=40)
@given(
    settings=st.one_of(
        st.builds(SGD, momentum=st.floats(0, 0.99), weight_decay=st.floats(0, 0.5)),
        st.builds(
            AdamW,
            beta1=st.floats(0, 0.99),
            beta2=st.floats(0, 0.9999),
            eps=st.floats(1e-8, 1e-2),
            weight_decay=st.floats(0, 0.5),
        ),
    ),
    rate=st.floats(1e-5, 0.1),
    seed=st.integers(0, 2**31),
)
def test_any_legal_settings_follow_torch(settings, rate, seed):
    ours, theirs = follow(settings, rate, 50, seed)
    np.testing.assert_allclose(ours, theirs, rtol=5e-5, atol=5e-5)
