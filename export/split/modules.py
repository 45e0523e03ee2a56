"""The modules of split training: adapters inside frozen blocks, the two ends of an encoder, the fusion net, the losses.

They take the blocks of the built-in family (`export.models.models.Layer`), whose attention and MLP an adapter must reach. As
everywhere in lamina there is no dropout (the release has 0.2 and 0.3).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.models.models import Layer
from export.trunk import MeanTokens
from lamina.split.plan import AdapterSettings, FusionNet, SplitPlan, Transfer

_TINY = 1e-6  # keeps gradients finite where a norm or a loss is zero


class Adapter(nn.Module):
    """Linear, GELU, Linear, GELU, Linear; the one in the middle has the same shape in all modalities."""

    def __init__(self, width: int, settings: AdapterSettings) -> None:
        super().__init__()
        self.down = nn.Linear(width, settings.hidden)
        self.middle = nn.Linear(settings.hidden, settings.hidden)
        self.up = nn.Linear(settings.hidden, width)
        if settings.start == "frozen_model":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.middle(F.gelu(self.down(x)))))


class LowPrefix(nn.Module):
    """Raw input -> (base, branch), all of the low end that no training changes; a device computes it once per example.

    `branch` is what the modality adapter takes, `base` what its output is added to, both (batch, tokens, width).
    """

    def __init__(self, stem: nn.Module, block: Layer, settings: AdapterSettings) -> None:
        super().__init__()
        self.stem, self.block = stem, block
        self.has_skip = settings.start == "frozen_model"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.block.attention(self.block.attention_norm(x))
        branch = _mlp(self.block, self.block.mlp_norm(x))
        return (x + branch if self.has_skip else x + 0.0), branch


class LowEnd(nn.Module):
    """base + MA(branch): the activations that go up."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, base: Tensor, branch: Tensor) -> Tensor:
        return base + self.adapter(branch)


