"""Task heads: the embeddings of all modalities -> logits, each way of joining them (methods: FedMML, section 1.2).

    concat            Linear([z_1 .. z_M])
    sum               Linear([z_1 .. z_M, z_1 + .. + z_M])
    gated             Linear([z_1 .. z_M, sum of g_m V_m(z_m)])    g = softmax over modalities of a Linear of [z_1 .. z_M]
    self_attention    Linear([z_1 + a_1 .. z_M + a_M])             a: one head of attention, the embeddings are its tokens
    co_attention      Linear([z_1, z_2, c_1, c_2])                 c: attention between the features of two embeddings

A head takes the list of embeddings (batch, output), or the same side by side in one tensor. None stands for a modality that a
device lacks. Its embedding counts as zeros; `gated` and `self_attention` give it no weight either, and with `co_attention`
there is nothing to attend to, so that c is zero. What belongs to it in the head has then a gradient of exactly zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamina.plans.model import Fusion

Embeddings = Tensor | Sequence[Tensor | None]
_NEVER = -1e9  # what is added to a score so that softmax gives it no weight at all


def make_head(fusion: Fusion, modalities: int, output: int, classes: int) -> nn.Module:
    """A head with random weights for so many modalities with embeddings of width `output`."""
    if fusion == "concat":
        return ConcatHead(modalities * output, classes)
    return _HEADS[fusion](modalities, output, classes)


def classify(head: nn.Module, embeddings: Sequence[Tensor | None]) -> Tensor:
    """Logits. A head of the user's own, which is none of ours, takes the embeddings side by side in one tensor."""
    if isinstance(head, ConcatHead | FusionHead):
        logits: Tensor = head(embeddings)
        return logits
    joined: Tensor = head(torch.cat(_filled(embeddings), dim=-1))
    return joined


class ConcatHead(nn.Linear):
    """One Linear: its tensors are `weight` and `bias`."""

    def forward(self, given: Embeddings) -> Tensor:  # type: ignore[override]
        return super().forward(given if isinstance(given, Tensor) else torch.cat(_filled(given), dim=-1))


class FusionHead(nn.Module, ABC):
    """Joins the embeddings to one vector of `joined` numbers, on which `out` decides."""

    def __init__(self, modalities: int, output: int, joined: int, classes: int) -> None:
        super().__init__()
        self.modalities, self.output = modalities, output
        self.out = nn.Linear(joined, classes)

    def forward(self, given: Embeddings) -> Tensor:
        if isinstance(given, Tensor):
            given = given.split(self.output, dim=-1)
        logits: Tensor = self.out(self.join(_filled(given), [z is not None for z in given]))
        return logits

    @abstractmethod
    def join(self, embeddings: list[Tensor], present: list[bool]) -> Tensor:
        """(batch, joined). Where not `present`, the embedding is zeros."""

    def extra_repr(self) -> str:
        return f"{self.modalities} of {self.output}"


class SumHead(FusionHead):
    def __init__(self, modalities: int, output: int, classes: int) -> None:
        super().__init__(modalities, output, (modalities + 1) * output, classes)

    def join(self, embeddings: list[Tensor], present: list[bool]) -> Tensor:
        total = embeddings[0]
        for z in embeddings[1:]:
            total = total + z
        return torch.cat([*embeddings, total], dim=-1)


class GatedHead(FusionHead):
    """The gate gives one weight for each modality. The published code has a Linear to `output` numbers instead, softmax over
    all of them, and takes the first two for the weights of its two modalities: ours sum up to 1, for any number of them."""

    def __init__(self, modalities: int, output: int, classes: int) -> None:
        super().__init__(modalities, output, (modalities + 1) * output, classes)
        self.gate = nn.Linear(modalities * output, modalities)
        self.values = nn.ModuleList(nn.Linear(output, output) for _ in range(modalities))

    def join(self, embeddings: list[Tensor], present: list[bool]) -> Tensor:
        weights = torch.softmax(self.gate(torch.cat(embeddings, dim=-1)) + _mask(embeddings[0], present), dim=-1)
        mixed = torch.zeros_like(embeddings[0])
        for index, (value, z) in enumerate(zip(self.values, embeddings, strict=True)):
            mixed = mixed + weights[:, index : index + 1] * value(z)
        return torch.cat([*embeddings, mixed], dim=-1)


class SelfAttentionHead(FusionHead):
    def __init__(self, modalities: int, output: int, classes: int) -> None:
        super().__init__(modalities, output, modalities * output, classes)
        self.query, self.key, self.value, self.mix = (nn.Linear(output, output) for _ in range(4))

    def join(self, embeddings: list[Tensor], present: list[bool]) -> Tensor:
        tokens = torch.cat([z.unsqueeze(1) for z in embeddings], dim=1)  # (batch, modalities, output)
        scores = self.query(tokens) @ self.key(tokens).transpose(-2, -1) * self.output**-0.5
        attended = self.mix(torch.softmax(scores + _mask(tokens, present), dim=-1) @ self.value(tokens))
        parts = [z + attended[:, i] * float(here) for i, (z, here) in enumerate(zip(embeddings, present, strict=True))]
        return torch.cat(parts, dim=-1)


class CoAttentionHead(FusionHead):
    """The score of feature i of the first with feature j of the second embedding is tanh(W z_1)_i * z_2_j. Softmax over i mixes
    the features of the first, softmax over j those of the second. The scores take output * output numbers for each sample."""

    def __init__(self, modalities: int, output: int, classes: int) -> None:
        super().__init__(modalities, output, 2 * modalities * output, classes)
        self.score = nn.Linear(output, output)

    def join(self, embeddings: list[Tensor], present: list[bool]) -> Tensor:
        first, second = embeddings
        scores = torch.tanh(self.score(first)).unsqueeze(2) @ second.unsqueeze(1)  # (batch, i, j)
        of_first = (first.unsqueeze(1) @ torch.softmax(scores, dim=1)).squeeze(1)
        of_second = (torch.softmax(scores, dim=2) @ second.unsqueeze(2)).squeeze(2)
        here = float(all(present))
        return torch.cat([first, second, of_first * here, of_second * here], dim=-1)


_HEADS: dict[Fusion, type[FusionHead]] = {
    "sum": SumHead,
    "gated": GatedHead,
    "self_attention": SelfAttentionHead,
    "co_attention": CoAttentionHead,
}


def _filled(embeddings: Sequence[Tensor | None]) -> list[Tensor]:
    """Zeros in place of what is absent."""
    like = next(z for z in embeddings if z is not None)
    return [torch.zeros_like(like) if z is None else z for z in embeddings]


def _mask(like: Tensor, present: list[bool]) -> Tensor | float:
    """What is added to scores whose last axis is the modalities; nothing where all are present."""
    if all(present):
        return 0.0
    # Computed, because a graph of ours holds no tensors.
    places = torch.arange(len(present), device=like.device)
    absent = [(places == index).to(like.dtype) for index, here in enumerate(present) if not here]
    return torch.stack(absent).sum(0) * _NEVER
