"""Rewrites of modules: batch norm without buffers, and segments that share no parameter. They work on copies."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.ops.rewrites.proof import Proofs
from lamina.bundles.manifest import Rewrite
from lamina.errors import CutError

_FROZEN = "statistics are frozen: the scale and shift that hold them are trained as they are"
_NEVER_MEASURED = (
    "statistics were never measured: a plain scale and shift, which normalises nothing; GroupNorm is the better choice"
)
_CONSTANT = "statistics are frozen, and so are the scale and shift that hold them"
_NOTHING_TO_TRAIN = "it has no scale and shift of its own to train, so they are constants"


class ChannelAffine(nn.Module):
    """(batch, channels, ...) -> the same: a scale and a shift for each channel, then `after`, if there is one."""

    def __init__(self, weight: Tensor, bias: Tensor, after: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        y = x * self.weight.reshape(shape) + self.bias.reshape(shape)
        return y if self.after is None else self.after(y)


def fold_batch_norm(module: nn.Module, where: str = "") -> tuple[nn.Module, list[Rewrite]]:
    """A copy in evaluation mode whose batch norms are `ChannelAffine`, so that it has no buffers of theirs.

    The parameters keep their names. Each replacement is compared with its original on random features. Raises CutError for
    a batch norm without running statistics, and ParityError for a kind of batch norm that computes something else.
    """
    copy = deepcopy(module).eval()
    proofs = Proofs(where)
    folded: dict[int, nn.Module] = {}
    if _is_batch_norm(copy):
        return _folded(copy, where or "the module", proofs), proofs.rewrites()
    for name, parent in list(copy.named_modules()):
        for key, child in parent._modules.items():  # one module may have two names
            if child is not None and _is_batch_norm(child):
                if id(child) not in folded:
                    folded[id(child)] = _folded(child, f"{name}.{key}".lstrip("."), proofs)
                parent._modules[key] = folded[id(child)]
    return copy, proofs.rewrites()


def untie(segments: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], list[Rewrite]]:
    """Copies of the segments, in which no two share a parameter; what was shared and is trained is listed by the segment that
    lost it."""
    owners: dict[int, str] = {}
    copies: dict[str, nn.Module] = {}
    rewrites = []
    for name, module in segments.items():
        shared = {  # one that is never trained stays equal by itself
            key: owners[id(value)]
            for key, value in module.named_parameters()
            if value.requires_grad and owners.get(id(value), name) != name
        }
        for value in module.parameters():
            owners.setdefault(id(value), name)
        copies[name] = deepcopy(module)
        if shared:
            rewrites.append(
                Rewrite(
                    where=name,
                    kind="tied weights separated",
                    count=len(shared),
                    largest_difference=0.0,
                    note="; ".join(f"{key} began as a copy of one in {owner}" for key, owner in shared.items())
                    + "; trained apart, they will differ",
                )
            )
    return copies, rewrites


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"  # torchvision's, timm's


def _folded(norm: Any, name: str, proofs: Proofs) -> ChannelAffine:
    if norm.running_mean is None:
        raise CutError(
            f"{name} normalises by the statistics of each batch (track_running_stats=False), which engines would not agree "
            "on: use GroupNorm"
        )
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else norm.bias + shift
        # timm's classes drop and activate after the norm
        after = [part for part in (getattr(norm, key, None) for key in ("drop", "act")) if isinstance(part, nn.Module)]
        after = [part for part in after if not isinstance(part, nn.Identity)]
        folded = ChannelAffine(scale.clone(), shift.clone(), nn.Sequential(*after) if after else None).eval()
        folded.weight.requires_grad_(_is_trained(norm.weight))
        folded.bias.requires_grad_(_is_trained(norm.bias))
        x = torch.randn(2, len(scale), *_features(norm), generator=torch.Generator().manual_seed(0))
        proofs.add("batch norm folded", _notes(norm), lambda: norm(x), folded(x))
    return folded


def _features(norm: nn.Module) -> tuple[int, ...]:
    """Sizes that this kind of batch norm takes after the channels."""
    if isinstance(norm, nn.BatchNorm1d):
        return (3,)
    return (3, 3, 3) if isinstance(norm, nn.BatchNorm3d) else (3, 3)


def _notes(norm: nn.Module) -> list[str]:
    seen = getattr(norm, "num_batches_tracked", None)
    statistics = _FROZEN if _is_trained(norm.weight) or _is_trained(norm.bias) else _CONSTANT
    if seen is not None and int(seen) == 0:
        statistics = _NEVER_MEASURED
    return [statistics] if norm.weight is not None else [statistics, _NOTHING_TO_TRAIN]


def _is_trained(value: Any) -> bool:
    """A buffer, or nothing at all, is not."""
    return isinstance(value, nn.Parameter) and value.requires_grad