class HighEnd(nn.Module):
    """The other layers, the last with the task adapter beside its MLP, then norm and pool -> (batch, width)."""

    def __init__(self, adapter: Adapter, blocks: list[Layer], norm: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pool = MeanTokens()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        x = x + last.attention(last.attention_norm(x))
        normed = last.mlp_norm(x)
        return self.pool(self.norm(x + _mlp(last, normed) + self.adapter(normed)))


class Fusion(nn.Module):
    """Features (batch, width) of each modality -> (f (batch, width), logits (batch, classes))."""

    def __init__(self, width: int, modalities: int, classes: int, settings: FusionNet) -> None:
        super().__init__()
        inner = settings.heads * settings.head_width
        self.settings = settings
        self.over_batch = settings.attention == "batch"
        taken = modalities * width if self.over_batch else width
        self.query, self.key, self.value = (nn.Linear(taken, inner) for _ in range(3))
        self.mix = nn.Linear(inner if self.over_batch else modalities * inner, width)
        self.classes = nn.Linear(width, classes)

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat(features, dim=-1) if self.over_batch else torch.stack(features, dim=1)
        mixed = self._attend(tokens)
        f = F.gelu(self.mix(mixed.flatten(1)))
        return f, self.classes(f)

    def _attend(self, tokens: Tensor) -> Tensor:
        """(..., tokens, taken) -> (..., tokens, inner); the samples of a batch are the tokens where attention is over it."""
        heads, width = self.settings.heads, self.settings.head_width

        def split(t: Tensor) -> Tensor:  # -> (..., heads, tokens, head width)
            return t.reshape(*t.shape[:-1], heads, width).transpose(-3, -2)

        query, key, value = split(self.query(tokens)), split(self.key(tokens)), split(self.value(tokens))
        scores = torch.softmax(query @ key.transpose(-2, -1) * width**-0.5, dim=-1)
        mixed = (scores @ value).transpose(-3, -2)
        return mixed.reshape(*mixed.shape[:-2], heads * width)


class Classify(nn.Module):
    """Before the switch: (features, fused logits, label) -> (loss, fused loss, correct, fused correct)."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: Tensor, fused_logits: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        logits = self.classifier(features)
        return (
            F.cross_entropy(logits, label),
            F.cross_entropy(fused_logits, label),
            _correct(logits, label),
            _correct(fused_logits, label),
        )


class ClassifyAndTransfer(nn.Module):
    """After the switch: (features, f, fused logits, label) -> the same; f and the fused logits are constants."""

    def __init__(self, classifier: nn.Linear, settings: Transfer) -> None:
        super().__init__()
        self.classifier, self.settings = classifier, settings

    def forward(self, features: Tensor, f: Tensor, fused_logits: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        logits = self.classifier(features)
        own, fused = F.cross_entropy(logits, label), F.cross_entropy(fused_logits, label)
        loss = transfer_loss(self.settings, features, logits, own, f, fused_logits, fused)
        return loss, fused, _correct(logits, label), _correct(fused_logits, label)


def transfer_loss(
    settings: Transfer, features: Tensor, logits: Tensor, own: Tensor, f: Tensor, fused_logits: Tensor, fused: Tensor
) -> Tensor:
    """task (uni + mm/2) + decision KL/(uni + mm) + feature (1 - mean cos(B, f)) (methods, section 4.3)."""
    ours, theirs = torch.log_softmax(logits, dim=-1), torch.log_softmax(fused_logits, dim=-1)
    if settings.direction == "released":
        divergences = (ours.exp() * (ours - theirs)).sum(-1)
    else:
        divergences = (theirs.exp() * (theirs - ours)).sum(-1)
    divergence = divergences.sum() if settings.reduction == "sum" else divergences.mean()
    scale = own + fused
    decision = divergence / ((scale.detach() if settings.detach else scale) + _TINY)
    feature = 1 - _cosine(features, f).mean()
    return settings.task * (own + fused / 2) + settings.decision * decision + settings.feature * feature


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = ((a * a).sum(-1) + _TINY) * ((b * b).sum(-1) + _TINY)
    return (a * b).sum(-1) * torch.rsqrt(norms)


def _mlp(block: Layer, x: Tensor) -> Tensor:
    return block.mlp_out(F.gelu(block.mlp_in(x)))


def _correct(logits: Tensor, label: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == label).sum().detach()


class DeviceStep(nn.Module):
    """All of it on the device: (base, branch of each modality..., label) -> (sum of losses, loss of each modality..., fused
    loss, correct of each modality..., fused correct).

    The fused loss is part of the sum before the switch. Features reach the fusion net as constants, and f and its logits reach
    the transfer as constants, exactly as between device and coordinator.
    """

    def __init__(
        self,
        plan: SplitPlan,
        lows: list[Adapter],
        highs: list[HighEnd],
        classifiers: list[nn.Linear],
        fusion: Fusion,
        is_fused: bool,
    ) -> None:
        super().__init__()
        self.plan, self.is_fused = plan, is_fused
        self.lows, self.highs = nn.ModuleList(lows), nn.ModuleList(highs)
        self.classifiers, self.fusion = nn.ModuleList(classifiers), fusion

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        label = inputs[-1]
        pairs = zip(inputs[:-1:2], inputs[1:-1:2], strict=True)
        features = [high(base + low(branch)) for low, high, (base, branch) in zip(self.lows, self.highs, pairs, strict=True)]
        f, fused_logits = self.fusion(*(feature.detach() for feature in features))
        fused = F.cross_entropy(fused_logits, label)
        losses, correct = [], []
        for feature, classifier in zip(features, self.classifiers, strict=True):
            logits = classifier(feature)
            own = F.cross_entropy(logits, label)
            if self.is_fused:
                own = transfer_loss(self.plan.transfer, feature, logits, own, f.detach(), fused_logits.detach(), fused.detach())
            losses.append(own)
            correct.append(_correct(logits, label))
        total = sum(losses[1:], losses[0]) + (0.0 if self.is_fused else fused)
        parts = [loss.detach() for loss in losses]
        return (total, *parts, fused.detach(), *correct, _correct(fused_logits, label))
