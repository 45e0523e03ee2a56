"""transformers ViT and DeiT, alone or under a head."""

import torch
from torch import nn

from export.models.adapters.common import check_pool, check_trunk, image_pool, left_out, working_copy
from export.trunk import Trunk
from lamina.plans.model import Image


def adapt_vit(module: nn.Module, *, pool: str = "first") -> Trunk:
    """`pool`: "first" (default) is the class token, as the libraries' classifiers take it; "mean" is over the patches."""
    name = f"transformers {type(module).__name__}"
    check_pool(pool, name)
    whole = working_copy(module)
    copy = whole.base_model
    notes = (*left_out(whole, copy), *(("Left out: pooler.",) if copy.pooler is not None else ()))
    if copy.embeddings.mask_token is not None:
        copy.embeddings.mask_token = None
        notes += ("Left out: the mask token.",)
    patches = copy.embeddings.patch_embeddings
    height, width = patches.image_size
    special = copy.embeddings.position_embeddings.shape[1] - patches.num_patches
    example = torch.randn(1, patches.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    tokens = image_pool(pool, special)
    with torch.no_grad():
        expected = tokens(copy(example).last_hidden_state)
    trunk = Trunk(
        stem=copy.embeddings,
        layers=tuple(copy.layers),
        norm=copy.layernorm,
        pool=tokens,
        input=Image(channels=patches.num_channels, height=height, width=width),
        notes=notes,
    )
    return check_trunk(trunk, example, expected, name)
