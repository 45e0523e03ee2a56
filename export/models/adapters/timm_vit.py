"""timm's VisionTransformer: ViT, DeiT, distilled DeiT, with register tokens, layer scale or a norm after the pool."""

import torch
from torch import Tensor, nn

from export.models.adapters.common import MeanOf, check_pool, check_trunk, image_pool, working_copy
from export.trunk import FirstToken, Trunk
from lamina.errors import CutError
from lamina.plans.model import Image

_OURS = {"token": "first", "avg": "mean"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def adapt_timm_vit(module: nn.Module, *, pool: str | None = None) -> Trunk:
    """`pool` is by default the model's own (`global_pool`). A distilled model's "first" is the mean of its class and its
    distillation token, as timm pools it. The classifier is left out."""
    name = f"timm {type(module).__name__}"
    if pool is None:
        if getattr(module, "attn_pool", None) is not None or module.global_pool not in _OURS:
            raise CutError(
                f"{name} pools with {module.global_pool!r}, which has weights of its own or no smooth gradient; give "
                "pool='first' or pool='mean' instead"
            )
        pool = _OURS[module.global_pool]
    check_pool(pool, name)
    if pool == "first" and module.cls_token is None:
        raise CutError(f"{name} has no class token; give pool='mean'")
    copy = working_copy(module)
    height, width = copy.patch_embed.img_size or (0, 0)
    if not height:
        raise CutError(f"{name} has no fixed image size; create it with img_size=...")
    example = torch.randn(1, copy.in_chans, height, width, generator=torch.Generator().manual_seed(0))
    is_distilled = hasattr(copy, "dist_token")
    with torch.no_grad():
        features = copy.forward_features(example)
        if is_distilled and pool == "first":
            expected = copy.forward_head(features, pre_logits=True)
        else:
            copy.attn_pool = None
            expected = copy.fc_norm(copy.pool(features, pool_type=_THEIRS[pool]))

    tokens: nn.Module = image_pool(pool, 0 if copy.pool_include_prefix else copy.num_prefix_tokens)
    if is_distilled and pool == "first":
        tokens = MeanOf(0, 2)
    norm, layers = copy.norm, tuple(copy.blocks)
    if not isinstance(copy.fc_norm, nn.Identity):
        norm, tokens = NormAfterPool(norm, tokens, copy.fc_norm), FirstToken()
    trunk = Trunk(
        stem=Stem(copy),
        layers=layers,
        norm=norm,
        pool=tokens,
        input=Image(channels=copy.in_chans, height=height, width=width),
        notes=_notes(module),
    )
    return check_trunk(trunk, example, expected, name)


class Stem(nn.Module):
    """(batch, channels, height, width) -> (batch, tokens, width): what timm does before the first block.

    `model` is timm's model without blocks, norm and head; its own code adds positions and special tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for part in ("blocks", "norm", "fc_norm", "head", "head_dist", "attn_pool"):
            if getattr(model, part, None) is not None:
                setattr(model, part, nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


class NormAfterPool(nn.Module):
    """(batch, tokens, width) -> the same: every token is the normalised pool.

    The norm belongs to a segment and the pool to none, so where timm normalises after the pool, this does both and the
    trunk's pool takes the first token of equal ones.
    """

    def __init__(self, norm: nn.Module, pool: nn.Module, fc_norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.pool, self.fc_norm = norm, pool, fc_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_norm(self.pool(self.norm(x))).unsqueeze(1).expand_as(x)


def _notes(module: nn.Module) -> tuple[str, ...]:
    parts = ("head", "head_dist", "attn_pool")
    dropped = [part for part in parts if any(True for _ in (getattr(module, part, None) or nn.Identity()).parameters())]
    return (f"Left out: {', '.join(dropped)}.",) if dropped else ()
