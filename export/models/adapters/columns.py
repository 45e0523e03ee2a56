"""Features with one more column, which marks tokens: how padding, or the end of a text, reaches every layer.

A segment takes one tensor, so what a layer has to know of each token travels with its features:
(batch, tokens, width + 1), the last column 1 or 0. It is read by `> 0.5`, so that features stored as float16 or int8 mark the
same tokens, and it is handed on unchanged.
"""

import torch
from torch import Tensor, nn

from lamina.errors import ConfigError

DEFAULT_TOKENS = 128
_REMOVED = -1e9  # added to a score before the softmax: its weight is then exactly 0 in float32


def with_column(x: Tensor, column: Tensor) -> Tensor:
    """(batch, tokens, width), (batch, tokens, 1) -> (batch, tokens, width + 1)."""
    return torch.cat([x, column], dim=-1)


def split_column(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `with_column`."""
    return x[..., :-1], x[..., -1:]


def is_marked(column: Tensor) -> Tensor:
    """(batch, tokens, 1) as stored -> the same as float32, exactly 1 or 0."""
    return (column > 0.5).to(torch.float32)


class MaskedLayer(nn.Module):
    """A library's layer that takes (features, additive mask) and attends to marked tokens only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x, column = split_column(x)
        removed = (1 - is_marked(column)) * _REMOVED
        return with_column(self.layer(x, removed.transpose(1, 2).unsqueeze(1)), column)


class CausalLayer(nn.Module):
    """A library's layer that takes (features, additive mask); each token attends to itself and to those before it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x, column = split_column(x)
        place = torch.arange(x.shape[1])
        later = (place.unsqueeze(0) > place.unsqueeze(1)).to(torch.float32)
        return with_column(self.layer(x, (later * _REMOVED).unsqueeze(0).unsqueeze(0)), column)


class ColumnNorm(nn.Module):
    """A norm over the features; the column is handed on."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x, column = split_column(x)
        return with_column(self.norm(x), column)


class MeanOfMarked(nn.Module):
    """(batch, tokens, width + 1) -> (batch, width): the mean over marked tokens; zero for a text without any."""

    def forward(self, x: Tensor) -> Tensor:
        x, column = split_column(x)
        marked = is_marked(column)
        return (x * marked).sum(dim=1) / marked.sum(dim=1).clamp(min=1)


class FirstOfColumns(nn.Module):
    """(batch, tokens, width + 1) -> (batch, width): the first token, whatever marks it."""

    def forward(self, x: Tensor) -> Tensor:
        return split_column(x)[0][:, 0]


def text_length(tokens: int | None, greatest: int, name: str) -> int:
    """The length of a text input. Raises ConfigError for more tokens than the model has positions."""
    if tokens is None:
        return min(DEFAULT_TOKENS, greatest)
    if not 1 <= tokens <= greatest:
        raise ConfigError(f"{name}: tokens={tokens} must be 1 to {greatest}, the positions that the model has")
    return tokens


def example_texts(tokens: int, vocabulary: int, pad: int | None) -> Tensor:
    """Two texts (2, tokens) int64, the second padded in its last third."""
    ids = torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    if pad is not None:
        ids[ids == pad] = (pad + 1) % vocabulary
        ids[1, tokens - tokens // 3 :] = pad
    return ids
