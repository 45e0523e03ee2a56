"""Objectives: embeddings -> (mean loss over the batch, number of samples that were right).

The count is integer and detached: training runtimes accept one differentiable output, the loss. Objectives of two views are in
`export.objectives.self_supervised`, and what a stage adds to its objective in `export.graphs.stage_module`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.objectives.fusions import classify
from lamina.plans.model import Contrastive, Supervised


def supervised(head: nn.Module, embeddings: Sequence[Tensor | None], label: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the head on the joined projections; `label` is (batch,) int64."""
    return cross_entropy(classify(head, embeddings), label)


def cross_entropy(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, label), (logits.argmax(dim=-1) == label).sum().detach()


def distillation(temperature: float, teacher: Tensor, logits: Tensor) -> Tensor:
    """T^2 KL(teacher || student) of the classes at temperature T, mean over the batch."""
    wanted, given = F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(logits / temperature, dim=-1)
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(-1).mean()


def contrastive(temperature: float, a: Tensor, b: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE in the batch (FedMML, methods section 1.2); right = a finds its own b first.

    With labels, all samples of its class are the positives of a sample: the mean over them of -log softmax, as in supervised
    contrastive learning. Right = a finds a b of its class first.
    """
    similarity = l2_normalise(a) @ l2_normalise(b).t() / temperature
    if label is None:
        target = torch.arange(a.shape[0], device=a.device)
        loss = 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.t(), target))
        return loss, (similarity.argmax(dim=-1) == target).sum().detach()
    positives = (label.unsqueeze(1) == label.unsqueeze(0)).to(similarity.dtype)
    share = positives / positives.sum(dim=-1, keepdim=True)
    forth, back = F.log_softmax(similarity, dim=-1), F.log_softmax(similarity.t(), dim=-1)
    loss = -0.5 * ((share * forth).sum(-1).mean() + (share * back).sum(-1).mean())
    return loss, (label.index_select(0, similarity.argmax(dim=-1)) == label).sum().detach()


def l2_normalise(z: Tensor) -> Tensor:
    """Unit rows; the epsilon keeps the gradient finite at zero."""
    return z * torch.rsqrt((z * z).sum(-1, keepdim=True) + 1e-6)


class ContrastiveLoss(nn.Module):
    """The contrastive objective as a module without weights: two embeddings (batch, output), and the label if it has classes
    -> (loss, correct)."""

    def __init__(self, objective: Contrastive) -> None:
        super().__init__()
        self.temperature = objective.temperature

    def forward(self, a: Tensor, b: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return contrastive(self.temperature, a, b, label)


def apply_objective(
    objective: Supervised | Contrastive, head: nn.Module | None, embeddings: Sequence[Tensor | None], label: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The main term of an objective on the embeddings of its modalities, in order; None is an absent modality."""
    if isinstance(objective, Supervised):
        assert head is not None and label is not None
        return supervised(head, embeddings, label)
    a, b = embeddings
    assert a is not None and b is not None
    return contrastive(objective.temperature, a, b, label)
