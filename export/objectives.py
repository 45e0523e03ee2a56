"""Objectives: embeddings -> (mean loss over the batch, number of samples that were right).

The count is integer and detached: training runtimes accept one differentiable output, the loss.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.model import Contrastive, Supervised


def supervised(head: nn.Module, embeddings: list[Tensor], label: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the head on the concatenated projections; `label` is (batch,) int64."""
    logits = head(torch.cat(embeddings, dim=-1))
    return F.cross_entropy(logits, label), (logits.argmax(dim=-1) == label).sum().detach()


def contrastive(temperature: float, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE in the batch (FedMML, methods section 1.2); right = a finds its own b first."""
    similarity = l2_normalise(a) @ l2_normalise(b).t() / temperature
    target = torch.arange(a.shape[0], device=a.device)
    loss = 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.t(), target))
    return loss, (similarity.argmax(dim=-1) == target).sum().detach()


def l2_normalise(z: Tensor) -> Tensor:
    """Unit rows; the epsilon keeps the gradient finite at zero."""
    return z * torch.rsqrt((z * z).sum(-1, keepdim=True) + 1e-6)


class ContrastiveLoss(nn.Module):
    """The contrastive objective as a module without weights: two embeddings (batch, output) -> (loss, correct)."""

    def __init__(self, objective: Contrastive) -> None:
        super().__init__()
        self.temperature = objective.temperature

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return contrastive(self.temperature, a, b)


def apply_objective(
    objective: Supervised | Contrastive, head: nn.Module | None, embeddings: list[Tensor], label: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The objective of a model description on the embeddings of its modalities, in order."""
    if isinstance(objective, Supervised):
        assert head is not None and label is not None
        return supervised(head, embeddings, label)
    return contrastive(objective.temperature, *embeddings)
