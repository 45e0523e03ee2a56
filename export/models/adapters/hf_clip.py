"""transformers CLIP: one of its two towers, with its projection where the model has it."""

from typing import Any

import torch
from torch import Tensor, nn

from export.models.adapters.columns import (
    CausalLayer,
    ColumnNorm,
    MeanOfMarked,
    example_texts,
    text_length,
    with_column,
)
from export.models.adapters.common import Unmasked, check_trunk, working_copy
from export.trunk import FirstToken, Trunk
from lamina.errors import ConfigError, CutError
from lamina.plans.model import Image, TextTokens

_FIRST_EOS_ID = 2  # older configs say so and mean: the greatest id of the text


def adapt_clip(module: nn.Module, *, part: str | None = None, tokens: int | None = None) -> Trunk:
    """`part` is "vision" or "text", needed for a CLIPModel. Both pool as CLIP does: the class token, the end of the text.

    `tokens` is for text; the default is the model's greatest up to 128 (77 for the published models).
    """
    name = f"transformers {type(module).__name__}"
    parts = {"vision": "patch_embedding", "text": "token_embedding"}
    if part not in (None, *parts):
        raise ConfigError(f"{name}: part={part!r} is not known; say 'vision' or 'text'")
    copy = working_copy(module)
    towers = {kind: _tower(copy, kind, embedding) for kind, embedding in parts.items()}
    found = [kind for kind, tower in towers.items() if tower is not None]
    if part is None and len(found) == 1:
        part = found[0]
    if part is None:
        raise ConfigError(f"{name} has two towers; say part='vision' or part='text'")
    if part not in found:
        raise CutError(f"{name} has no {part} tower, only {' and '.join(found)}")
    if part == "vision":
        if tokens is not None:
            raise ConfigError(f"{name}: the option 'tokens' is for part='text'")
        return _vision(copy, towers["vision"], name)
    return _text(copy, towers["text"], tokens, name)


def _tower(copy: Any, kind: str, embedding: str) -> Any:
    tower = getattr(copy, f"{kind}_model", None) or copy
    return tower if hasattr(getattr(tower, "embeddings", None), embedding) else None


def _vision(copy: Any, tower: Any, name: str) -> Trunk:
    config = tower.config
    size = config.image_size
    example = torch.randn(1, config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(example).pooler_output
    trunk = Trunk(
        stem=VisionStem(tower.embeddings, tower.pre_layrnorm),
        layers=tuple(Unmasked(layer) for layer in tower.encoder.layers),
        norm=tower.post_layernorm,
        pool=FirstToken(),
        input=Image(channels=config.num_channels, height=size, width=size),
        projection=getattr(copy, "visual_projection", None),
        notes=_left_out(copy, tower, "visual_projection"),
    )
    return check_trunk(trunk, example, expected, name)


def _text(copy: Any, tower: Any, tokens: int | None, name: str) -> Trunk:
    config = tower.config
    length = text_length(tokens, config.max_position_embeddings, name)
    example = example_texts(length, config.vocab_size, None)
    if config.eos_token_id < config.vocab_size:
        example[1, length // 2 :] = config.eos_token_id  # padding with the end token, as CLIP's tokenizer does
    with torch.no_grad():
        expected = tower(example).pooler_output
    trunk = Trunk(
        stem=TextStem(tower.embeddings, config.eos_token_id, length),
        layers=tuple(CausalLayer(layer) for layer in tower.encoder.layers),
        norm=ColumnNorm(tower.final_layer_norm),
        pool=MeanOfMarked(),
        input=TextTokens(vocabulary=config.vocab_size, length=length),
        projection=getattr(copy, "text_projection", None),
        notes=(
            *_left_out(copy, tower, "text_projection"),
            f"Texts are {length} tokens long and end with the end token; what stands after it is not read.",
        ),
    )
    return check_trunk(trunk, example, expected, name)


class VisionStem(nn.Module):
    """(batch, channels, height, width) -> (batch, 1 + patches, width)."""

    def __init__(self, embeddings: Any, norm: nn.Module) -> None:
        super().__init__()
        self.class_embedding = embeddings.class_embedding
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding
        self.pre_layrnorm = norm

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return self.pre_layrnorm(torch.cat([first, patches], dim=1) + self.position_embedding.weight)


class TextStem(nn.Module):
    """(batch, tokens) int64 -> (batch, tokens, width + 1): embeddings, and a column with 1 at the end token alone.

    Attention is causal, so neither padding nor the mask can reach the end token, which is what CLIP pools.
    """

    def __init__(self, embeddings: Any, end: int, tokens: int) -> None:
        super().__init__()
        self.end, self.tokens = end, tokens
        self.token_embedding = embeddings.token_embedding
        self.position_embedding = embeddings.position_embedding

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.position_embedding.weight[: self.tokens]
        # The first of equal ones; without any, the first token, as the library has it.
        likely = ids.to(torch.float32) if self.end == _FIRST_EOS_ID else (ids == self.end).to(torch.float32)
        place = likely.argmax(dim=1, keepdim=True)
        column = (torch.arange(self.tokens).unsqueeze(0) == place).to(x.dtype)
        return with_column(x, column.unsqueeze(-1))


def _left_out(copy: Any, tower: Any, projection: str) -> tuple[str, ...]:
    """What CLIP has beside this tower and its projection: the other tower, the temperature."""
    if copy is tower:
        return ()
    kept = (tower, getattr(copy, projection, None))
    names = [name for name, child in copy.named_children() if not any(child is part for part in kept)]
    names += [name for name, _ in copy.named_parameters(recurse=False)]
    return (f"Left out: {', '.join(names)}.",) if names else ()
