"""Losses of two views of the same samples (methods: LW-FedSSL, section 2; FLL, section 3.1).

Each takes embeddings (batch, output) that are not normalised yet. q are predictions, k the embeddings that they should meet;
no gradient goes through k, because it is made of constants or detached by the caller.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.objectives.objectives import l2_normalise

Pair = tuple[Tensor, Tensor]
"""Of both views."""
_NEVER = -1e9  # what is added to a similarity so that softmax gives it no weight at all


def simclr(temperature: float, a: Tensor, b: Tensor) -> Tensor:
    """Cross entropy of each of the 2 x batch views finding its other view among all others, mean over all (NT-Xent)."""
    a, b = l2_normalise(a), l2_normalise(b)
    across = a @ b.t() / temperature
    # A view is not compared with itself. Four products of (batch, batch) hold no copy of the embeddings side by side.
    itself = _same(a).to(a.dtype) * _NEVER
    of_a = torch.cat([across, a @ a.t() / temperature + itself], dim=1)
    of_b = torch.cat([across.t(), b @ b.t() / temperature + itself], dim=1)
    target = _places(a)
    return 0.5 * (F.cross_entropy(of_a, target) + F.cross_entropy(of_b, target))


class TwoViewLoss(nn.Module):
    """SimCLR as a module without weights: the embeddings (batch, output) of both views -> (loss, correct)."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return simclr(self.temperature, a, b), found_first(a, b)


def info_nce(temperature: float, q: Tensor, k: Tensor) -> Tensor:
    """Mean of -log softmax_j(q_i k_j / temperature) at j = i: the other samples of the batch are the negatives."""
    return F.cross_entropy(l2_normalise(q) @ l2_normalise(k).t() / temperature, _places(q))


def distance(q: Tensor, k: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(q_i, k_i): BYOL, without negatives."""
    return 2 - 2 * cosine(q, k).mean()


def against_keys(method: str, temperature: float, q: Pair, k: Pair) -> tuple[Tensor, Tensor]:
    """moco or byol: the predictions of each view against the keys of the other -> (loss, correct)."""
    if method == "moco":
        loss = info_nce(temperature, q[0], k[1]) + info_nce(temperature, q[1], k[0])
    else:
        loss = distance(q[0], k[1]) + distance(q[1], k[0])
    return loss, found_first(q[0], k[1])


class KeyLoss(nn.Module):
    """moco or byol as a module without weights: predictions and keys (batch, output) of both views -> (loss, correct)."""

    def __init__(self, method: str, temperature: float) -> None:
        super().__init__()
        self.method, self.temperature = method, temperature

    def forward(self, q_a: Tensor, q_b: Tensor, k_a: Tensor, k_b: Tensor) -> tuple[Tensor, Tensor]:
        return against_keys(self.method, self.temperature, (q_a, q_b), (k_a, k_b))


def moon(temperature: float, z: Tensor, start: Tensor, previous: Tensor) -> Tensor:
    """MOON's term: -log of the share that `start` has against `previous`, by similarity to z; mean over the batch."""
    near, far = cosine(z, start) / temperature, cosine(z, previous) / temperature
    # In the first round both are the same model: ln 2, and no gradient.
    return (torch.logsumexp(torch.cat([near.unsqueeze(1), far.unsqueeze(1)], dim=1), dim=1) - near).mean()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(batch,)"""
    return (l2_normalise(a) * l2_normalise(b)).sum(-1)


def found_first(a: Tensor, b: Tensor) -> Tensor:
    """How many samples of a have their own b as the nearest of the batch."""
    similarity = l2_normalise(a) @ l2_normalise(b).t()
    return (similarity.argmax(dim=-1) == _places(a)).sum().detach()


def _places(a: Tensor) -> Tensor:
    return torch.arange(a.shape[0], device=a.device)


def _same(a: Tensor) -> Tensor:
    places = _places(a)
    return places.unsqueeze(1) == places.unsqueeze(0)
